"""What the rotation knows of a tool."""

from dataclasses import dataclass, field
from pathlib import Path

from ..measuring import Command
from ..place import Place
from ..servers import Daemon

FIRST, UNCHANGED, CHANGED, RESTORE, ONE_FILE = "first", "unchanged", "changed", "restore", "one file"
PHASES = (FIRST, UNCHANGED, CHANGED, RESTORE, ONE_FILE)
PASSWORD = "a password that only protects made-up data"


@dataclass
class Kit:
    """Programs, their versions, and why some are not there."""

    place: Place
    programs: dict[str, Path] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    # By tool or program: why it cannot be had.
    missing: dict[str, str] = field(default_factory=dict)

    def get(self, program: str) -> Path:
        return self.programs[program]

    def lacks(self, *programs: str) -> str | None:
        """Why one of these programs is not there; None if all are."""
        reasons = [self.missing.get(name, f"no {name}") for name in programs if name not in self.programs]
        return "; ".join(reasons) or None


class Tool:
    """A tool with a repository of its own in `home`, for one round of one corpus.

    Commands are made by `backup`, `restore` and `restore_one`; the rest happens untimed.
    """

    name = ""
    # What it promises when it has ended: durability, compression, encryption.
    terms = ""
    phases: tuple[str, ...] = PHASES
    # Restored modification times are compared in units of so many ns.
    mtime_unit_ns = 1

    def __init__(self, kit: Kit, home: Path, mode: str):
        self.kit, self.home, self.mode = kit, home, mode
        self.daemon: Daemon | None = None
        home.mkdir(parents=True)

    @classmethod
    def unavailable(cls, kit: Kit, mode: str) -> str | None:
        """Why this tool cannot run in this mode."""
        return kit.lacks(cls.name)

    @classmethod
    def applies(cls, corpus: str) -> bool:
        """Whether the tool has anything to do with a corpus; only limits say no."""
        return True

    @property
    def repository(self) -> Path | None:
        """All that is kept on the storing side; its size is measured."""
        return self.home / "repository"

    def setup(self, source: Path) -> None:
        """Makes the repository, and starts its server if the mode is network."""

    def backup(self, source: Path) -> Command:
        raise NotImplementedError

    def restore(self, source: Path, target: Path) -> Command:
        """Restores the newest state of `source` into the directory `target`, which is new and empty."""
        raise NotImplementedError

    def restore_one(self, source: Path, file: str, target: Path) -> Command:
        """Restores one file, given relative to `source`."""
        raise NotImplementedError

    def restored(self, source: Path, target: Path) -> Path:
        """Where `restore` puts what was directly in `source`. Many tools repeat the whole path below the target."""
        repeated = target / source.relative_to("/")
        return repeated if repeated.is_dir() else target

    def restored_one(self, file: str, target: Path) -> Path | None:
        """The file that `restore_one` made, wherever below the target."""
        name = Path(file).name
        return next((path for path in target.rglob("*") if path.name == name and path.is_file()), None)

    def environment(self) -> dict:
        """A home of its own, so that caches are the round's own."""
        home = self.home / "home"
        home.mkdir(exist_ok=True)
        return {"HOME": home, "XDG_CACHE_HOME": home / ".cache", "XDG_CONFIG_HOME": home / ".config"}

    def command(self, *argv, cwd: Path | None = None, environment: dict | None = None, server=None) -> Command:
        return Command(list(argv), cwd, self.environment() | (environment or {}), server or self.daemon)

    def teardown(self) -> None:
        if self.daemon is not None:
            self.daemon.stop()
            self.daemon = None
