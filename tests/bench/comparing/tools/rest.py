"""The REST server that restic and rustic share: restic's own if it is installed, else rustic_server, with TLS."""

from pathlib import Path

from ..measuring import environment
from ..servers import Daemon
from ..shell import free_port
from .base import Kit

TERMS = "TLS 1.3 on the way"


def lacks(kit: Kit) -> str | None:
    return kit.lacks("certificate") or (None if "rest-server" in kit.programs else kit.lacks("rustic-server"))


def start(kit: Kit, repository: Path, log: Path, variables: dict) -> tuple[Daemon, str]:
    """The server, and the URL of a repository there."""
    port = free_port()
    if "rest-server" in kit.programs:
        argv = [kit.get("rest-server")]
    else:
        # It wants a list of who may do what, and 0.4.4 crashes at requests without a name.
        rights = log.with_name("rights.toml")
        rights.write_text('[bench]\nbench = "Modify"\n')
        argv = [kit.get("rustic-server"), "serve", "--private-repos", "--acl-path", rights]
    argv += ["--path", repository, "--listen", f"127.0.0.1:{port}", "--no-auth",
             "--tls", "--tls-cert", kit.get("certificate"), "--tls-key", kit.get("key")]
    return Daemon(argv, port, log, environment(variables)), f"rest:https://bench:bench@127.0.0.1:{port}/bench/"
