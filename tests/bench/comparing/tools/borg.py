"""borg at its defaults; over the network through ssh."""

import shlex
from pathlib import Path

from ..measuring import Command, environment
from ..shell import run
from . import remote
from .base import PASSWORD, Kit, Tool


class Borg(Tool):
    name = "borg"
    terms = "fsync of every segment; lz4; AES-256-CTR with BLAKE2b at rest, ssh at its defaults on the way"

    @classmethod
    def unavailable(cls, kit: Kit, mode: str) -> str | None:
        return kit.lacks("borg", "ssh", "sshd") if mode == "network" else kit.lacks("borg")

    def setup(self, source: Path) -> None:
        self.url = str(self.repository)
        self.archives = 0
        self.remote: dict = {}
        if self.mode == "network":
            base = self.home / "server-home"
            self.daemon, ssh, program = remote.start(self.kit, self.home, self.kit.get("borg"), {"BORG_BASE_DIR": base})
            self.url = f"ssh://{remote.HOST}{self.repository}"
            self.remote = {"BORG_RSH": shlex.join(str(word) for word in ssh), "BORG_REMOTE_PATH": program}
        run([self.kit.get("borg"), "init", "--encryption", "repokey-blake2", self.url], env=environment(self.environment()))
        if self.daemon is not None:
            self.daemon.pause()

    def environment(self) -> dict:
        return super().environment() | self.remote | {"BORG_PASSPHRASE": PASSWORD, "BORG_BASE_DIR": self.home / "home"}

    def _borg(self, *words, cwd: Path | None = None) -> Command:
        return self.command(self.kit.get("borg"), *words, cwd=cwd)

    def backup(self, source: Path) -> Command:
        self.archives += 1
        return self._borg("create", f"{self.url}::{self.archives}", source)

    def restore(self, source: Path, target: Path) -> Command:
        return self._borg("extract", f"{self.url}::{self.archives}", cwd=target)

    def restore_one(self, source: Path, file: str, target: Path) -> Command:
        pattern = f"pp:{(source / file).relative_to('/')}"
        return self._borg("extract", f"{self.url}::{self.archives}", pattern, cwd=target)
