"""Convergence against the size of a cluster, as an SVG written by hand.

`python -m tests.sim --plot docs/convergence.svg` runs the whole core at each of SIZES and writes
the picture; what it prints is the table of docs/scale.md. The picture has no background and takes
its colours from what the reader prefers, light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from xml.sax.saxutils import escape

from tests.sim.large.run import Options
from tests.sim.large.whole import WholeFigures, WholeRun

SIZES = (10, 30, 100, 300, 1000)
NAMES = ("50 %", "99 %", "all")  # of the nodes, as WholeFigures.known has them

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 92, 70, 60, 56  # px around the axes
LEAST, MOST = 0.0005, 3.0  # s, of the upright axis
TICKS = ((0.001, "1 ms"), (0.01, "10 ms"), (0.1, "100 ms"), (1.0, "1 s"))
APART = 15  # px between two labels

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.title { font-size: 15px; font-weight: 600 }
.small { font-size: 12px; fill: #57606a }
.grid { stroke: #d0d7de; stroke-width: 1 }
.axis { stroke: #57606a; stroke-width: 1 }
.line { fill: none; stroke-width: 2.2 }
.worst { fill: none; stroke-width: 1.4; stroke-dasharray: 3 4 }
.c0 { stroke: #1a7f37 } .c1 { stroke: #0969da } .c2 { stroke: #bc4c00 }
.d0 { fill: #1a7f37 } .d1 { fill: #0969da } .d2 { fill: #bc4c00 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .small { fill: #9198a1 }
  .grid { stroke: #3d444d }
  .axis { stroke: #9198a1 }
  .c0 { stroke: #3fb950 } .c1 { stroke: #58a6ff } .c2 { stroke: #f0883e }
  .d0 { fill: #3fb950 } .d1 { fill: #58a6ff } .d2 { fill: #f0883e }
}
"""


@dataclass(frozen=True)
class Point:
    """One cluster. Times in s, of NAMES each: of the median write, and of the worst."""

    nodes: int
    median: tuple[float, ...]
    worst: tuple[float, ...]


def point_of(nodes: int, figures: WholeFigures) -> Point:
    """What is drawn of a run."""
    columns = list(zip(*figures.known, strict=True))
    return Point(nodes, tuple(map(median, columns)), tuple(map(max, columns)))


def row_of(point: Point, figures: WholeFigures) -> str:
    """The same for people, a row of a table in Markdown."""
    known = " | ".join(
        f"{1000 * m:.0f} ({1000 * w:.0f})" for m, w in zip(point.median, point.worst, strict=True)
    )
    quiet, busy = figures.quiet, figures.busy
    return (
        f"| {point.nodes:,} | {known} | {max(figures.detected):.2f} "
        f"| {figures.streams[0]:.1f}, {figures.streams[1]} "
        f"| {quiet.messages:.0f}, {quiet.bytes / 1000:.1f} "
        f"| {busy.messages:.0f}, {busy.bytes / 1000:.1f} "
        f"| {figures.alone / 1e6:.1f} |"
    )


def draw(points: Sequence[Point], what: str) -> str:
    """The picture; `what` tells below its title what was run."""
    shapes = [
        f'<text class="title" x="{LEFT}" y="24">Until a new endpoint is known</text>',
        f'<text class="small" x="{LEFT}" y="44">{escape(what)}</text>',
    ]
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for seconds, text in TICKS:
        y = _y(seconds)
        shapes.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for point in points:
        x = _x(point.nodes, points)
        shapes.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>'
            f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{point.nodes:,}</text>'
        )
    shapes.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    shapes.append(
        f'<text class="small" x="{(LEFT + right) / 2}" y="{HEIGHT - 12}" text-anchor="middle">'
        "nodes</text>"
        f'<text class="small" transform="translate(18 {(TOP + bottom) / 2}) rotate(-90)" '
        'text-anchor="middle">time since it was made</text>'
    )
    for number in range(len(NAMES)):
        for kind, times in (
            ("worst", [point.worst[number] for point in points]),
            ("line", [point.median[number] for point in points]),
        ):
            places = [
                f"{_x(point.nodes, points):.1f},{_y(seconds):.1f}"
                for point, seconds in zip(points, times, strict=True)
            ]
            shapes.append(f'<polyline class="{kind} c{number}" points="{" ".join(places)}"/>')
            if kind == "line":
                shapes += [
                    f'<circle class="d{number}" r="3" cx="{place.split(",")[0]}" '
                    f'cy="{place.split(",")[1]}"/>'
                    for place in places
                ]
    ends = [_y(points[-1].median[number]) for number in range(len(NAMES))]
    for number, y in zip(range(len(NAMES)), _spread_out(ends), strict=True):
        shapes.append(
            f'<text class="d{number}" x="{right + 8}" y="{y + 4:.1f}">{NAMES[number]}</text>'
        )
    shapes.append(
        f'<line class="worst axis" x1="{right - 214}" x2="{right - 186}" y1="20" y2="20"/>'
        f'<text class="small" x="{right - 180}" y="24">worst of the writes</text>'
        f'<line class="line axis" x1="{right - 36}" x2="{right - 8}" y1="20" y2="20"/>'
        f'<text class="small" x="{right - 2}" y="24">median</text>'
    )
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="Time until 50, 99 and 100 percent of the nodes know a new endpoint">\n'
        f"<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def _x(nodes: int, points: Sequence[Point]) -> float:
    low, high = math.log(points[0].nodes), math.log(points[-1].nodes)
    return LEFT + 20 + (math.log(nodes) - low) / (high - low) * (WIDTH - LEFT - RIGHT - 40)


def _y(seconds: float) -> float:
    low, high = math.log(LEAST), math.log(MOST)
    part = (math.log(min(max(seconds, LEAST), MOST)) - low) / (high - low)
    return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)


def _spread_out(ys: Sequence[float]) -> list[float]:
    """The same heights, the first lowest, moved up where two labels would touch."""
    found: list[float] = []
    for y in ys:
        found.append(min(y, found[-1] - APART) if found else y)
    return found


def main(path: Path, options: Options, sizes: Sequence[int] = SIZES) -> None:
    """Run each size, print its row, and write the picture."""
    points = []
    for nodes in sizes:
        run = WholeRun(replace(options, nodes=nodes))
        figures = run.play()
        points.append(point_of(nodes, figures))
        print(row_of(points[-1], figures), flush=True)
    what = (
        f"{options.endpoints} endpoints a node, {options.loss:.0%} of packets lost, "
        f"{options.writes} writes, seed {options.seed}; simulated"
    )
    path.write_text(draw(points, what))
