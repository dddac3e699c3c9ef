"""What bounds any tool on this machine: a plain copy, a walk that looks at every entry, bytes through TLS."""

from pathlib import Path

from ..measuring import Command
from ..shell import free_port
from .base import FIRST, RESTORE, UNCHANGED, Kit, Tool
from .pipeline import BUFFER_BYTES, Pipeline, listener, sender


class Limit(Tool):
    """Keeps nothing."""

    @classmethod
    def unavailable(cls, kit: Kit, mode: str) -> str | None:
        return None

    @property
    def repository(self) -> None:
        return None


class Copy(Limit):
    name = "cp"
    phases = (RESTORE,)
    terms = "`cp -a` of the corpus: the limit of a restore"

    def restore(self, source: Path, target: Path) -> Command:
        return self.command("cp", "-a", "--reflink=never", f"{source}/.", target)


class Walk(Limit):
    name = "walk"
    phases = (UNCHANGED,)
    terms = "fstatat of every entry with one thread per core: the limit of an unchanged run"

    def backup(self, source: Path) -> Command:
        return self.command(self.kit.get("walk"), source)


class TlsLoopback(Limit, Pipeline):
    name = "tls"
    phases = (FIRST,)
    terms = "the random corpus through the TLS of the tar pipeline into nothing: the limit of a network run"

    @classmethod
    def unavailable(cls, kit: Kit, mode: str) -> str | None:
        return "only over the network" if mode == "local" else kit.lacks("socat", "certificate")

    @classmethod
    def applies(cls, corpus: str) -> bool:
        return corpus == "random"

    def setup(self, source: Path) -> None:
        pass

    def backup(self, source: Path) -> Command:
        [file] = source.iterdir()
        port = free_port()
        receive = f"socat -u -b {BUFFER_BYTES} {listener(self.kit, port)} OPEN:/dev/null"
        return self._piped(f"{sender(self.kit, port)} < {file}", self._other_side(port, receive))
