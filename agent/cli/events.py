"""vxmesh events: what changed, and what an operator should hear of.

A line an event as it comes, so nothing is aligned to what is not there yet, nothing is kept,
and `-o json` is JSON lines instead of one document.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from typing import Any

import click

from agent.cli.calls import call, to_dict
from agent.cli.output import clean, host_option, output_option
from agent.client import Client
from agent.errors import Invalid
from agent.rpc import control_pb2 as pb

WIDTHS = (24, 18, 20)  # of TIME, KIND and OBJECT
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[smhd])+\Z")
# Which of a notice's fields says what it is about, the most telling first.
_ABOUT = ("endpoint", "service", "network", "networks", "node")


@click.command()
@click.option("-f", "--follow", is_flag=True, help="go on with what happens from now on")
@click.option(
    "--since",
    default="",
    metavar="T",
    help="10m, 2h30m; an RFC 3339 time; a revision [all that is in the history]",
)
@host_option
@output_option
def events(follow: bool, since: str, host: str, output: str) -> None:
    """Show what changed on all nodes, as this one heard of it, and what it noticed itself.

    The history is this agent's, since it started, and holds 10,000 events.
    """
    revision, not_before = parse_since(since, time.time())

    async def show(client: Client) -> None:
        if output == "table":
            _line("TIME", "KIND", "OBJECT", "MESSAGE")
        async for event in client.events(revision, not_before=not_before, follow=follow):
            if event.action == "trimmed":
                text = f"vxmesh: events: the history of this agent begins at {event.time}"
                click.echo(text, err=True)
            elif event.action != "synced":
                _show(event, output)

    try:
        call(host, show)
    except KeyboardInterrupt:
        pass  # that is how one ends following


def parse_since(text: str, now: float) -> tuple[int, float]:
    """A revision or 0, and seconds since the epoch or 0; Invalid if `text` is neither."""
    if not text:
        return 0, 0.0
    if text.isascii() and text.isdigit():
        return int(text), 0.0
    if _DURATION.match(text):
        parts = re.findall(r"([\d.]+)([smhd])", text)
        return 0, now - sum(float(number) * _UNITS[unit] for number, unit in parts)
    try:
        moment = datetime.datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError("no offset")
        return 0, moment.timestamp()
    except ValueError:
        raise Invalid(
            f"--since {text[:40]!r}",
            "is no duration, time or revision",
            "Write 10m, 2026-05-01T08:00:00Z or a number",
        ) from None


def describe(event: pb.Event) -> tuple[str, str, str]:
    """Kind, object and message of an event, for people."""
    what = event.WhichOneof("object")
    kind = f"{what}.{event.action}"
    if what == "node":
        node = event.node
        text = f"{node.state} ({node.reason})" if node.reason else node.state
        return kind, node.name or node.id, text
    if what == "network":
        return (
            kind,
            event.network.name,
            f"VNI {event.network.vni}, " + ", ".join(event.network.subnets),
        )
    if what == "endpoint":
        endpoint = event.endpoint
        text = f"{', '.join(endpoint.addresses)} on {endpoint.node}"
        return kind, f"{endpoint.network}/{endpoint.name}", text
    if what == "service":
        service = event.service
        text = ", ".join(service.vips) or service.mode
        ready = sum(backend.takes for backend in service.backends)
        text += f", {ready} of {len(service.backends)} backends take connections"
        return kind, f"{service.network}/{service.name}", text
    notice = event.notice
    about = next((notice.fields[key] for key in _ABOUT if notice.fields.get(key)), "-")
    return notice.kind, about, notice.message


def _show(event: pb.Event, output: str) -> None:
    kind, about, message = describe(event)
    if output == "table":
        _line(event.time, kind, about, message)
        return
    what = event.WhichOneof("object")
    found: dict[str, Any] = {
        "time": event.time,
        "revision": event.revision,
        "kind": kind,
        "object": about,
        "message": message,
    }
    if what == "notice":
        found["fields"] = dict(event.notice.fields)
    elif what:
        found["action"] = event.action
        found[what] = to_dict(getattr(event, what))
    if output == "yaml":
        import yaml

        click.echo("---\n" + yaml.safe_dump(found, sort_keys=False, allow_unicode=True), nl=False)
    else:
        click.echo(json.dumps(found, ensure_ascii=False))


def _line(*cells: str) -> None:
    shown = [clean(cell) for cell in cells]
    padded = [cell.ljust(width) for cell, width in zip(shown, WIDTHS, strict=False)]
    click.echo("   ".join([*padded, shown[-1]]))
