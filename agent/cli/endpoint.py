"""vxmesh endpoint create | announce | ls | inspect | health | rm."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from agent.cli.calls import call, pairs, to_dict
from agent.cli.output import (
    emit_done,
    emit_list,
    emit_object,
    host_option,
    output_option,
    progress,
    wait_option,
)
from agent.errors import Invalid

PIECE = 1 << 20  # bytes read at a time

COLUMNS = [
    ("NAME", "name"),
    ("NETWORK", "network"),
    ("NODE", "node"),
    ("MAC", "mac"),
    ("ADDRESSES", lambda e: ", ".join(e["addresses"])),
    ("HEALTH", "health"),
    ("STATE", "state"),
    ("ID", "id"),
]


@click.group()
def endpoint() -> None:
    """Interfaces of workloads in networks."""


@endpoint.command()
@click.option("--network", required=True, metavar="NET")
@click.option("--name", default="", help="needed without --sandbox [the sandbox's]")
@click.option("--ip", "addresses", multiple=True, metavar="IP", help="[a free one]")
@click.option("--mac", default="", help="[made from the address]")
@click.option("--alias", "aliases", multiple=True, help="a further name; may be shared")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE")
@click.option("--netns", default="", metavar="NAME|PATH", help="put an interface there")
@click.option("--sandbox", default="", metavar="SB", help="put one there while it runs")
@click.option("--ifname", default="", help="its name [the next free of eth0, eth1 …]")
@click.option(
    "--priority",
    default=0,
    metavar="N",
    help="the highest has the default routes, of equals the oldest [0]",
)
@wait_option
@host_option
@output_option
def create(
    network: str,
    name: str,
    addresses: tuple[str, ...],
    mac: str,
    aliases: tuple[str, ...],
    labels: tuple[str, ...],
    netns: str,
    sandbox: str,
    ifname: str,
    priority: int,
    wait: float,
    host: str,
    output: str,
) -> None:
    """Make an endpoint; prints its id."""
    if not name and not sandbox:
        raise click.UsageError("Missing option '--name'.")
    made = call(
        host,
        lambda client: client.create_endpoint(
            network,
            name,
            addresses=addresses,
            mac=mac,
            aliases=aliases,
            labels=pairs(labels, "--label"),
            netns=netns,
            ifname=ifname,
            sandbox=sandbox,
            priority=priority,
            wait=wait,
        ),
    )
    emit_done(made.id, to_dict(made), output)


@endpoint.command()
@click.option("--network", required=True, metavar="NET")
@click.option("--file", "file", required=True, metavar="F.jsonl", help="- for stdin")
@wait_option
@host_option
@output_option
def announce(network: str, file: str, wait: float, host: str, output: str) -> None:
    """Announce interfaces that exist: a line each of {"name":…, "mac":…, "addresses":[…]}.

    All of them are taken, or none.
    """
    size = None
    if file != "-":
        path = Path(file)
        if not path.is_file():
            raise Invalid(f"file {file}", "does not exist", "Give the path of one, or - for stdin")
        size = path.stat().st_size
    with progress("announcing", size) as advance:

        def pieces() -> Iterator[bytes]:
            source = sys.stdin.fileno() if file == "-" else file
            with open(source, "rb", closefd=file != "-") as stream:
                while piece := stream.read(PIECE):
                    advance(len(piece))
                    yield piece

        count = call(host, lambda client: client.announce(network, pieces(), wait))
    emit_done(f"{count} announced", {"announced": count}, output)


@endpoint.command()
@click.option("--network", default="", metavar="NET")
@click.option("--node", default="")
@host_option
@output_option
def ls(network: str, node: str, host: str, output: str) -> None:
    """List endpoints."""
    found = call(host, lambda client: client.endpoints(network, node))
    emit_list([to_dict(e) for e in found], COLUMNS, output)


@endpoint.command()
@click.argument("ref", metavar="EP")
@click.option("--network", default="", metavar="NET")
@host_option
@output_option
def inspect(ref: str, network: str, host: str, output: str) -> None:
    """Show one endpoint."""
    emit_object(to_dict(call(host, lambda client: client.endpoint(ref, network))), output)


@endpoint.command()
@click.argument("ref", metavar="EP")
@click.argument("state", type=click.Choice(("healthy", "unhealthy", "none")))
@click.option("--reason", default="", help="why it is unhealthy, for people")
@click.option("--network", default="", metavar="NET")
@wait_option
@host_option
@output_option
def health(
    ref: str, state: str, reason: str, network: str, wait: float, host: str, output: str
) -> None:
    """Say how an endpoint of this node is, as who runs its workload knows.

    With none, what was said before holds no more.
    """
    told = "" if state == "none" else state
    found = call(host, lambda client: client.set_health(ref, told, reason, network, wait))
    emit_done("", to_dict(found), output)


@endpoint.command()
@click.argument("refs", metavar="EP...", nargs=-1)
@click.option("--network", default="", metavar="NET")
@click.option("--all", "every", is_flag=True, help="all of this node in --network")
@wait_option
@host_option
@output_option
def rm(
    refs: tuple[str, ...], network: str, every: bool, wait: float, host: str, output: str
) -> None:
    """Remove endpoints of this node."""
    if every == bool(refs) or (every and not network):
        raise click.UsageError("give endpoints, or --all with --network")
    removed = call(
        host, lambda client: client.remove_endpoints(refs, network, all=every, wait=wait)
    )
    text = f"{len(removed)} removed" if every else "\n".join(removed)
    emit_done(text, {"removed": removed}, output)
