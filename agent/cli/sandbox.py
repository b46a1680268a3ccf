"""vxmesh sandbox ls | inspect SB | rm SB."""

from __future__ import annotations

from typing import Any

import click

from agent.cli.calls import call, to_dict
from agent.cli.output import (
    emit_done,
    emit_list,
    emit_object,
    host_option,
    output_option,
    wait_option,
)

COLUMNS = [
    ("NAME", "name"),
    ("PID", lambda s: s["pid"] or "-"),
    ("ENDPOINTS", lambda s: ", ".join(filter(None, [s["stack"], *map(_endpoint, s["endpoints"])]))),
    ("PUBLISHES", lambda s: ", ".join(_publish(p) for p in s["publishes"]) or "-"),
    ("NETNS", "netns"),
    ("ID", "id"),
]


def _endpoint(endpoint: dict[str, Any]) -> str:
    return f"{endpoint['network']} {', '.join(endpoint['addresses'])}"


def _publish(publish: dict[str, object]) -> str:
    at = f"{publish['host_address']}:" if publish["host_address"] else ""
    return f"{at}{publish['host_port']}→{publish['target_port']}/{publish['protocol']}"


@click.group()
def sandbox() -> None:
    """Isolated network stacks of workloads on this node."""


@sandbox.command()
@host_option
@output_option
def ls(host: str, output: str) -> None:
    """List the sandboxes of this node."""
    found = call(host, lambda client: client.sandboxes())
    emit_list([to_dict(s) for s in found], COLUMNS, output)


@sandbox.command()
@click.argument("ref", metavar="SB")
@host_option
@output_option
def inspect(ref: str, host: str, output: str) -> None:
    """Show one sandbox."""
    emit_object(to_dict(call(host, lambda client: client.sandbox(ref))), output)


@sandbox.command()
@click.argument("refs", metavar="SB...", nargs=-1, required=True)
@wait_option
@host_option
@output_option
def rm(refs: tuple[str, ...], wait: float, host: str, output: str) -> None:
    """Take a sandbox's interfaces away; the processes in it are left alone."""
    removed = call(host, lambda client: client.remove_sandboxes(refs, wait))
    emit_done("\n".join(removed), {"removed": removed}, output)
