"""Figures of two sides as a table, and against their targets; progress while they are taken."""

from __future__ import annotations

import math
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

NOTHING = "-"
Samples = Sequence[float]


@dataclass(slots=True)
class Line:
    """One line of the table: what two sides took for the same, round by round."""

    what: str
    unit: str
    anchor: str = ""  # who that is; empty: there is none
    theirs: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    limit: float = 0.0  # what was waited for no longer than that; such a sample is infinity
    remark: str = ""  # stands in the place of their figure, where there cannot be one
    own_remark: str = ""  # of ours

    def ratio(self) -> float | None:
        """Ours / the anchor's: the median of the rounds' ratios, as a round's two figures are
        taken one after the other and share what else the machine does. None if a round has no
        ratio: what takes longer than the limit, or nothing at all."""
        pairs = list(zip(self.ours, self.theirs, strict=False))
        if not pairs or any(math.isinf(a) or math.isinf(b) or not b for a, b in pairs):
            return None
        return statistics.median(a / b for a, b in pairs)

    def median(self) -> float | None:
        """Of ours."""
        return statistics.median(self.ours) if self.ours else None


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure is held against; only said, never enforced."""

    line: Line
    limit: float
    of_ratio: bool
    at_least: bool = False

    def render(self) -> list[str]:
        """Cells: what, figure, target, whether it is met."""
        found = self.line.ratio() if self.of_ratio else self.line.median()
        unit = f" x {self.line.anchor}" if self.of_ratio else f" {self.line.unit}"
        target = f"{self.limit:g}{unit} or {'more' if self.at_least else 'less'}"
        if found is None:
            return [self.line.what, self.line.own_remark or "not measured", target, ""]
        met = found >= self.limit if self.at_least else found <= self.limit
        figure = f"{found:.3f}" if self.of_ratio else _number(found, self.line.limit)
        return [self.line.what, f"{figure}{unit}", target, "met" if met else "missed"]


def render(lines: Sequence[Line], targets: Sequence[Target]) -> str:
    """The table, and below it a line for each target."""
    head = ["", "unit", "anchor", "anchor's", "(range)", "ours", "(range)", "ours/anchor's", "n"]
    rows = []
    for line in lines:
        ratio = line.ratio()
        counts = dict.fromkeys(len(s) for s in (line.theirs, line.ours) if s)
        rows.append(
            [
                line.what,
                line.unit,
                line.anchor or NOTHING,
                *_cells(line.theirs, line.limit, line.remark),
                *_cells(line.ours, line.limit, line.own_remark),
                NOTHING if ratio is None else f"{ratio:.2f}",
                "/".join(map(str, counts)) or NOTHING,
            ]
        )
    checks = [target.render() for target in targets]
    return "\n".join(
        [
            "Medians, least and most; ours/anchor's is the median of the rounds' ratios.",
            "",
            *_align([head, *rows], left={0, 1, 2}),
            "",
            *_align([["target", "is", "should be", ""], *checks], left={0, 3}),
        ]
    )


def _cells(samples: Samples, limit: float, remark: str) -> list[str]:
    if not samples:
        return [remark or NOTHING, ""]
    least, most = _number(min(samples), limit), _number(max(samples), limit)
    return [_number(statistics.median(samples), limit), f"({least} to {most})"]


def _number(value: float, limit: float = 0.0) -> str:
    """About three significant digits, without an exponent; infinity is more than `limit`."""
    if math.isinf(value):
        return f"> {limit:g}"
    if value == int(value):
        return f"{value:.0f}"
    for least, digits in ((100, 0), (10, 1), (1, 2)):
        if value >= least:
            return f"{value:.{digits}f}"
    return f"{value:.3f}"


def _align(rows: Sequence[Sequence[str]], left: set[int]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


class Progress:
    """What is being done, on a terminal's last line; nothing in a pipe."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        """Say it in the place of what was said before."""
        if self._on:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\033[K{text[:width]}")
            sys.stderr.flush()

    def clear(self) -> None:
        """Leave the line empty."""
        self("")
