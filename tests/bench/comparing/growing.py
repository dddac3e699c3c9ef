"""How the cost of Strandline grows with files and bytes: one size after the other, each in repositories of its own."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import growth_chart, measuring, quiet
from .place import Place
from .shell import Failed, run, say
from .tools.base import FIRST, RESTORE, UNCHANGED, Kit
from .tools.strandline import Strandline

FILES, GIGABYTES = "files", "GB"
FILES_PER_DIRECTORY = 1000
# With so large inodes ext4 keeps the content of such small files in them.
INODE_BYTES = 512
CONTENT_BYTES = (60, 200)
TEXT_FILE_BYTES = 64 * 10**6
# File caches do not trust what changed within two seconds before a backup.
SETTLE_S = 3


class Growth:
    """Results are written after every step."""

    def __init__(self, place: Place, kit: Kit, out: Path):
        self.place, self.kit, self.out = place, kit, out
        self.rows: list[dict] = []
        kept = out / "growth.json"
        if kept.exists():
            self.rows = json.loads(kept.read_text())["rows"]

    def of_files(self, files: int) -> None:
        say(f"{files:,} files")
        self._forget(FILES, files)
        home = self._home()
        with _image(home / "source.img", home / "source", files) as source, \
                _image(home / "target.img", home / "target", files) as target:
            _make_files(source, files)
            self._measure(FILES, files, home, source, target)
        shutil.rmtree(home)

    def of_bytes(self, gigabytes: int) -> None:
        say(f"{gigabytes} GB")
        self._forget(GIGABYTES, gigabytes)
        home = self._home()
        source = home / "source"
        source.mkdir()
        _make_text(source, gigabytes * 10**9)
        self._measure(GIGABYTES, gigabytes, home, source, None)
        shutil.rmtree(home)

    def _home(self) -> Path:
        home = self.place.rounds / "growth"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        return home

    def _measure(self, of: str, size: int, home: Path, source: Path, target: Path | None) -> None:
        quiet.settle(SETTLE_S)
        tool = Strandline(self.kit, home / "strandline", "network")
        try:
            tool.setup(source)
            self._step(of, size, FIRST, tool, tool.backup(source))
            self._step(of, size, UNCHANGED, tool, tool.backup(source))
            if target is not None:
                self._step(of, size, RESTORE, tool, tool.restore(source, target))
                restored = tool.restored(source, target)
                if (found := _count(restored)) != (there := _count(source)):
                    raise Failed(f"of {there} files and bytes {found} were restored")
        finally:
            tool.teardown()

    def _step(self, of: str, size: int, phase: str, tool: Strandline, command: measuring.Command) -> None:
        quiet.flush(tool.repository, self.place.work)
        quiet.warm(self.kit.get("walk"), [], 1 << 30)
        cost, failure = measuring.measure(command, self.place, self.place.logs / f"growth-{of}-{size}-{phase}.log")
        if cost is None:
            raise Failed(f"{phase}: {failure}")
        _, apparent = measuring.size(tool.repository)
        say(f"  {phase:9} {cost.wall_s:7.2f} s  agent {cost.client_peak_mib:.0f} MiB  server {cost.server_peak_mib:.0f} MiB")
        self.rows.append({"of": of, "size": size, "phase": phase, "repository_bytes": apparent} | cost.fields())
        self._write()

    def _forget(self, of: str, size: int) -> None:
        self.rows = [row for row in self.rows if (row["of"], row["size"]) != (of, size)]

    def _write(self) -> None:
        self.rows.sort(key=lambda row: (row["of"], row["size"]))
        (self.out / "growth.json").write_text(json.dumps({"rows": self.rows}, indent=1) + "\n")
        (self.out / "growth.md").write_text(growth_chart.markdown(self.rows))
        (self.out / "growth.svg").write_text(growth_chart.svg(self.rows))


@contextmanager
def _image(image: Path, mounted: Path, files: int) -> Iterator[Path]:
    """A file system for so many small files, which goes away in one piece."""
    inodes = files + files // FILES_PER_DIRECTORY + 1000
    # A hole for the most part: ext4 wants as many blocks as inodes.
    with image.open("wb") as file:
        file.truncate(inodes * 4096 + (256 << 20))
    run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=1", "-O", "inline_data,^has_journal", "-I", INODE_BYTES, "-N", inodes, "-m", 0, image])
    mounted.mkdir()
    run(["mount", "-o", "loop,noatime,noinit_itable", image, mounted])
    try:
        inner = mounted / "files"
        inner.mkdir()
        yield inner
    finally:
        run(["umount", mounted])
        image.unlink()


def _make_files(root: Path, files: int) -> None:
    source = random.Random("growth")
    for number in range(0, files, FILES_PER_DIRECTORY):
        folder = root / f"{number // FILES_PER_DIRECTORY // 100:03}" / f"{number // FILES_PER_DIRECTORY:05}"
        folder.mkdir(parents=True)
        handle = os.open(folder, os.O_RDONLY)
        for _ in range(min(FILES_PER_DIRECTORY, files - number)):
            content = source.randbytes(source.randint(*CONTENT_BYTES) // 2).hex().encode()
            name = f"{source.getrandbits(48):012x}.txt"
            file = os.open(name, os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=handle)
            os.write(file, content)
            os.close(file)
        os.close(handle)
    quiet.sync_file_system(root)


def _make_text(root: Path, size_bytes: int) -> None:
    for number in range(0, size_bytes, TEXT_FILE_BYTES):
        with (root / f"{number // TEXT_FILE_BYTES:05}.txt").open("wb") as file:
            for _ in range(min(TEXT_FILE_BYTES, size_bytes - number) // 10**6):
                file.write(os.urandom(10**6 // 2).hex().encode())
    quiet.sync_file_system(root)


def _count(root: Path) -> tuple[int, int]:
    files = size = 0
    for directory, _, names in os.walk(root):
        files += len(names)
        size += sum(os.lstat(os.path.join(directory, name)).st_size for name in names)
    return files, size
