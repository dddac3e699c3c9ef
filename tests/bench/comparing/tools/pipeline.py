"""The reference: `tar | zstd -3 -T2 | TLS | file`. No deduplication, no encryption at rest, no verification.

It knows no second version: what has changed is archived anew as a whole, beside the first archive, and that is restored.
TLS is by socat. A receiver is started before each step and ends with it; the step is over when the receiver has made the
file durable. In a local repository the TLS in the middle is left out.
"""

import shlex
from pathlib import Path

from ..measuring import Command, environment
from ..servers import OneShot
from ..shell import free_port
from .base import CHANGED, FIRST, RESTORE, Kit, Tool

BUFFER_BYTES = 1 << 20


def sender(kit: Kit, port: int) -> str:
    authority = kit.get("authority")
    return f"socat -u -b {BUFFER_BYTES} STDIN OPENSSL:127.0.0.1:{port},cafile={authority},commonname=127.0.0.1"


def receiver(kit: Kit, port: int) -> str:
    authority = kit.get("authority")
    return f"socat -u -b {BUFFER_BYTES} OPENSSL:127.0.0.1:{port},cafile={authority},commonname=127.0.0.1 STDOUT"


def listener(kit: Kit, port: int) -> str:
    return f"OPENSSL-LISTEN:{port},bind=127.0.0.1,reuseaddr,verify=0,cert={kit.get('certificate-and-key')}"


class Pipeline(Tool):
    name = "tar"
    phases = (FIRST, CHANGED, RESTORE)
    terms = "fsync of the one file at the end; zstd 3 on two threads; nothing is encrypted at rest, TLS 1.3 on the way (socat)"
    # The usual format of GNU tar has whole seconds.
    mtime_unit_ns = 1_000_000_000

    @classmethod
    def unavailable(cls, kit: Kit, mode: str) -> str | None:
        return kit.lacks("tar", "zstd", "socat", "certificate") if mode == "network" else kit.lacks("tar", "zstd")

    def setup(self, source: Path) -> None:
        self.repository.mkdir()
        self.archives = 0

    def _archive(self) -> str:
        """The newest archive, quoted for the shell."""
        return shlex.quote(str(self.repository / f"{self.archives}.tar.zst"))

    def _piped(self, script: str, server: OneShot | None = None, cwd: Path | None = None) -> Command:
        return self.command("bash", "-c", f"set -o pipefail; {script}", cwd=cwd, server=server)

    def _other_side(self, port: int, script: str) -> OneShot:
        argv = ["bash", "-c", script]
        return OneShot(self.kit.get("measure"), argv, port, self.home / "usage.jsonl", environment(self.environment()))

    def backup(self, source: Path) -> Command:
        self.archives += 1
        archive = self._archive()
        pack = "tar -cf - . | zstd -q -3 -T2"
        if self.mode == "local":
            return self._piped(f"{pack} > {archive} && sync {archive}", cwd=source)
        port = free_port()
        receive = f"socat -u -b {BUFFER_BYTES} {listener(self.kit, port)} OPEN:{archive},creat,trunc && sync {archive}"
        return self._piped(f"{pack} | {sender(self.kit, port)}", self._other_side(port, receive), source)

    def restore(self, source: Path, target: Path) -> Command:
        archive = self._archive()
        if self.mode == "local":
            return self._piped(f"zstd -q -dc {archive} | tar -xpf -", cwd=target)
        port = free_port()
        send = f"socat -u -b {BUFFER_BYTES} OPEN:{archive},rdonly {listener(self.kit, port)}"
        return self._piped(f"{receiver(self.kit, port)} | zstd -q -dc | tar -xpf -", self._other_side(port, send), target)
