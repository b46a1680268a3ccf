"""vxmesh resolve NAME[/TYPE]: what the name server would answer, and why."""

from __future__ import annotations

import click

from agent.cli.calls import call, to_dict
from agent.cli.output import emit_object, host_option, output_option
from agent.errors import NotFound


@click.command()
@click.argument("name", metavar="NAME[/TYPE]")
@click.option("--network", default="", metavar="NET", help="[all with an endpoint on this node]")
@host_option
@output_option
def resolve(name: str, network: str, host: str, output: str) -> None:
    """Show what a sandbox would be answered, and why.

    Fails with 4 if the name does not exist.
    """
    question, _, type = name.partition("/")
    reply = call(host, lambda client: client.resolve(question, type.upper(), network))
    found = to_dict(reply)
    if output == "table":
        for record in reply.records:
            click.echo(f"{record.name} {record.ttl} {record.type} {record.data}")
        for reason in reply.why:
            click.echo(f"  {reason}")
    else:
        emit_object(found, output)
    if reply.result == "nxdomain":
        raise NotFound(f"name {question}", "does not exist here", "See 'vxmesh endpoint ls'")
