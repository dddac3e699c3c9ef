"""Text as databases write it: seeded, with the redundancy of real tables (zstd 3 makes a third of it)."""

import random
from collections.abc import Callable
from typing import BinaryIO

SYLLABLES = "ka lo mi ren sta tor ve dan bel cor fin gra hol jun nor pel qui ras sol tum ulm vor wen yar zet".split()
STATES = ["new", "paid", "packed", "sent", "returned", "closed"]
ROWS_PER_STATEMENT = 50


class Rows:
    """An endless source of rows with rising keys and times."""

    def __init__(self, source: random.Random):
        self.source = source
        self.words = ["".join(source.choices(SYLLABLES, k=source.randint(1, 3))) for _ in range(4000)]
        self.key = 0
        self.time_s = 1_600_000_000

    def _row(self) -> tuple:
        source = self.source
        self.key += 1
        self.time_s += source.getrandbits(5)
        first, second = source.choices(self.words, k=2)
        note = " ".join(source.choices(self.words, k=4 + source.getrandbits(3)))
        bits = source.getrandbits(64)
        return (self.key, self.time_s, first, second, STATES[bits % 6], bits >> 40, (bits >> 8) & 0xFFFF_FFFF, note)

    def sql(self) -> bytes:
        """One INSERT statement of many rows."""
        rows = ",\n".join(
            f"({key},{time},'{first} {second}','{first}.{second}@example.org','{state}',{amount / 100:.2f},'{token:08x}','{note}')"
            for key, time, first, second, state, amount, token, note in (self._row() for _ in range(ROWS_PER_STATEMENT))
        )
        return f"INSERT INTO orders (id,placed,name,mail,state,amount,token,note) VALUES\n{rows};\n".encode()

    def csv(self) -> bytes:
        return "".join(
            f"{key};{time};{state};{first};{amount};{token:08x};{second}\n"
            for key, time, first, second, state, amount, token, _ in (self._row() for _ in range(ROWS_PER_STATEMENT))
        ).encode()

    def prose(self, length: int) -> bytes:
        """So many bytes of words."""
        return " ".join(self.source.choices(self.words, k=length // 4 + 1)).encode()[:length]

    def fill(self, file: BinaryIO, length: int, piece: Callable[[], bytes]) -> int:
        """Writes at least so many bytes in whole pieces; how many."""
        written = 0
        while written < length:
            written += file.write(piece())
        return written
