"""vxmesh cluster init | token | rotate-ca | status | user NAME: who belongs to it, who may join."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.cli.calls import call, pause, to_dict
from agent.cli.output import (
    emit_done,
    emit_list,
    emit_object,
    host_option,
    output_option,
    say,
    wait_option,
)
from agent.cli.user import user
from agent.errors import Timeout

if TYPE_CHECKING:
    from agent.client import Client
    from agent.rpc import control_pb2 as pb

POLL = 0.2  # s
CERTIFICATES = [
    ("NODE", "node"),
    ("CERTIFICATE ENDS", lambda c: c["ends"] or "-"),
    ("OF CA", lambda c: c["fingerprint"] or "none that is trusted"),
    ("KEEPS THE KEY", lambda c: "yes" if c["keeper"] else "no"),
]
AUTHORITIES = [("CA", "fingerprint"), ("ENDS", "ends"), ("STATE", "state")]


@click.group()
def cluster() -> None:
    """Who belongs to the cluster: its CA, and the tokens to join with."""


@cluster.command()
@click.option("--state-dir", default=None, help="of the agent [/var/lib/vxmesh]")
@click.option("--config", "file", type=click.Path(path_type=Path), help="a TOML file")
@click.option("--cert-life", default=None, help="of this node's certificate, as 90d, 12h [90d]")
@output_option
def init(state_dir: str | None, file: Path | None, cert_life: str | None, output: str) -> None:
    """Make a new cluster, whose first node is this host.

    Needs no agent: it writes the agent's state directory. An agent that is started with neither
    a state nor --join does the same by itself.
    """
    from agent.cluster.identity import initiation
    from agent.config import load

    flags = {"state_dir": state_dir, "cert_life": cert_life}
    given = {name: value for name, value in flags.items() if value is not None}
    settings = load(given, os.environ, file).settings
    made = initiation.init(settings)
    text = (
        f"Cluster {made.cluster}; this host is its first node, {made.node}.\n"
        f"CA {made.fingerprint}, its key is in {made.directory}: keep that directory private.\n"
        "Start the agent:\n"
        "    vxmesh agent\n"
        "and on each other machine\n"
        f"    {made.command}"
    )
    fields = {
        "id": made.cluster,
        "node": made.node,
        "fingerprint": made.fingerprint,
        "directory": str(made.directory),
        "token": made.token,
        "command": made.command,
    }
    emit_done(text, fields, output)


@cluster.command()
@click.option("--rotate", is_flag=True, help="make a new one first; the one before is void then")
@host_option
@output_option
def token(rotate: bool, host: str, output: str) -> None:
    """Show what to type on a machine that is to join.

    Only a node that keeps the CA's key can tell it: see 'vxmesh cluster status'.
    """
    found = call(host, lambda client: client.join_token(rotate=rotate))
    emit_done(found.command, to_dict(found), output)


@cluster.command("rotate-ca")
@click.option("--force", is_flag=True, help="leave nodes behind that are away")
@wait_option
@host_option
@output_option
def rotate_ca(force: bool, wait: float, host: str, output: str) -> None:
    """Replace the cluster's CA: all nodes get new certificates, and no connection is lost.

    Nodes that are away meanwhile need a new token to come back. The join token changes as well.
    Run again, it goes on with what is under way.
    """
    found = call(host, lambda client: _rotate(client, force, wait))
    if output == "table":
        phase = found.rotation.phase
        behind = ", ".join(found.rotation.left_behind)
        lines = [
            "The CA was changed."
            if phase == "done"
            else f"The CA is being changed ({phase}). See 'vxmesh cluster status'."
        ]
        if behind:
            lines.append(f"Left behind, and in need of a new token: {behind}")
        click.echo("\n".join(lines))
    else:
        emit_object(to_dict(found), output)


async def _rotate(client: Client, force: bool, wait: float) -> pb.Cluster:
    deadline = time.monotonic() + wait
    found = await client.rotate_authority(force=force)
    shown = ""
    while wait and found.rotation.phase != "done":
        waiting = ", ".join(found.rotation.waiting)
        progress = f"{found.rotation.phase}: " + (f"waiting for {waiting}" if waiting else "done")
        if progress != shown:
            say(progress)
            shown = progress
        if time.monotonic() >= deadline:
            raise Timeout(
                "the change of the CA",
                f"is under way, but not done after {wait:g} s: {progress}",
                "It goes on by itself; see 'vxmesh cluster status'",
            )
        await pause(client, POLL)
        found = await client.cluster()
    return found


@cluster.command()
@host_option
@output_option
def status(host: str, output: str) -> None:
    """Show the cluster, its CA, who keeps its key, and when certificates end."""
    found: dict[str, Any] = to_dict(call(host, lambda client: client.cluster()))
    if output != "table":
        emit_object(found, output)
        return
    rotation = found["rotation"]
    fields = {"cluster": found["id"], "node": found["node"], "keepers": found["keepers"]}
    if rotation["phase"]:
        fields["rotation"] = rotation["phase"]
        fields |= {"waiting for": rotation["waiting"]} if rotation["waiting"] else {}
        fields |= {"left behind": rotation["left_behind"]} if rotation["left_behind"] else {}
    emit_object(fields, output)
    click.echo()
    emit_list(found["authorities"], AUTHORITIES, output)
    click.echo()
    emit_list(found["certificates"], CERTIFICATES, output)


cluster.add_command(user)
