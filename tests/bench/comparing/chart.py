"""`chart.svg`: for every corpus and phase, how long each tool takes compared with Strandline. Shorter is better."""

from html import escape

from . import goals
from .ratios import Table, wall_s
from .results import Results
from .tools import ALL, LIMITS, PHASES

COLOURS = {"strandline": "#1b6ca8", "restic": "#d1495b", "borg": "#66a182", "rustic": "#edae49", "bupstash": "#8d6a9f",
           "tar": "#8d99ae"} | dict.fromkeys(LIMITS, "#c9d0da")
NAMES = [tool.name for tool in ALL]
# Pixels.
BAR, GAP, LABELS, CELL, TITLE, HEAD = 9, 2, 74, 168, 22, 58
# Longer bars are cut, their figure tells.
RATIO_MAX = 8.0
SCALE = (CELL - 44) / RATIO_MAX


def svg(results: Results) -> str:
    table = Table(results)
    parts: list[str] = []
    y = HEAD
    for corpus, mode in table.measured():
        drawn, height = _row(table, corpus, mode, y)
        parts.append(drawn)
        y += height + 14
    width = LABELS + CELL * len(PHASES) + 10
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}" '
            f'font-family="sans-serif" font-size="10" fill="#222">\n'
            f'<rect width="{width}" height="{y}" fill="#fff"/>\n'
            f'<text x="8" y="18" font-size="13" font-weight="bold">Time compared with Strandline (= 1, the line)</text>\n'
            + _legend() + "\n".join(parts) + "\n</svg>\n")


def _legend() -> str:
    parts = []
    labels = {tool: tool for tool in NAMES if tool not in LIMITS} | {LIMITS[0]: "limits: " + ", ".join(LIMITS)}
    for number, (tool, label) in enumerate(labels.items()):
        x = 8 + number * 86
        parts.append(f'<rect x="{x}" y="30" width="9" height="9" fill="{COLOURS[tool]}"/><text x="{x + 13}" y="38">{label}</text>')
    return "\n".join(parts) + "\n"


def _row(table: Table, corpus: str, mode: str, top: int) -> tuple[str, int]:
    """One corpus in one mode: a cell for each phase; and its height."""
    parts = [f'<text x="8" y="{top + TITLE + 8}" font-weight="bold">{escape(corpus)}</text>',
             f'<text x="8" y="{top + TITLE + 21}" fill="#666">{escape(mode)}</text>']
    height = 40
    for column, phase in enumerate(PHASES):
        x = LABELS + column * CELL
        y = top + TITLE
        ours = table.spread(corpus, mode, phase, goals.OURS, wall_s)
        if ours:
            parts.append(f'<text x="{x}" y="{y - 6}" fill="#444">{phase} ({ours.median:.2f} s)</text>')
        for tool in NAMES:
            ratio = table.ratio(corpus, mode, phase, tool, [goals.OURS], wall_s)
            if ratio is None:
                continue
            length = max(1.0, min(ratio.median, RATIO_MAX) * SCALE)
            parts.append(f'<rect x="{x}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{COLOURS[tool]}">'
                         f"<title>{tool}: {goals.spread_text(ratio)}</title></rect>"
                         f'<text x="{x + length + 3:.1f}" y="{y + BAR - 1}" font-size="8">{ratio.median:.2f}</text>')
            y += BAR + GAP
        if ours:
            parts.append(f'<path d="M{x + SCALE:.1f} {top + TITLE - 2}V{y}" stroke="#222" stroke-width="0.6" '
                         'stroke-dasharray="2 2"/>')
        height = max(height, y - top)
    return "\n".join(parts), height
