"""vxmesh testbed …: hosts out of namespaces on this machine; a thin layer over agent.testbed."""

from __future__ import annotations

import click

from agent import loading
from agent.cli.output import emit_done, emit_list, emit_object, output_option, say
from agent.testbed import Testbed, take_down

COLUMNS = [
    ("HOST", "name"),
    ("NAMESPACE", "namespace"),
    ("ADDRESS", "address"),
    ("AGENT", lambda h: h.get("agent")),
    ("ENGINE", lambda h: h.get("engine")),
    ("LINK", "link"),
    ("CUT FROM", "cut_from"),
    ("LOSS", lambda h: f"{h['loss']:g} %"),
    ("LOG", lambda h: h.get("log")),
]


@click.group()
@click.option(
    "--prefix",
    default="vxm",
    envvar="VXMESH_TESTBED_PREFIX",
    help="of the namespaces' names: testbeds with different ones stand side by side [vxm]",
)
@click.pass_context
def testbed(context: click.Context, prefix: str) -> None:
    """Hosts out of namespaces on this machine, each with an agent, joined."""
    context.ensure_object(dict)["prefix"] = prefix
    loading.end()


@testbed.command()
@click.option("--hosts", type=int, default=None, metavar="N", help="how many [3]")
@click.option("--ipv6", is_flag=True, help="IPv6 on the wire too")
@click.option(
    "--underlay", type=click.Choice(("4", "6")), default="4", help="IP version between agents [4]"
)
@click.option(
    "--docker", is_flag=True, help="a Docker engine in each host, with vxmesh as its plugin"
)
@click.option("--no-agents", is_flag=True, help="only the hosts and the wire")
@output_option
@click.pass_obj
def up(
    chosen: dict[str, str],
    hosts: int | None,
    ipv6: bool,
    underlay: str,
    docker: bool,
    no_agents: bool,
    output: str,
) -> None:
    """Make the hosts and start their agents; what is there already stays."""
    joined: list[str] = []
    Testbed.up(
        hosts,
        ipv6=ipv6,
        underlay=int(underlay),
        docker=docker,
        with_agents=not no_agents,
        prefix=chosen["prefix"],
        say=say,
        show=joined.append,
    )
    emit_done("\n".join(joined), {"joined": joined}, output)


@testbed.command()
@output_option
@click.pass_obj
def down(chosen: dict[str, str], output: str) -> None:
    """End all that runs in the hosts, and remove them."""
    if strangers := take_down(chosen["prefix"]):
        listed = ", ".join(map(str, strangers))
        click.echo(f"vxmesh: left alone, as the testbed did not start them: {listed}", err=True)


@testbed.command()
@output_option
@click.pass_obj
def status(chosen: dict[str, str], output: str) -> None:
    """Show the hosts."""
    found = Testbed.find(chosen["prefix"]).status()
    if output == "table":
        columns = [
            c for c in COLUMNS if c[0] != "ENGINE" or any("engine" in h for h in found["hosts"])
        ]
        emit_list([*found["hosts"], {"name": "client", **found["client"]}], columns, output)
    else:
        emit_object(found, output)


@testbed.command(
    "exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.argument("host")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- CMD...")
@click.pass_obj
def exec_(chosen: dict[str, str], host: str, command: tuple[str, ...]) -> None:
    """Run a command in a host, or in the client, with VXMESH_HOST set to its agent."""
    if command[:1] == ("--",):
        command = command[1:]
    if not command:
        raise click.UsageError("missing the command")
    Testbed.find(chosen["prefix"]).host(host).become(command)


@testbed.command()
@click.argument("host")
@click.option("--from", "other", default="", metavar="HOST2", help="only between the two")
@click.option("--one-way", is_flag=True, help="only what HOST sends to HOST2")
@output_option
@click.pass_obj
def cut(chosen: dict[str, str], host: str, other: str, one_way: bool, output: str) -> None:
    """Pull a host's cable, or let two hosts lose each other."""
    Testbed.find(chosen["prefix"]).cut(host, other, one_way=one_way)


@testbed.command()
@click.argument("host")
@output_option
@click.pass_obj
def heal(chosen: dict[str, str], host: str, output: str) -> None:
    """Undo every cut and loss of a host."""
    Testbed.find(chosen["prefix"]).heal(host)


@testbed.command()
@click.argument("host")
@click.argument("percent", type=float)
@output_option
@click.pass_obj
def loss(chosen: dict[str, str], host: str, percent: float, output: str) -> None:
    """Lose a share of the packets to and from a host; 0 for none."""
    Testbed.find(chosen["prefix"]).loss(host, percent)


@testbed.command()
@click.argument("host")
@click.option("--engine", is_flag=True, help="its Docker engine instead")
@output_option
@click.pass_obj
def kill(chosen: dict[str, str], host: str, engine: bool, output: str) -> None:
    """SIGKILL a host's agent, and nothing else of the host."""
    Testbed.find(chosen["prefix"]).kill(host, engine=engine)


@testbed.command()
@click.argument("host")
@output_option
@click.pass_obj
def start(chosen: dict[str, str], host: str, output: str) -> None:
    """Start a host's agent again, and its engine, and wait until they serve."""
    Testbed.find(chosen["prefix"]).start(host)
