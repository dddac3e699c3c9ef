"""The second version of each corpus: about 2 % realistic changes, made in place.

In place means that whatever is not changed keeps its inode, its times and its content: copying a corpus anew would make
every file new to tools that look at inode numbers and ctime.
"""

import os
import random
from pathlib import Path

from . import text

CHANGED_SHARE = 0.02
BLOCK_BYTES = 4096


def tiny_content(source: random.Random, words: text.Rows) -> bytes:
    length = source.randint(1024, 4096)
    noise = length * 5 // 8
    return source.randbytes(noise) + words.prose(length - noise)


def change_tree(root: Path, source: random.Random) -> str:
    """Of 2 % of the files, 55 % are edited, 15 % grow at their end, 15 % are renamed, 5 % deleted, 10 % are new ones."""
    files = []
    for directory, below, names in os.walk(root):
        below.sort()
        files += [path for name in sorted(names) if not os.path.islink(path := os.path.join(directory, name))]
    chosen = source.sample(files, max(8, round(len(files) * CHANGED_SHARE)))
    words = text.Rows(source)
    counts = dict.fromkeys(("edited", "appended", "renamed", "deleted", "added"), 0)
    for path in chosen:
        kind = source.choices(list(counts), weights=(55, 15, 15, 5, 10))[0]
        counts[kind] += 1
        if kind == "edited":
            _edit(path, source, words)
        elif kind == "appended":
            with open(path, "ab") as file:
                file.write(b"\n" + words.prose(source.randint(40, 4000)))
        elif kind == "renamed":
            os.rename(path, f"{path}.{source.getrandbits(16):04x}")
        elif kind == "deleted":
            os.unlink(path)
        else:
            with open(f"{path}.{source.getrandbits(16):04x}.new", "wb") as file:
                file.write(tiny_content(source, words))
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) + f" of {len(files)} files"


def _edit(path: str, source: random.Random, words: text.Rows) -> None:
    """One to three places are overwritten, or something is inserted there, which shifts what follows."""
    with open(path, "r+b") as file:
        content = bytearray(file.read())
        for _ in range(source.randint(1, 3)):
            at = source.randint(0, len(content))
            new = words.prose(source.randint(4, 400))
            content[at:at + (len(new) if source.random() < 0.5 else 0)] = new
        file.seek(0)
        file.write(content)


def change_image(root: Path, source: random.Random) -> str:
    """902 extents of 1 to 26 blocks, each at a block's border: what a running system writes between two backups."""
    [path] = root.iterdir()
    blocks = path.stat().st_size // BLOCK_BYTES
    # 902 extents of 13.5 blocks on average are 2 % of 2.4 GB.
    extents = max(4, min(902, round(blocks * CHANGED_SHARE / 13.5)))
    words = text.Rows(source)
    written = 0
    with open(path, "r+b") as image:
        for _ in range(extents):
            length = source.randint(1, 26) * BLOCK_BYTES
            noise = length * 5 // 8
            image.seek(source.randrange(blocks - 26) * BLOCK_BYTES)
            written += image.write(source.randbytes(noise) + words.prose(length - noise))
    return f"{extents} extents, {written / 1e6:.0f} MB"


def change_text(root: Path, source: random.Random) -> str:
    """In each file 1 % is inserted at 100 places, so that everything behind shifts, and 1 % is appended."""
    rows = text.Rows(source)
    inserted = 0
    for path in sorted(root.iterdir()):
        piece = rows.csv if path.suffix == ".csv" else rows.sql
        content = path.read_bytes()
        places = sorted(source.randrange(len(content)) for _ in range(100))
        each = len(content) // 100 // len(places)
        with open(path, "r+b") as file:
            done = 0
            for place in places:
                end = content.index(b"\n", place) + 1 if b"\n" in content[place:place + 4096] else place
                file.write(content[done:max(done, end)])
                done = max(done, end)
                inserted += rows.fill(file, each, piece)
            file.write(content[done:])
            inserted += rows.fill(file, len(content) // 100, piece)
    return f"200 inserts and 2 appends, {inserted / 1e6:.1f} MB"


def change_random(root: Path, source: random.Random) -> str:
    """20 ranges are overwritten with other random bytes, at any offset."""
    [path] = root.iterdir()
    total = path.stat().st_size
    length = round(total * CHANGED_SHARE / 20)
    with open(path, "r+b") as file:
        for _ in range(20):
            file.seek(source.randrange(total - length))
            file.write(source.randbytes(length))
    return f"20 ranges, {20 * length / 1e6:.1f} MB"
