"""bupstash at its defaults, with a send log as its manual advises; over the network through ssh."""

import shlex
from pathlib import Path

from ..measuring import Command, environment
from ..shell import run
from . import remote
from .base import Kit, Tool


class Bupstash(Tool):
    name = "bupstash"
    terms = ("fsync of every chunk file and of its log; zstd 3; XChaCha20-Poly1305 with sealed keys at rest, "
             "ssh at its defaults on the way")

    @classmethod
    def unavailable(cls, kit: Kit, mode: str) -> str | None:
        return kit.lacks("bupstash", "ssh", "sshd") if mode == "network" else kit.lacks("bupstash")

    def setup(self, source: Path) -> None:
        self.items = 0
        self.connection = {"BUPSTASH_REPOSITORY": self.repository}
        program = self.kit.get("bupstash")
        variables = environment(self.environment())
        run([program, "init", "-r", self.repository], env=variables)
        run([program, "new-key", "-o", self.home / "key"], env=variables)
        if self.mode == "network":
            base = {"HOME": self.home / "server-home"}
            self.daemon, ssh, program = remote.start(self.kit, self.home, program, base)
            words = [*ssh, remote.HOST, program, "serve", self.repository]
            self.connection = {"BUPSTASH_REPOSITORY_COMMAND": shlex.join(str(word) for word in words)}
            self.daemon.pause()

    def environment(self) -> dict:
        return super().environment() | self.connection | {"BUPSTASH_KEY": self.home / "key"}

    def _bupstash(self, *words) -> Command:
        return self.command(self.kit.get("bupstash"), *words)

    def backup(self, source: Path) -> Command:
        self.items += 1
        return self._bupstash("put", "--quiet", "--send-log", self.home / "send-log", f"name={self.items}", "::", source)

    def restore(self, source: Path, target: Path) -> Command:
        return self._bupstash("restore", "--quiet", "--ownership", "--xattrs", "--into", target, f"name={self.items}")

    def restore_one(self, source: Path, file: str, target: Path) -> Command:
        into = shlex.quote(str(target / Path(file).name))
        words = [self.kit.get("bupstash"), "get", "--quiet", "--pick", file, f"name={self.items}"]
        return self.command("bash", "-c", f"exec {shlex.join(str(word) for word in words)} > {into}")
