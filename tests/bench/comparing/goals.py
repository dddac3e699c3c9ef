"""The goals of the project, each held against the results. One line of `GOALS` is one goal."""

from collections.abc import Iterable
from dataclasses import dataclass

from .ratios import Measure, Spread, Table, cpu_s, growth_mb, stored_mb, wall_s
from .tools import PEERS
from .tools.base import CHANGED, FIRST, RESTORE, UNCHANGED

OURS = "strandline"
TREES = ("linux", "usr")
LARGE = ("image", "sql", "random")
EVERY = ("linux", "usr", "image", "sql", "random", "tiny")
AGENT_PEAK_MIB = 100
SERVER_PEAK_MIB = 64
SERVER_PEAK_PER_STREAM_MIB = 5
STREAMS = 4


@dataclass(frozen=True)
class Goal:
    """The median of ours divided by the best of `others` must not be above `most`."""

    title: str
    corpora: Iterable[str]
    phase: str
    others: Iterable[str]
    measure: Measure
    most: float
    # Some limits only bound a network run.
    modes: Iterable[str] = ("network", "local")
    strictly: bool = False


GOALS = [
    Goal("first backup against the tar pipeline", TREES, FIRST, ["tar"], wall_s, 0.75, ["network"]),
    Goal("first backup at least 2 times as fast as the fastest peer", TREES, FIRST, PEERS, wall_s, 1 / 2, ["network"]),
    Goal("CPU of both sides of a first backup against the tar pipeline", EVERY, FIRST, ["tar"], cpu_s, 1.0, ["network"]),
    Goal("stored against tar.zst", EVERY, FIRST, ["tar"], stored_mb, 1.0),
    Goal("stored less than the smallest peer", EVERY, FIRST, PEERS, stored_mb, 1.0, strictly=True),
    Goal("growth by a 2 % change of a tree against the smallest peer", (*TREES, "tiny"), CHANGED, PEERS, growth_mb, 0.7),
    Goal("unchanged against the fastest peer", EVERY, UNCHANGED, PEERS, wall_s, 1.0),
    Goal("unchanged against the parallel walk", (*TREES, "tiny"), UNCHANGED, ["walk"], wall_s, 1.5),
    Goal("2 % changed against the fastest peer", EVERY, CHANGED, PEERS, wall_s, 0.5),
    Goal("large files: first backup at least 1.5 times as fast as the fastest peer", LARGE, FIRST, PEERS, wall_s, 1 / 1.5),
    Goal("large files: first backup against the tar pipeline", LARGE, FIRST, ["tar"], wall_s, 1.1, ["network"]),
    Goal("random: at least 60 % of the TLS loopback limit", ["random"], FIRST, ["tls"], wall_s, 1 / 0.6, ["network"]),
    Goal("image changed: growth against the smallest peer", ["image"], CHANGED, PEERS, growth_mb, 0.2),
    Goal("tiny: first backup against the tar pipeline", ["tiny"], FIRST, ["tar"], wall_s, 1.0, ["network"]),
    Goal("tiny: unchanged at least 1.5 times as fast as the fastest peer", ["tiny"], UNCHANGED, PEERS, wall_s, 1 / 1.5),
    Goal("full restore against the fastest peer", EVERY, RESTORE, PEERS, wall_s, 0.6),
    Goal("full restore against cp -a", EVERY, RESTORE, ["cp"], wall_s, 1.0),
]


@dataclass(frozen=True)
class Verdict:
    goal: str
    corpus: str
    mode: str
    measured: str
    limit: str
    # None: not measured.
    holds: bool | None


def verdicts(table: Table) -> list[Verdict]:
    found = []
    for goal in GOALS:
        for corpus, mode in table.measured():
            if corpus in goal.corpora and mode in goal.modes:
                found.append(_judge(table, goal, corpus, mode))
    for corpus, mode in table.measured():
        found.append(_peak(table, corpus, mode, "peak memory of the agent", "client_peak_mib", AGENT_PEAK_MIB))
        if mode == "network":
            most = SERVER_PEAK_MIB + STREAMS * SERVER_PEAK_PER_STREAM_MIB
            title = f"peak memory of the server, {STREAMS} streams"
            found.append(_peak(table, corpus, mode, title, "server_peak_mib", most))
    return found


def _judge(table: Table, goal: Goal, corpus: str, mode: str) -> Verdict:
    ratio = table.ratio(corpus, mode, goal.phase, OURS, goal.others, goal.measure)
    if ratio is None:
        return Verdict(goal.title, corpus, mode, "not measured", f"≤ {goal.most:.2f}", None)
    # As printed: a thousandth is neither won nor lost.
    median, most = round(ratio.median, 2), round(goal.most, 2)
    holds = median < most if goal.strictly else median <= most
    return Verdict(goal.title, corpus, mode, spread_text(ratio), f"{'<' if goal.strictly else '≤'} {goal.most:.2f}", holds)


def _peak(table: Table, corpus: str, mode: str, title: str, field: str, most_mib: float) -> Verdict:
    """Of all phases and rounds."""
    peaks = [row.get(field) for key, row in table.rows.items() if key[:2] == (corpus, mode) and key[3] == OURS]
    spread = Spread.of(peaks)
    if spread is None:
        return Verdict(title, corpus, mode, "not measured", f"≤ {most_mib} MiB", None)
    return Verdict(title, corpus, mode, f"{spread.most:.0f} MiB", f"≤ {most_mib} MiB", spread.most <= most_mib)


def spread_text(spread: Spread) -> str:
    if spread.least == spread.most:
        return f"{spread.median:.2f}"
    return f"{spread.median:.2f} [{spread.least:.2f}–{spread.most:.2f}]"
