"""What every command shares: how answers, errors and progress are shown, and the common options.

Opposite stand the noun modules, which say what to show, and main.py, which catches the errors.
Imported by every command, so nothing heavy here: rich and yaml only where they draw.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import click

from agent.errors import VxmeshError

FORMATS = ("table", "json", "yaml")
WAIT_DEFAULT = 30.0  # seconds that a bare --wait waits
PROGRESS_DELAY = 1.0  # seconds; what is done sooner is not worth a line
GAP = "   "

# Words that the fields of INTERFACE.md use for how something is, and how they look.
_COLOURED_COLUMNS = {"STATE", "HEALTH", "AGENT", "LINK"}
_COLOURS = {
    **dict.fromkeys(("alive", "running", "healthy", "active", "up"), "green"),
    **dict.fromkeys(("suspect", "draining", "lossy"), "yellow"),
    **dict.fromkeys(("unreachable", "stopped", "unhealthy", "left", "cut", "failed"), "red"),
}

F = TypeVar("F", bound=Callable[..., Any])
Row = Mapping[str, Any]


# Options. What the root was given holds for the leaf too, unless that has its own.


def _remember(name: str, default: str) -> Callable[[click.Context, click.Parameter, Any], str]:
    def callback(context: click.Context, _: click.Parameter, value: str | None) -> str:
        chosen: dict[str, str] = context.ensure_object(dict)
        if value is not None:
            chosen[name] = value
        return chosen.get(name, default)

    return callback


def output_option(command: F) -> F:
    """-o/--output; the command receives `output`: table, json or yaml."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(FORMATS),
        is_eager=True,  # so that errors in the other arguments are shown in this form
        callback=_remember("output", "table"),
        help="form of the answer [table]",
    )(command)


def host_option(command: F) -> F:
    """--host and --tls; the command receives `host`, empty where the client's default holds.

    What --tls was given calls.py takes from the context: it says nothing without --host.
    """
    command = click.option(
        "--tls",
        metavar="FILE",
        expose_value=False,
        callback=_remember("tls", ""),
        help="key and certificate of 'cluster user', for a tcp:// host [VXMESH_TLS]",
    )(command)
    return click.option(
        "--host",
        metavar="TARGET",
        callback=_remember("host", ""),
        help="the agent: unix:///PATH or tcp://HOST:PORT "
        "[VXMESH_HOST, unix:///run/vxmesh/agent.sock]",
    )(command)


def _seconds(text: str | float) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise click.BadParameter(f"{text!r} is not a number of seconds.")
    return seconds


class _WaitOption(click.Option):
    """--wait or --wait=SECONDS, as GNU programs have optional values.

    click's own optional values would swallow the next argument (`--wait web`): here a bare
    --wait is matched before click looks for a value.
    """

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        match = parser._match_long_opt

        def match_wait(opt: str, explicit_value: str | None, state: Any) -> None:
            if opt == "--wait" and explicit_value is None:
                explicit_value = str(WAIT_DEFAULT)
            match(opt, explicit_value, state)

        parser._match_long_opt = match_wait


def wait_option(command: F) -> F:
    """--wait[=SECONDS]; the command receives `wait` in seconds, 0 when not asked to wait."""
    return click.option(
        "--wait",
        cls=_WaitOption,
        type=_seconds,
        default=0.0,
        metavar="[=SECONDS]",
        help=f"until every live node that takes part has it [{WAIT_DEFAULT:.0f}]",
    )(command)


# Answers.


def emit_list(rows: Sequence[Row], columns: Sequence[tuple[str, Any]], output: str) -> None:
    """Print rows: a table of `columns`, or one array with every field.

    A column is a title and a field's name or a function from the row to what the cell shows.
    """
    if output != "table":
        _emit_document([dict(row) for row in rows], output)
        return
    titles = [title for title, _ in columns]
    cells = [[_text(key(row) if callable(key) else row[key]) for _, key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    paint = has_colour(sys.stdout)
    _print_line([_style(t, bold=True) if paint else t for t in titles], titles, widths)
    for row in cells:
        shown = [_paint(t, c) if paint else c for t, c in zip(titles, row, strict=True)]
        _print_line(shown, row, widths)


def emit_object(fields: Row, output: str) -> None:
    """Print one object: a line a field, or one document."""
    if output != "table":
        _emit_document(dict(fields), output)
        return
    paint = has_colour(sys.stdout)
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        title = _style(name, bold=True) if paint else name
        lines = _lines(value)
        shown = _paint(name.upper(), lines[0]) if paint else lines[0]
        click.echo(f"{title}{' ' * (width - len(name))}{GAP}{shown}")
        for line in lines[1:]:
            click.echo(f"{' ' * width}{GAP}{line}")


def emit_done(text: str, fields: Row, output: str) -> None:
    """Print what a changing command has to say: `text` (nothing if empty), or the object."""
    if output != "table":
        _emit_document(dict(fields), output)
    elif text:
        click.echo(text)


def _emit_document(value: Any, output: str) -> None:
    if output == "yaml":
        import yaml

        click.echo(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), nl=False)
    else:
        click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _text(value: Any) -> str:
    """One cell. Never empty, so that columns can be counted, and without control characters,
    which a label from elsewhere could use to write over the terminal."""
    if isinstance(value, bool):
        text = "yes" if value else "no"
    elif value is None:
        text = ""
    elif isinstance(value, Mapping):
        text = ", ".join(f"{key}={_text(v)}" for key, v in value.items())
    elif isinstance(value, (list, tuple)):
        text = ", ".join(map(_text, value))
    else:
        text = str(value)
    return clean(text) or "-"


def clean(text: str) -> str:
    """Text from elsewhere, fit for a terminal: without control characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _lines(value: Any) -> list[str]:
    """An object's field: a list of objects gets a line each."""
    if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        return [_text(item) for item in value]
    return [_text(value)]


def _print_line(shown: Sequence[str], plain: Sequence[str], widths: Sequence[int]) -> None:
    padded = [s + " " * (w - len(p)) for s, p, w in zip(shown, plain, widths, strict=True)]
    click.echo(GAP.join([*padded[:-1], shown[-1]]), color=True)


def has_colour(stream: Any) -> bool:
    """Whether `stream` is a terminal that wants colour; see no-color.org."""
    return (
        stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") != "dumb"
    )


def _style(text: str, **look: Any) -> str:
    return click.style(text, **look)


def _paint(title: str, text: str) -> str:
    colour = _COLOURS.get(text.split(" ")[0]) if title in _COLOURED_COLUMNS else None
    return _style(text, fg=colour) if colour else text


# Errors.


def report(error: VxmeshError, output: str) -> None:
    """Say on stderr what went wrong: one line, or with json one object."""
    if output == "json":
        document = {"error": {"code": error.code, "message": str(error)}}
        click.echo(json.dumps(document, ensure_ascii=False), err=True)
    else:
        click.echo(f"vxmesh: {error}", err=True)


# Progress.


def say(text: str) -> None:
    """A line about work under way: on a terminal only."""
    if sys.stderr.isatty():
        click.echo(text, err=True)


@contextlib.contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show that work goes on, if it takes longer than a second and stderr is a terminal.

    Gives a function to call with how much more is done; `total` is in the same unit.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    bar = _Bar(label, total)
    timer = threading.Timer(PROGRESS_DELAY, bar.show)
    timer.daemon = True
    timer.start()
    try:
        yield bar.advance
    finally:
        timer.cancel()
        bar.close()


class _Bar:
    """A progress bar that may never be drawn. show() comes from a timer's thread."""

    def __init__(self, label: str, total: int | None) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._closed = False
        self._lock = threading.Lock()
        self._drawn: Any = None
        self._task: Any = None

    def show(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        with self._lock:
            if self._closed:
                return
            self._drawn = Progress(console=Console(stderr=True), transient=True)
            self._task = self._drawn.add_task(self._label, total=self._total, completed=self._done)
            self._drawn.start()

    def advance(self, more: int) -> None:
        with self._lock:
            self._done += more
            if self._drawn is not None:
                self._drawn.update(self._task, completed=self._done)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._drawn is not None:
                self._drawn.stop()
