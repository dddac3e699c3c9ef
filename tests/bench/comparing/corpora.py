"""The corpora, made of what every Debian-like machine has. The same seed makes the same corpus."""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import changes, text
from .place import Place
from .shell import Failed, find, run, say

SEED = 20_260_101
MIB = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """How a corpus is made, and how its second version is."""

    name: str
    title: str
    make: Callable[[Path, Place], None]
    change: Callable[[Path, random.Random], str]
    # A tree of many files: one of them is restored alone, and a walk is the limit of an unchanged run.
    is_tree: bool


def ensure(corpus: Corpus, place: Place) -> Path:
    """The corpus, made now unless an earlier run has made it. A run that was interrupted leaves none."""
    made = place.corpora / corpus.name
    if not made.exists():
        say(f"making corpus {corpus.name}: {corpus.title}")
        partial = place.corpora / f"{corpus.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        corpus.make(partial, place)
        partial.rename(made)
    return made


def random_of(corpus: Corpus, purpose: str) -> random.Random:
    return random.Random(f"{SEED} {corpus.name} {purpose}")


# --- a Linux source tree ------------------------------------------------------------------------------------------


def make_linux(target: Path, place: Place) -> None:
    archive = _linux_archive(place)
    only = ["--wildcards", "*/fs/ext4", "*/net/ipv4", "*/kernel"] if place.quick else []
    run(["tar", "-xf", archive, "--strip-components=1", "-C", target, *only])


def _linux_archive(place: Place) -> Path:
    """`linux-source-*.tar.xz` of Debian's package, unpacked but not installed."""
    def archives(root: Path) -> list[Path]:
        return sorted(root.glob("usr/src/linux-source-*.tar.xz"))

    if found := archives(Path("/")) + archives(place.sources):
        return found[-1]
    if not find("apt-get"):
        raise Failed("no apt-get: put a linux-source-*.tar.xz into /usr/src")
    depends = run(["apt-cache", "depends", "--important", "linux-source"])
    names = [line.split()[-1] for line in depends.splitlines() if "Depends:" in line]
    if not names:
        raise Failed("apt knows no linux-source (try apt-get update)")
    run(["apt-get", "download", names[0]], cwd=place.sources)
    for package in place.sources.glob("linux-source-*.deb"):
        run(["dpkg-deb", "-x", package, place.sources])
        package.unlink()
    if not archives(place.sources):
        raise Failed(f"{names[0]} has no archive of sources")
    return archives(place.sources)[-1]


# --- a copy of /usr -----------------------------------------------------------------------------------------------

USR_BYTES_MAX = 3000 * MIB
USR_QUICK_BYTES_MAX = 40 * MIB


def make_usr(target: Path, place: Place) -> None:
    _copy_some("/usr", target, USR_QUICK_BYTES_MAX if place.quick else USR_BYTES_MAX)


def _copy_some(root: str, target: Path, bytes_max: int) -> None:
    """Copies directories of the second level in order of their names, each whole or not at all, until all is full."""
    left = bytes_max
    taken = []
    for first in sorted(os.scandir(root), key=lambda entry: entry.name):
        if not first.is_dir(follow_symlinks=False):
            continue
        for second in sorted(os.scandir(first.path), key=lambda entry: entry.name):
            needed = _tree_bytes(second.path) if second.is_dir(follow_symlinks=False) else _file_bytes(second.path)
            if needed <= left and not os.path.ismount(second.path):
                left -= needed
                taken.append(os.path.relpath(second.path, root))
    for start in range(0, len(taken), 1000):
        run(["cp", "-a", "-x", "--parents", "-t", target, *taken[start:start + 1000]], cwd=root)
    # Sockets and the like would be noise; there are hardly any.
    for directory, _, names in os.walk(target):
        for name in names:
            path = Path(directory, name)
            if not path.is_symlink() and not path.is_file():
                path.unlink()


def _tree_bytes(root: str) -> int:
    return sum(_file_bytes(os.path.join(at, name)) for at, _, names in os.walk(root) for name in names)


def _file_bytes(path: str) -> int:
    status = os.lstat(path)
    return status.st_blocks * 512


# --- a raw image of a small system ---------------------------------------------------------------------------------


def make_image(target: Path, place: Place) -> None:
    mkfs = find("mkfs.ext4")
    if not mkfs:
        raise Failed("no mkfs.ext4 (package e2fsprogs)")
    system_mib, image_mib = (40, 64) if place.quick else (2000, 2400)
    root = place.corpora / "image-root.partial"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    # Another part of the system than corpus `usr` has first: libraries before programs.
    for name in ("lib", "share", "bin", "sbin"):
        left = system_mib * MIB - _tree_bytes(str(root))
        (root / "usr" / name).mkdir(parents=True)
        _copy_some(f"/usr/{name}", root / "usr" / name, left)
    run(["cp", "-a", "-x", "/etc", root])
    image = target / "system.img"
    unique = "5f3c9d1e-4a55-4d0c-9d0a-6c2b8f1e7a90"
    run([mkfs, "-q", "-F", "-U", unique, "-E", f"hash_seed={unique},lazy_itable_init=0", "-d", root, image, f"{image_mib}M"])
    shutil.rmtree(root)


# --- what is generated ---------------------------------------------------------------------------------------------


def make_sql(target: Path, place: Place) -> None:
    total = 20 * MIB if place.quick else 1024 * MIB
    source = text.Rows(random.Random(f"{SEED} rows"))
    with open(target / "dump.sql", "wb") as dump:
        source.fill(dump, total * 7 // 10, source.sql)
    with open(target / "events.csv", "wb") as table:
        source.fill(table, total * 3 // 10, source.csv)


def make_random(target: Path, place: Place) -> None:
    source = random.Random(f"{SEED} random")
    with open(target / "random.bin", "wb") as file:
        for _ in range(32 if place.quick else 1024):
            file.write(source.randbytes(MIB))


TINY_PER_DIRECTORY = 500


def make_tiny(target: Path, place: Place) -> None:
    """Files of 1–4 KB, five eighths of each random, the rest text: they compress by about a quarter."""
    source = random.Random(f"{SEED} tiny")
    words = text.Rows(source)
    for directory in range(10 if place.quick else 1000):
        folder = target / f"{directory // 100:02}" / f"{directory:04}"
        folder.mkdir(parents=True)
        for number in range(TINY_PER_DIRECTORY):
            (folder / f"{source.getrandbits(40):010x}-{number:03}").write_bytes(changes.tiny_content(source, words))


ALL = [
    Corpus("linux", "a Linux source tree", make_linux, changes.change_tree, True),
    Corpus("usr", "a copy of /usr, at most 3 GB", make_usr, changes.change_tree, True),
    Corpus("image", "a raw ext4 image of a small system, 2.4 GB", make_image, changes.change_image, False),
    Corpus("sql", "SQL and CSV text, 1 GB", make_sql, changes.change_text, False),
    Corpus("random", "random bytes, 1 GB", make_random, changes.change_random, False),
    Corpus("tiny", "500,000 files of 1–4 KB", make_tiny, changes.change_tree, True),
]
BY_NAME = {corpus.name: corpus for corpus in ALL}
