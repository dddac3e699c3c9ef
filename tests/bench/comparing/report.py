"""`results.md`: what was measured, on what and on which terms, for people."""

from . import goals
from .ratios import Spread, Table, growth_mb, stored_mb, wall_s
from .results import Results
from .tools import ALL, PHASES
from .tools.base import CHANGED, ONE_FILE, RESTORE

NAMES = [tool.name for tool in ALL]
COLUMNS = ["tool", "wall s", "CPU s client", "CPU s server", "peak MiB client", "peak MiB server", "repository MB", "growth MB",
           "wall ÷ strandline", "flush s"]
# Shorter steps have too few ticks to tell who used the processor.
SHARE_FROM_S = 1
OTHERS_CORES_MAX = 0.3


def markdown(results: Results) -> str:
    table = Table(results)
    parts = ["# Comparison", _conditions(results), _failures(results), _goals(table)]
    parts += [_corpus(results, table, corpus, mode) for corpus, mode in table.measured()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _grid(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _conditions(results: Results) -> str:
    machine = results.machine
    lines = [f"{machine.get('processor')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB, "
             f"{machine.get('file_system')}, kernel {machine.get('kernel')}, autogroup scheduling {'on' if machine.get('autogroup') else 'off'}."]
    if results.quick:
        lines.append("**Small corpora, for testing the bench itself: the figures mean nothing.**")
    lines.append("Agent and server on the same machine; network is loopback. Figures are medians of the rounds [least–most]; "
                 "ratios are taken round by round. *flush*: how long it took, after the command had ended, to make durable what it "
                 "had left in the cache (not part of wall). Sizes are allocated blocks, everything on the storing side. MB are 10⁶ bytes.")
    rows = [[name, results.terms[name]] for name in NAMES if name in results.terms]
    lines.append(_grid(["tool", "terms"], rows))
    lines.append("Versions: " + "; ".join(f"{name}: {said}" for name, said in results.versions.items()) + ".")
    if results.notes:
        lines.append("Not measured:\n\n" + "\n".join(f"* {subject}: {reason}" for subject, reason in results.notes.items()))
    long = [row for row in results.rows if "others_cpu_s" in row and row["wall_s"] >= SHARE_FROM_S]
    if others := Spread.of(row["others_cpu_s"] / row["wall_s"] for row in long):
        lines.append(f"While steps ran (of {SHARE_FROM_S} s and more), the rest of the machine used {others.median:.2f} cores "
                     f"(median), at most {others.most:.2f}. The kernel's writing needs some; far more than {OTHERS_CORES_MAX} means "
                     "neighbours, and figures that should not be trusted.")
    return "\n\n".join(lines)


def _failures(results: Results) -> str:
    failed = [row for row in results.rows if row.get("failure")]
    if not failed:
        return "Every restored tree was compared with its corpus; all were equal." if results.rows else ""
    rows = [[row["tool"], row["corpus"], row["mode"], row["phase"], str(row["round"]), row["failure"].replace("|", "/")]
            for row in failed]
    return "## Failures\n\n" + _grid(["tool", "corpus", "mode", "phase", "round", "what"], rows)


def _goals(table: Table) -> str:
    rows = [[verdict.goal, verdict.corpus, verdict.mode, verdict.measured, verdict.limit,
             {True: "holds", False: "**missed**", None: "–"}[verdict.holds]] for verdict in goals.verdicts(table)]
    about = "Strandline divided by the best of the others in the same round, judged as printed: with two decimals."
    return f"## Goals\n\n{about}\n\n" + _grid(["goal", "corpus", "mode", "measured", "goal is", ""], rows)


def _corpus(results: Results, table: Table, corpus: str, mode: str) -> str:
    about = results.corpora[corpus]
    parts = [f"## {corpus}, {mode}\n\n{about['title']}: {about['files']:,} files, {about['bytes'] / 1e6:,.0f} MB."]
    for phase in PHASES:
        rows = [row for tool in NAMES if (row := _tool(table, corpus, mode, phase, tool))]
        if rows:
            title = {CHANGED: "2 % changed", RESTORE: "full restore", ONE_FILE: "restore of one file"}.get(phase, phase)
            parts.append(f"### {corpus}, {mode}: {title}\n\n" + _grid(COLUMNS, rows))
    return "\n\n".join(parts)


def _tool(table: Table, corpus: str, mode: str, phase: str, tool: str) -> list[str] | None:
    def of(measure) -> Spread | None:
        return table.spread(corpus, mode, phase, tool, measure)

    def field(name: str, digits: int) -> str:
        spread = of(lambda row: row.get(name))
        return "–" if spread is None else f"{spread.median:.{digits}f}"

    def number(spread: Spread | None, digits: int) -> str:
        return "–" if spread is None else f"{spread.median:.{digits}f}"

    wall = of(wall_s)
    if wall is None:
        return None
    ratio = table.ratio(corpus, mode, phase, tool, [goals.OURS], wall_s)
    return [tool, goals.spread_text(wall), field("client_cpu_s", 2), field("server_cpu_s", 2), field("client_peak_mib", 0),
            field("server_peak_mib", 0), number(of(stored_mb), 1), number(of(growth_mb), 1),
            "–" if ratio is None else goals.spread_text(ratio), field("flush_s", 2)]
