"""vxmesh node ls | inspect NODE | rm NODE... | leave | rotate-keys."""

from __future__ import annotations

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


@node.command()
@click.argument("refs", metavar="NODE...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="though they live: cut them off")
@wait_option
@host_option
@output_option
def rm(refs: tuple[str, ...], force: bool, wait: float, host: str, output: str) -> None:
    """Remove nodes that will not come back; the agent's node inherits their addresses.

    Every other node has to agree. Name all that are lost in one command. One that lives is
    removed only with --force, for a host that was taken over: its workloads go on running, cut
    off, and its addresses are handed out again.
    """
    removed = call(host, lambda client: client.remove_nodes(refs, wait, force=force))
    emit_done("\n".join(removed), {"removed": removed}, output)


@node.command()
@click.option("--force", is_flag=True, help="end the workloads of this node")
@wait_option
@host_option
@output_option
def leave(force: bool, wait: float, host: str, output: str) -> None:
    """Hand this node's addresses to the others and end its agent.

    Started again, it is the same node as before. With --wait it goes once nothing of it is in
    any other node's kernel; past the time it stays.
    """
    done = [to_dict(h) for h in call(host, lambda client: client.leave(force=force, wait=wait))]
    text = "\n".join(f"{h['network']}: {h['addresses']} addresses to {h['node']}" for h in done)
    emit_done(text, {"handovers": done}, output)


@node.command("rotate-keys")
@host_option
@output_option
def rotate_keys(host: str, output: str) -> None:
    """Give this node a new WireGuard key now; encrypted networks go on meanwhile.

    It is done by itself every day (setting wireguard_rotate).
    """
    done = to_dict(call(host, lambda client: client.rotate_keys()))
    emit_done(done["wireguard"][0]["public_key"], done, output)
