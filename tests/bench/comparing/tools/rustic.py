"""rustic, at its defaults. Its settings are in a profile: it takes the authority of a REST server from nowhere else."""

import json
from pathlib import Path

from ..measuring import Command, environment
from ..shell import run
from . import rest
from .base import PASSWORD, Kit, Tool


class Rustic(Tool):
    name = "rustic"
    terms = f"fsync of every file of the repository; zstd at its default; AES-256-CTR with Poly1305 at rest, {rest.TERMS}"

    @classmethod
    def unavailable(cls, kit: Kit, mode: str) -> str | None:
        return kit.lacks("rustic") or (rest.lacks(kit) if mode == "network" else None)

    def setup(self, source: Path) -> None:
        url = str(self.repository)
        if self.mode == "network":
            self.repository.mkdir()
            self.daemon, url = rest.start(self.kit, self.repository, self.home / "server.log", self.environment())
        profile = self.home / "home/.config/rustic/rustic.toml"
        profile.parent.mkdir(parents=True)
        # Strings of JSON are strings of TOML.
        lines = ["[repository]", f"repository = {json.dumps(url)}", f"password = {json.dumps(PASSWORD)}"]
        if self.mode == "network":
            lines += ["[repository.options]", f"cacert = {json.dumps(str(self.kit.get('authority')))}"]
        profile.write_text("\n".join(lines) + "\n")
        run([self.kit.get("rustic"), "init"], env=environment(self.environment()))
        if self.daemon is not None:
            self.daemon.pause()

    def _rustic(self, *words) -> Command:
        return self.command(self.kit.get("rustic"), *words)

    def backup(self, source: Path) -> Command:
        return self._rustic("backup", source)

    def restore(self, source: Path, target: Path) -> Command:
        return self._rustic("restore", f"latest:{source}", target)

    def restore_one(self, source: Path, file: str, target: Path) -> Command:
        return self._rustic("restore", f"latest:{source / file}", target)
