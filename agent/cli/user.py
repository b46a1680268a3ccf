"""vxmesh cluster user NAME: a certificate for who uses agents over TCP.

The key is made here and stays here. What stands opposite: cluster/identity/users.py issues.
"""

from __future__ import annotations

from pathlib import Path

import click

from agent.cli.calls import call, to_dict
from agent.cli.output import emit_done, host_option, output_option


@click.command()
@click.argument("name")
@click.option("--read", is_flag=True, help="one that may look and not change")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="where to write it [NAME.pem]"
)
@host_option
@output_option
def user(name: str, read: bool, out: Path | None, host: str, output: str) -> None:
    """Issue a certificate for somebody who is to use agents over TCP.

    It is written with its key and the cluster's CAs to one file, for --tls or VXMESH_TLS, and is
    good for 90 days. Agents take such users with --control-listen. Only a node that keeps the
    CA's key can issue ('vxmesh cluster status').
    """
    from agent.clienttls import make_request, reserve_bundle

    with reserve_bundle(out or Path(f"{name}.pem")) as write:
        key, request = make_request(name)
        made = call(host, lambda client: client.issue_user(name, request, read=read))
        write(b"".join((key, made.certificate, *made.authorities)))
    fields = {**to_dict(made, "certificate", "authorities"), "file": str(out or f"{name}.pem")}
    text = f"{fields['file']}: {made.name} may {made.right} until {made.ends}"
    emit_done(text, fields, output)
