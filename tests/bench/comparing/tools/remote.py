"""An own ssh daemon on loopback, for tools that start their other side through ssh.

The other side is run by `measure`, which tells its peak; its CPU is counted as that of the daemon's children.
"""

import getpass
import shlex
from pathlib import Path

from ..measuring import environment
from ..servers import Sshd
from ..shell import free_port, run
from .base import Kit

HOST = "bench"
# Where sshd, run by root, wants an empty directory.
PRIVILEGE_SEPARATION = Path("/run/sshd")


def start(kit: Kit, home: Path, program: Path, variables: dict) -> tuple[Sshd, list, Path]:
    """The daemon, the ssh command that reaches it, and the program to start there instead of `program`."""
    keys = home / "ssh"
    keys.mkdir()
    for name in ("host", "client"):
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "bench", "-f", keys / name])
    port = free_port()
    (keys / "known_hosts").write_text(f"[127.0.0.1]:{port} {(keys / 'host.pub').read_text()}")
    (keys / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {keys / 'host'}\nAuthorizedKeysFile {keys / 'client.pub'}\n"
        "PidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        "PermitRootLogin prohibit-password\nAllowAgentForwarding no\nX11Forwarding no\nPrintMotd no\n")
    (keys / "config").write_text(
        f"Host {HOST}\n HostName 127.0.0.1\n Port {port}\n User {getpass.getuser()}\n"
        f" IdentityFile {keys / 'client'}\n IdentitiesOnly yes\n"
        f" UserKnownHostsFile {keys / 'known_hosts'}\n StrictHostKeyChecking yes\n BatchMode yes\n LogLevel ERROR\n")
    usage = home / "server-usage.jsonl"
    wrapper = home / "other-side"
    settings = " ".join(f"{name}={shlex.quote(str(value))}" for name, value in variables.items())
    wrapper.write_text(f'#!/bin/sh\nexec env {settings} {shlex.quote(str(kit.get("measure")))} {shlex.quote(str(usage))} '
                       f'{shlex.quote(str(program))} "$@"\n')
    wrapper.chmod(0o755)
    if not PRIVILEGE_SEPARATION.exists():
        PRIVILEGE_SEPARATION.mkdir(mode=0o755)
    argv = [kit.get("sshd"), "-D", "-e", "-f", keys / "sshd_config"]
    daemon = Sshd(argv, port, home / "server.log", environment(variables), usage)
    return daemon, [kit.get("ssh"), "-F", keys / "config"], wrapper
