"""Questions that the report, the goals and the chart ask of the results. Ratios are taken round by round: what slowed a
whole round down cancels out."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .corpora import BY_NAME
from .results import Results
from .tools.base import CHANGED, FIRST, UNCHANGED

MB = 1_000_000
# What a row says, as one number; None if it has none.
Measure = Callable[[dict], float | None]


def wall_s(row: dict) -> float | None:
    return row.get("wall_s")


def cpu_s(row: dict) -> float | None:
    """Of both sides."""
    client = row.get("client_cpu_s")
    return None if client is None else client + (row.get("server_cpu_s") or 0)


def stored_mb(row: dict) -> float | None:
    size = row.get("repository_bytes")
    return size / MB if size else None


def growth_mb(row: dict) -> float | None:
    return row.get("growth_mb")


@dataclass(frozen=True)
class Spread:
    """Median, least and most of the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread | None":
        known = [value for value in values if value is not None]
        return cls(statistics.median(known), min(known), max(known)) if known else None


class Table:
    """Rows by corpus, mode, phase, tool and round. Rows that failed count for nothing."""

    def __init__(self, results: Results):
        self.results = results
        self.rows: dict[tuple, dict] = {}
        for row in results.rows:
            if not row.get("failure"):
                self.rows[row["corpus"], row["mode"], row["phase"], row["tool"], row["round"]] = dict(row)
        for (corpus, mode, phase, tool, number), row in self.rows.items():
            before = self.rows.get((corpus, mode, {UNCHANGED: FIRST, CHANGED: UNCHANGED}.get(phase), tool, number))
            if before and row.get("repository_bytes"):
                row["growth_mb"] = (row["repository_bytes"] - before["repository_bytes"]) / MB

    def rounds(self, corpus: str, mode: str, phase: str, tool: str) -> dict[int, dict]:
        return {key[4]: row for key, row in self.rows.items() if key[:4] == (corpus, mode, phase, tool)}

    def spread(self, corpus: str, mode: str, phase: str, tool: str, measure: Measure) -> Spread | None:
        return Spread.of(measure(row) for row in self.rounds(corpus, mode, phase, tool).values())

    def ratio(self, corpus: str, mode: str, phase: str, above: str, below: Iterable[str], measure: Measure,
              below_phase: str | None = None) -> Spread | None:
        """`above` divided by the least of `below` in the same round."""
        others = [self.rounds(corpus, mode, below_phase or phase, tool) for tool in below]
        found = []
        for number, row in self.rounds(corpus, mode, phase, above).items():
            values = [measure(other[number]) for other in others if number in other]
            values = [value for value in values if value]
            value = measure(row)
            if values and value is not None:
                found.append(value / min(values))
        return Spread.of(found)

    def measured(self) -> list[tuple[str, str]]:
        """Corpora and modes that there are, in the order in which corpora are listed."""
        found = {(row["corpus"], row["mode"]) for row in self.results.rows}
        return sorted(found, key=lambda pair: (list(BY_NAME).index(pair[0]), pair[1]))
