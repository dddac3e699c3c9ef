"""Strandline: `strand`, and `strand-server` with an enrolled agent."""

from pathlib import Path

from ..measuring import Command, environment
from ..servers import Daemon
from ..shell import free_port, run
from .base import Kit, Tool


class Strandline(Tool):
    name = "strandline"
    terms = ("fsync of data and manifest before the commit is answered; zstd 3, up to 6 where processors are idle; AES-256-GCM at rest, "
             "mutual TLS 1.3 on the way")

    @classmethod
    def unavailable(cls, kit: Kit, mode: str) -> str | None:
        return kit.lacks("strand", "strand-server") if mode == "network" else kit.lacks("strand")

    def setup(self, source: Path) -> None:
        self.url = self.repository
        if self.mode == "network":
            self._start_server()
        run([self.kit.get("strand"), "init", "-r", self.url], env=environment(self.environment()))
        if self.daemon is not None:
            self.daemon.pause()

    def _start_server(self) -> None:
        variables = environment(self.environment())
        port = free_port()
        address = f"127.0.0.1:{port}"
        server = [self.kit.get("strand-server"), "--data", self.repository]
        run([*server, "init", "--name", "127.0.0.1", "--listen", address, "--advertise", address], env=variables)
        run([*server, "tenant", "add", "bench"], env=variables)
        self.daemon = Daemon([*server, "serve"], port, self.home / "server.log", variables)
        token = run([*server, "token", "create", "bench"], env=variables).strip()
        run([self.kit.get("strand"), "enroll", token], env=variables)
        self.url = f"strand://{address}/main"

    def _strand(self, *words) -> Command:
        return self.command(self.kit.get("strand"), *words, "-r", self.url)

    def backup(self, source: Path) -> Command:
        return self._strand("backup", source)

    def restore(self, source: Path, target: Path) -> Command:
        return self._strand("restore", "latest", "--target", target)

    def restore_one(self, source: Path, file: str, target: Path) -> Command:
        return self._strand("restore", f"latest:{source / file}", "--target", target)
