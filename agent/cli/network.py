"""vxmesh network create | ls | inspect | rm | prune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from agent.cli.calls import call, pairs, to_dict
from agent.cli.output import (
    emit_done,
    emit_list,
    emit_object,
    host_option,
    output_option,
    wait_option,
)

if TYPE_CHECKING:
    from agent.rpc.types_pb2 import Network

AUX = "aux."  # model.AUX, which is not loaded for this
_COUNTS = ("total", "used", "free", "owned")
COLUMNS: list[tuple[str, Any]] = [
    ("NAME", "name"),
    ("DRIVER", "driver"),
    ("SUBNETS", lambda n: ", ".join(n["subnets"])),
    ("VNI", "vni"),
    ("MTU", lambda n: n["mtu"] or "-"),
    ("ENDPOINTS", "endpoints"),
    ("USED", lambda n: f"{n['used'] / n['total']:.0%}" if n["total"] else "-"),
    ("INTERNAL", lambda n: "yes" if n["internal"] else "no"),
    ("ENCRYPTED", lambda n: "yes" if n["encrypted"] else "no"),
    ("ID", "id"),
]


def _fields(message: Network, *without: str) -> dict[str, Any]:
    """A network's fields, its 64-bit counts as numbers (JSON's mapping of them is text)."""
    found = to_dict(message, *without)
    for part in [found, *found.get("usage", ())]:
        part.update({key: int(part[key]) for key in _COUNTS if key in part})
    return found


def _kept(given: tuple[str, ...]) -> dict[str, str]:
    """Addresses that are to be no workload's, as the option that says so of each."""
    return {f"{AUX}{name}": ip for name, ip in pairs(given, "--aux-address").items()}


@click.group()
def network() -> None:
    """Isolated networks."""


@network.command()
@click.argument("name")
@click.option(
    "--driver",
    default="overlay",
    show_default=True,
    help="overlay, bridge, macvlan, ipvlan, remote:PLUGIN",
)
@click.option("--subnet", "subnets", multiple=True, metavar="CIDR", help="[a free one]")
@click.option("--gateway", "gateways", multiple=True, metavar="IP", help="[the first address]")
@click.option(
    "--ip-range", "ip_ranges", multiple=True, metavar="CIDR", help="choose addresses only from here"
)
@click.option("--aux-address", "kept", multiple=True, metavar="NAME=IP", help="for no workload")
@click.option("--ipv6", is_flag=True, help="without --subnet: an IPv6 one too")
@click.option("--ipv6-only", is_flag=True, help="without --subnet: an IPv6 one alone")
@click.option("--internal", is_flag=True, help="no way out through the hosts")
@click.option("--mtu", default=0, help="[what fits through the underlay]")
@click.option("--vni", default=0, help="[a free one]")
@click.option("--encrypted", is_flag=True, help="between hosts, inside WireGuard")
@click.option("-O", "--opt", "options", multiple=True, metavar="KEY=VALUE", help="driver option")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE")
@click.option("--ipam-driver", default="", metavar="remote:PLUGIN", help="[addresses are ours]")
@click.option("--ipam-opt", "ipam_options", multiple=True, metavar="KEY=VALUE", help="for it")
@wait_option
@host_option
@output_option
def create(
    name: str,
    driver: str,
    subnets: tuple[str, ...],
    gateways: tuple[str, ...],
    ip_ranges: tuple[str, ...],
    kept: tuple[str, ...],
    ipv6: bool,
    ipv6_only: bool,
    internal: bool,
    mtu: int,
    vni: int,
    encrypted: bool,
    options: tuple[str, ...],
    labels: tuple[str, ...],
    ipam_driver: str,
    ipam_options: tuple[str, ...],
    wait: float,
    host: str,
    output: str,
) -> None:
    """Make a network; prints its id."""
    made = call(
        host,
        lambda client: client.create_network(
            name,
            driver=driver,
            subnets=subnets,
            gateways=gateways,
            ip_ranges=ip_ranges,
            internal=internal,
            mtu=mtu,
            vni=vni,
            encrypted=encrypted,
            ipv6=ipv6,
            ipv6_only=ipv6_only,
            options={**pairs(options, "-O"), **_kept(kept)},
            labels=pairs(labels, "--label"),
            ipam_driver=ipam_driver,
            ipam_options=pairs(ipam_options, "--ipam-opt"),
            wait=wait,
        ),
    )
    emit_done(made.id, _fields(made, "ranges", "usage"), output)


@network.command()
@host_option
@output_option
def ls(host: str, output: str) -> None:
    """List the networks."""
    found = call(host, lambda client: client.networks())
    rows = [_fields(n, "ranges", "usage") for n in found]
    conflicts = [("CONFLICT", "conflict")] if any(row["conflict"] for row in rows) else []
    emit_list(rows, COLUMNS + conflicts, output)


@network.command()
@click.argument("ref", metavar="NET")
@host_option
@output_option
def inspect(ref: str, host: str, output: str) -> None:
    """Show one network, how full it is, and which node may hand out which of its addresses."""
    emit_object(_fields(call(host, lambda client: client.network(ref))), output)


@network.command()
@click.argument("refs", metavar="NET...", nargs=-1, required=True)
@wait_option
@host_option
@output_option
def rm(refs: tuple[str, ...], wait: float, host: str, output: str) -> None:
    """Remove networks that have no endpoints."""
    removed = call(host, lambda client: client.remove_networks(refs, wait))
    emit_done("\n".join(removed), {"removed": removed}, output)


@network.command()
@wait_option
@host_option
@output_option
def prune(wait: float, host: str, output: str) -> None:
    """Remove every network that has no endpoint."""
    removed = call(host, lambda client: client.prune_networks(wait))
    emit_done("\n".join(removed), {"removed": removed}, output)
