"""vxmesh service create | backend add|rm|drain | ls | inspect | update | rm."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

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
from agent.cli.serviceports import parse_ports

if TYPE_CHECKING:
    from agent.rpc import control_pb2 as pb
    from agent.rpc.types_pb2 import Service

F = TypeVar("F", bound=Callable[..., Any])
COLUMNS: list[tuple[str, Any]] = [
    ("NAME", "name"),
    ("NETWORK", "network"),
    ("MODE", "mode"),
    ("VIPS", lambda s: ", ".join(s["vips"])),
    ("PORTS", lambda s: ", ".join(map(_port, s["ports"]))),
    ("READY", lambda s: f"{sum(b['takes'] for b in s['backends'])}/{len(s['backends'])}"),
    ("STATE", "state"),
    ("ID", "id"),
]
# Options of `update` that replace a field, and the field.
_FIELDS = {
    "selector": "selector",
    "affinity": "affinity",
    "affinity_timeout": "affinity",
    "publish_on": "publish_on",
    "prefer_local": "prefer_local",
    "all_unhealthy": "all_unhealthy",
    "drain_timeout": "drain_timeout",
    "labels": "labels",
}
_HEALTH = ("port", "interval", "timeout", "rise", "fall")


def _port(port: dict[str, Any]) -> str:
    """As it was given: 8080->80:8000/udp is published at 8080, and its target is 8000."""
    text = f"{port['port']}" + (f":{port['target']}" if port["target"] != port["port"] else "")
    if port["published"]:
        at = port["published_at"]
        at = f"[{at}]:" if ":" in at else f"{at}:" if at else ""
        text = f"{at}{port['published']}->{text}"
    return text + ("" if port["protocol"] == "tcp" else f"/{port['protocol']}")


@click.group()
def service() -> None:
    """Names with a virtual address, ports and backends."""


def _settings(command: F) -> F:
    """The options that `create` and `update` share."""
    options = [
        click.option("--port", "ports", multiple=True, metavar="PORT[:TARGET][/udp]"),
        click.option(
            "--publish",
            "publishes",
            multiple=True,
            metavar="[IP:]PORT[:PORT][/udp]",
            help="a port of the nodes, and the service's port that it leads to",
        ),
        click.option("--publish-on", multiple=True, metavar="NODE", help="[every node]"),
        click.option(
            "--selector",
            "selector",
            multiple=True,
            metavar="KEY=VALUE",
            help="endpoints with these labels are backends",
        ),
        click.option("--affinity", metavar="none|client", help="a client stays with its backend"),
        click.option("--affinity-timeout", type=float, metavar="S", help="[10800]"),
        click.option("--health", metavar="tcp|http:PATH|runtime|none", help="[none]"),
        click.option("--health-interval", type=float, metavar="S", help="[2]"),
        click.option("--health-timeout", type=float, metavar="S", help="[1]"),
        click.option("--health-port", type=int, metavar="PORT", help="[the first TCP target]"),
        click.option("--health-rise", type=int, metavar="N", help="good ones in a row [1]"),
        click.option("--health-fall", type=int, metavar="N", help="bad ones in a row [1]"),
        click.option(
            "--all-unhealthy",
            metavar="refuse|all",
            help="with no healthy backend: refuse at once, or use all of them [refuse]",
        ),
        click.option(
            "--prefer-local/--no-prefer-local",
            default=None,
            help="a node's own backends first, while it has one",
        ),
        click.option(
            "--drain-timeout",
            type=float,
            metavar="S",
            help="reset what a draining backend still has after that [never]",
        ),
        click.option("--label", "labels", multiple=True, metavar="KEY=VALUE"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _build(given: dict[str, Any], mode: str = "", vips: tuple[str, ...] = ()) -> pb.ServiceSettings:
    from agent.rpc import control_pb2 as pb

    kind, _, path = (given["health"] or "").partition(":")
    settings = pb.ServiceSettings(
        mode=mode,
        vips=vips,
        ports=parse_ports(given["ports"], given["publishes"]),
        selector=pairs(given["selector"], "--selector"),
        affinity=given["affinity"] or "",
        affinity_timeout=given["affinity_timeout"] or 0.0,
        publish_on=given["publish_on"],
        prefer_local=given["prefer_local"] or False,
        all_unhealthy=given["all_unhealthy"] or "",
        drain_timeout=given["drain_timeout"] or 0.0,
        labels=pairs(given["labels"], "--label"),
    )
    settings.health.kind, settings.health.path = kind, path
    for name in _HEALTH:
        value = given[f"health_{name}"]
        if value is not None:
            if value <= 0:
                flag = f"--health-{name}"
                raise click.BadParameter(f"{value} is not positive.", param_hint=flag)
            setattr(settings.health, name, value)
    return settings


def _check_health_options(given: dict[str, Any]) -> None:
    if not given["health"] and any(given[f"health_{name}"] is not None for name in _HEALTH):
        raise click.UsageError("--health-… says nothing without --health.")


def _show(made: Service, output: str, text: str = "") -> None:
    emit_done(text, to_dict(made), output)


@service.command()
@click.argument("name")
@click.option("--network", required=True, metavar="NET")
@click.option("--mode", default="vip", metavar="vip|dnsrr", show_default=True)
@click.option("--ip", "vips", multiple=True, metavar="IP", help="its own address [a free one]")
@_settings
@wait_option
@host_option
@output_option
def create(
    name: str,
    network: str,
    mode: str,
    vips: tuple[str, ...],
    wait: float,
    host: str,
    output: str,
    **given: Any,
) -> None:
    """Make a service; prints its id."""
    _check_health_options(given)
    settings = _build(given, mode, vips)
    made = call(host, lambda client: client.create_service(name, network, settings, wait))
    _show(made, output, made.id)


@service.command()
@click.argument("ref", metavar="SERVICE")
@click.option("--network", default="", metavar="NET")
@click.option("--no-publish", is_flag=True, help="publish none of its ports")
@click.option("--no-selector", is_flag=True, help="leave only the backends that are named")
@_settings
@wait_option
@host_option
@output_option
def update(
    ref: str,
    network: str,
    no_publish: bool,
    no_selector: bool,
    wait: float,
    host: str,
    output: str,
    **given: Any,
) -> None:
    """Change a service. What is given replaces what there is; the rest stays.

    --port and --publish go together: either replaces all of the service's ports and how they are
    published. --publish alone keeps the ports.
    """
    _check_health_options(given)
    if (no_publish and given["publishes"]) or (no_selector and given["selector"]):
        raise click.UsageError("an option and its --no- cannot both hold.")
    settings = _build(given)
    fields = {field for option, field in _FIELDS.items() if given[option] not in (None, ())}
    if given["affinity_timeout"] and not given["affinity"]:
        settings.affinity = "client"
    if given["health"]:
        fields.add("health")
    if no_selector:
        fields.add("selector")
    if given["ports"]:
        fields.add("ports")
    elif given["publishes"] or no_publish:
        # Which ports there are now is in the service; what they lead to is kept.
        found = call(host, lambda client: client.service(ref, network))
        known = dict.fromkeys((p.port, p.target, p.protocol) for p in found.ports)
        had = [f"{port}:{target}/{protocol}" for port, target, protocol in known]
        del settings.ports[:]
        settings.ports.extend(parse_ports(had, given["publishes"]))
        fields.add("ports")
    if no_publish:
        fields.add("publish_on")
    if not fields:
        raise click.UsageError("say what is to be changed.")
    made = call(
        host,
        lambda client: client.update_service(ref, settings, sorted(fields), network, wait),
    )
    _show(made, output)


@service.command()
@click.option("--network", default="", metavar="NET", help="[all]")
@host_option
@output_option
def ls(network: str, host: str, output: str) -> None:
    """List services."""
    rows = [to_dict(found) for found in call(host, lambda client: client.services(network))]
    conflicts = [("CONFLICT", "conflict")] if any(row["conflict"] for row in rows) else []
    emit_list(rows, COLUMNS + conflicts, output)


@service.command()
@click.argument("ref", metavar="SERVICE")
@click.option("--network", default="", metavar="NET")
@host_option
@output_option
def inspect(ref: str, network: str, host: str, output: str) -> None:
    """Show one service, and how each of its backends is."""
    emit_object(to_dict(call(host, lambda client: client.service(ref, network))), output)


@service.command()
@click.argument("refs", metavar="SERVICE...", nargs=-1, required=True)
@click.option("--network", default="", metavar="NET")
@wait_option
@host_option
@output_option
def rm(refs: tuple[str, ...], network: str, wait: float, host: str, output: str) -> None:
    """Remove services; their backends stay."""
    removed = call(host, lambda client: client.remove_services(refs, network, wait))
    emit_done("\n".join(removed), {"removed": removed}, output)


@service.group()
def backend() -> None:
    """Endpoints that a service leads to, by name."""


def _backend_arguments(command: F) -> F:
    for option in (
        output_option,
        host_option,
        wait_option,
        click.option("--network", default="", metavar="NET", help="[the service's own]"),
        click.argument("endpoint", metavar="EP"),
        click.argument("ref", metavar="SERVICE"),
    ):
        command = option(command)
    return command


@backend.command()
@click.option("--weight", type=int, help="its share beside the others' [1]")
@_backend_arguments
def add(
    ref: str, endpoint: str, network: str, weight: int | None, wait: float, host: str, output: str
) -> None:
    """Make an endpoint a backend, change its weight, or end its draining."""
    made = call(
        host,
        lambda client: client.add_backend(ref, endpoint, weight=weight, network=network, wait=wait),
    )
    _show(made, output)


@backend.command(name="rm")
@_backend_arguments
def rm_(ref: str, endpoint: str, network: str, wait: float, host: str, output: str) -> None:
    """Take an endpoint that was added out of the backends; its connections are reset."""
    made = call(
        host, lambda client: client.remove_backend(ref, endpoint, network=network, wait=wait)
    )
    _show(made, output)


@backend.command()
@_backend_arguments
def drain(ref: str, endpoint: str, network: str, wait: float, host: str, output: str) -> None:
    """Send no new connections to a backend; those that it has go on."""
    made = call(
        host, lambda client: client.drain_backend(ref, endpoint, network=network, wait=wait)
    )
    _show(made, output)
