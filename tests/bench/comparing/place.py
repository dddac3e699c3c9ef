"""Where everything lies: all of it below the work directory."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """The directories of one run."""

    work: Path
    quick: bool

    @property
    def corpora(self) -> Path:
        """Corpora as they were made; never changed afterwards."""
        return self.work / ("corpora-quick" if self.quick else "corpora")

    @property
    def sources(self) -> Path:
        """What corpora are made of."""
        return self.work / "sources"

    @property
    def tools(self) -> Path:
        """Programs that were installed or compiled for the bench alone."""
        return self.work / "tools"

    @property
    def rounds(self) -> Path:
        """Repositories, homes, changed copies of corpora of the round that runs."""
        return self.work / "rounds"

    @property
    def attic(self) -> Path:
        """What is not needed any more but must not be deleted yet."""
        return self.work / "attic"

    @property
    def logs(self) -> Path:
        """What measured commands said."""
        return self.work / "logs"

    def make(self) -> None:
        for directory in (self.corpora, self.sources, self.tools / "bin", self.rounds, self.attic, self.logs):
            directory.mkdir(parents=True, exist_ok=True)
