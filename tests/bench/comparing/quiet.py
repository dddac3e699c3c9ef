"""What keeps measurements honest: nothing left over from one step may cost the next one time.

Each function answers a trap that was met:

1. ext4 does not reuse an inode for minutes after its deletion, and every creation scans over such inodes: a deletion
   before a timed restore makes that 3 to 5 times slower. So nothing is deleted between steps: `Attic`.
2. On a virtual machine, freed memory may go back to the host, and its first touch is slow: `warm`.
3. Dirty pages of one step are written during the next one, and a global sync waits for everybody's: `flush` makes the
   repository's own files durable (and tells how long that took: what the tool itself left undone), then the rest.
"""

import ctypes
import mmap
import os
import subprocess
import time
from pathlib import Path

from .place import Place
from .shell import Failed, run, say

# Emptying a file costs as much as a small file is worth.
EMPTIED_FROM_BYTES = 64 << 10
# ext4 passes over inodes deleted less than a minute ago (RECENTCY_MIN), six minutes while their table is not written, and
# what is synced is in the journal only: restores of trees within these minutes took four times as long.
INODES_FORGOTTEN_AFTER_S = 365
INODES_NEGLIGIBLE = 20_000
# Left alone when memory is touched.
MEMORY_SPARED_BYTES = 512 << 20


class Attic:
    """Keeps what is not needed any more until deleting it disturbs nobody."""

    def __init__(self, place: Place):
        self.place = place
        self.number = 0
        self.inodes = 0
        self.cleared_at: float | None = None

    def take(self, *paths: Path) -> None:
        """Moves trees away and empties their large files: that frees space, but no inode."""
        for path in paths:
            if not path.exists():
                continue
            self.number += 1
            kept = self.place.attic / f"{os.getpid()}-{self.number}"
            path.rename(kept)
            self.inodes += _empty(kept)

    def clear(self) -> None:
        """Deletes everything."""
        left = sorted(self.place.attic.iterdir()) + sorted(self.place.rounds.iterdir())
        if not left:
            return
        say("deleting what is left over")
        self._delete(left)

    def _delete(self, paths: list[Path]) -> None:
        for path in paths:
            run(["rm", "-rf", path])
        if not self.place.quick:
            sync_file_system(self.place.work)
            if self.inodes > INODES_NEGLIGIBLE:
                self.cleared_at = time.monotonic()
        self.inodes = 0

    def rest(self) -> None:
        """Waits until the file system has forgotten the last deletion."""
        if self.cleared_at is not None:
            left = self.cleared_at + INODES_FORGOTTEN_AFTER_S - time.monotonic()
            if left > 0:
                say(f"waiting {left:.0f} s until deleted inodes are free again")
                time.sleep(left)
            self.cleared_at = None

    def make_room(self, bytes_needed: int, inodes_needed: int) -> None:
        """Deletes earlier than planned where the disk would not suffice otherwise; `Failed` if that does not help."""
        if _room(self.place.work, bytes_needed, inodes_needed):
            return
        self._delete(sorted(self.place.attic.iterdir()))
        self.rest()
        if not _room(self.place.work, bytes_needed, inodes_needed):
            raise Failed(f"{bytes_needed / 1e9:.1f} GB and {inodes_needed} inodes are needed in the work directory")


def _room(path: Path, bytes_needed: int, inodes_needed: int) -> bool:
    free = os.statvfs(path)
    has_inodes = free.f_files == 0 or free.f_favail > inodes_needed
    return free.f_bavail * free.f_frsize > bytes_needed and has_inodes


def _empty(root: Path) -> int:
    """Empties large files; how many entries there are."""
    entries = 0
    for directory, below, names in os.walk(root):
        entries += len(below) + len(names)
        for name in names:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            # A file with several names may be in use under another one.
            if status.st_size >= EMPTIED_FROM_BYTES and os.path.isfile(path) and not os.path.islink(path):
                os.truncate(path, 0)
    return entries


def flush(repository: Path | None, work: Path) -> float:
    """Makes the repository durable; seconds that took. Then everything else, untimed."""
    begun = time.monotonic()
    if repository is not None and repository.exists():
        if repository.is_file():
            _fsync(str(repository))
        for directory, _, names in os.walk(repository):
            for name in [*names, "."]:
                _fsync(os.path.join(directory, name))
    took = time.monotonic() - begun
    sync_file_system(work)
    return took


def _fsync(path: str) -> None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return  # a socket, a symbolic link, or a temporary file that is gone
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def sync_file_system(path: Path) -> None:
    """syncfs(2) on the file system of `path`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(handle) != 0:
            os.sync()
    finally:
        os.close(handle)


def warm(walk: Path, read: list[Path], touch_bytes: int) -> None:
    """Reads trees into the page cache, then touches as much free memory as the next step may need."""
    for tree in read:
        if tree.exists():
            subprocess.run([walk, "-r", tree], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    free = _free_memory_bytes() - MEMORY_SPARED_BYTES
    touched = min(touch_bytes, free)
    if touched > mmap.PAGESIZE:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0x8000)
        mmap.mmap(-1, touched, flags=flags).close()


def _free_memory_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemFree:"):
            return int(line.split()[1]) << 10
    return 0


def copy_tree(source: Path, target: Path) -> None:
    """A faithful copy; the original stays as it is."""
    target.parent.mkdir(parents=True, exist_ok=True)
    run(["cp", "-a", source, target])


def settle(seconds: float) -> None:
    """Lets changes grow old enough to be trusted by file caches."""
    time.sleep(seconds)
