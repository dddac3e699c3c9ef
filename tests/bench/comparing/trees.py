"""Whether two trees are the same: names, types, contents, modes, modification times, targets of symbolic links."""

import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

DIFFERENCES_SHOWN = 4
FILES_PER_JOB = 256


@dataclass(frozen=True)
class Entry:
    kind: int
    mode: int
    mtime_ns: int
    size: int
    content: str


def fingerprint(root: Path) -> dict[str, Entry]:
    """Every entry below `root` by its relative path. `root` itself is left out: who restores chooses it."""
    found: dict[str, os.stat_result] = {}
    pending = [""]
    while pending:
        below = pending.pop()
        for entry in os.scandir(os.path.join(root, below)):
            path = os.path.join(below, entry.name)
            found[path] = entry.stat(follow_symlinks=False)
            if entry.is_dir(follow_symlinks=False):
                pending.append(path)
    regular = [path for path, status in found.items() if stat.S_ISREG(status.st_mode)]
    # Threads: reading and hashing happen outside of the interpreter, and a pool of processes may wait for ever at its end.
    jobs = [regular[at:at + FILES_PER_JOB] for at in range(0, len(regular), FILES_PER_JOB)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(lambda job: [_digest(os.path.join(root, path)) for path in job], jobs)
        contents = dict(zip(regular, (digest for job in digests for digest in job), strict=True))
    return {path: _entry(os.path.join(root, path), status, contents.get(path, "")) for path, status in found.items()}


def _entry(path: str, status: os.stat_result, content: str) -> Entry:
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFLNK:
        # Modes of symbolic links mean nothing.
        return Entry(kind, 0, status.st_mtime_ns, 0, os.readlink(path))
    size = status.st_size if kind == stat.S_IFREG else 0
    return Entry(kind, stat.S_IMODE(status.st_mode), status.st_mtime_ns, size, content)


def _digest(path: str) -> str:
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def difference(expected: dict[str, Entry], actual: dict[str, Entry], mtime_unit_ns: int = 1) -> str | None:
    """The first differences in words; None if there are none. Times are compared in whole units."""
    found = []
    for path in sorted(expected.keys() | actual.keys()):
        left, right = expected.get(path), actual.get(path)
        if left is None or right is None:
            found.append(f"{path}: {'missing' if right is None else 'not in the corpus'}")
            continue
        names = [name for name in ("kind", "mode", "size", "content") if getattr(left, name) != getattr(right, name)]
        if left.mtime_ns // mtime_unit_ns != right.mtime_ns // mtime_unit_ns:
            names.append("mtime")
        if names:
            found.append(f"{path}: {', '.join(names)}")
    if not found:
        return None
    more = f" and {len(found) - DIFFERENCES_SHOWN} more" if len(found) > DIFFERENCES_SHOWN else ""
    return "restored tree differs: " + "; ".join(found[:DIFFERENCES_SHOWN]) + more
