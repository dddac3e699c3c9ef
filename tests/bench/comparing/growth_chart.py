"""`growth.md` and `growth.svg`: time and memory over the number of files and over gigabytes, both axes logarithmic."""

import math

from .tools.base import FIRST, RESTORE, UNCHANGED

COLOURS = {FIRST: "#1b6ca8", UNCHANGED: "#66a182", RESTORE: "#d1495b"}
# What is drawn: title, and the figure of a row.
PANELS = [("seconds", lambda row: row["wall_s"]), ("agent, peak MiB", lambda row: row["client_peak_mib"]),
          ("server, peak MiB", lambda row: row["server_peak_mib"])]
# Pixels.
WIDTH, HEIGHT, LEFT, TOP, BETWEEN = 210, 150, 46, 56, 66


def markdown(rows: list[dict]) -> str:
    lines = ["| | step | wall s | CPU s, agent + server | peak MiB, agent / server | repository MB |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['size']:,} {row['of']} | {row['phase']} | {row['wall_s']:.1f} | "
                     f"{row['client_cpu_s'] + row['server_cpu_s']:.1f} | "
                     f"{row['client_peak_mib']:.0f} / {row['server_peak_mib']:.0f} | {row['repository_bytes'] / 1e6:,.0f} |")
    return "\n".join(lines) + "\n"


def svg(rows: list[dict]) -> str:
    parts = []
    for line, of in enumerate(sorted({row["of"] for row in rows}, reverse=True)):
        for column, (title, figure) in enumerate(PANELS):
            x, y = LEFT + column * (WIDTH + BETWEEN), TOP + line * (HEIGHT + BETWEEN)
            parts.append(_panel([row for row in rows if row["of"] == of], of, title, figure, x, y))
    for number, (phase, colour) in enumerate(COLOURS.items()):
        parts.append(f'<rect x="{LEFT + number * 90}" y="24" width="9" height="9" fill="{colour}"/>'
                     f'<text x="{LEFT + 13 + number * 90}" y="32">{phase}</text>')
    width, height = LEFT + len(PANELS) * (WIDTH + BETWEEN), TOP + 2 * (HEIGHT + BETWEEN)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            f'font-family="sans-serif" font-size="10" fill="#222">\n<rect width="{width}" height="{height}" fill="#fff"/>\n'
            f'<text x="{LEFT}" y="16" font-size="13" font-weight="bold">Cost of a backup over the network as it grows</text>\n'
            + "\n".join(parts) + "\n</svg>\n")


def _panel(rows: list[dict], of: str, title: str, figure, left: float, top: float) -> str:
    sizes = [row["size"] for row in rows]
    figures = [max(figure(row), 0.01) for row in rows]
    across, up = _axis(min(sizes), max(sizes)), _axis(min(figures), max(figures))

    def x(value: float) -> float:
        return left + WIDTH * (math.log10(value) - across[0]) / (across[-1] - across[0])

    def y(value: float) -> float:
        return top + HEIGHT - HEIGHT * (math.log10(value) - up[0]) / (up[-1] - up[0])

    parts = [f'<text x="{left}" y="{top - 6}" font-weight="bold">{title}</text>',
             f'<text x="{left + WIDTH}" y="{top + HEIGHT + 28}" text-anchor="end" fill="#666">{of}</text>']
    for power in across:
        parts.append(f'<path d="M{x(10**power):.1f} {top}v{HEIGHT}" stroke="#ddd"/>'
                     f'<text x="{x(10**power):.1f}" y="{top + HEIGHT + 13}" text-anchor="middle">{10**power:,}</text>')
    for power in up:
        parts.append(f'<path d="M{left} {y(10**power):.1f}h{WIDTH}" stroke="#ddd"/>'
                     f'<text x="{left - 4}" y="{y(10**power) + 3:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for phase, colour in COLOURS.items():
        points = [(x(row["size"]), y(max(figure(row), 0.01))) for row in rows if row["phase"] == phase]
        if points:
            line = " ".join(f"{across:.1f},{up:.1f}" for across, up in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            parts += [f'<circle cx="{across:.1f}" cy="{up:.1f}" r="2.5" fill="{colour}"/>' for across, up in points]
    return "\n".join(parts)


def _axis(least: float, most: float) -> list[int]:
    """Powers of ten around all values."""
    first = math.floor(math.log10(least))
    last = max(math.ceil(math.log10(most)), first + 1)
    return list(range(first, last + 1))
