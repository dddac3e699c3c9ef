"""restic, at its defaults."""

from pathlib import Path

from ..measuring import Command, environment
from ..shell import run
from . import rest
from .base import PASSWORD, Kit, Tool


class Restic(Tool):
    name = "restic"
    terms = f"fsync of every file of the repository; zstd at its default; AES-256-CTR with Poly1305 at rest, {rest.TERMS}"

    @classmethod
    def unavailable(cls, kit: Kit, mode: str) -> str | None:
        return kit.lacks("restic") or (rest.lacks(kit) if mode == "network" else None)

    def setup(self, source: Path) -> None:
        self.url = str(self.repository)
        if self.mode == "network":
            self.repository.mkdir()
            self.daemon, self.url = rest.start(self.kit, self.repository, self.home / "server.log", super().environment())
        run([self.kit.get("restic"), "init", *self._authority()], env=environment(self.environment()))
        if self.daemon is not None:
            self.daemon.pause()

    def _authority(self) -> list:
        return ["--cacert", self.kit.get("authority")] if self.mode == "network" else []

    def environment(self) -> dict:
        return super().environment() | {"RESTIC_REPOSITORY": self.url, "RESTIC_PASSWORD": PASSWORD}

    def _restic(self, *words) -> Command:
        return self.command(self.kit.get("restic"), *words, "--quiet", *self._authority())

    def backup(self, source: Path) -> Command:
        return self._restic("backup", source)

    def restore(self, source: Path, target: Path) -> Command:
        return self._restic("restore", "latest", "--target", target)

    def restore_one(self, source: Path, file: str, target: Path) -> Command:
        return self._restic("restore", "latest", "--target", target, "--include", source / file)
