"""vxmesh node ls | inspect NODE."""

from __future__ import annotations

import click

from agent.cli.calls import call, to_dict
from agent.cli.output import emit_list, emit_object, host_option, output_option

COLUMNS = [
    ("NAME", "name"),
    ("ADDRESS", "address"),
    ("STATE", lambda n: f"{n['state']} ({n['reason']})" if n["reason"] else n["state"]),
    ("ENDPOINTS", "endpoints"),
    ("RTT", lambda n: f"{n['rtt_ms']:.1f} ms" if n["rtt_ms"] else "-"),
    ("VERSION", "version"),
    ("ID", "id"),
]


@click.group()
def node() -> None:
    """Hosts that run an agent."""


@node.command()
@host_option
@output_option
def ls(host: str, output: str) -> None:
    """List the nodes."""
    found = call(host, lambda client: client.nodes())
    emit_list([to_dict(n) for n in found], COLUMNS, output)


@node.command()
@click.argument("ref", metavar="NODE")
@host_option
@output_option
def inspect(ref: str, host: str, output: str) -> None:
    """Show one node."""
    emit_object(to_dict(call(host, lambda client: client.node(ref))), output)
