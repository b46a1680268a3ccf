"""vxmesh agent: run the agent of this host in the foreground."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from agent import loading
from agent.cli.output import emit_list, output_option
from agent.config import Settings, load


def _options(command: Any) -> Any:
    for field in reversed(fields(Settings)):
        flag = f"--{field.name.replace('_', '-')}"
        help_text = field.metadata["help"]
        if isinstance(field.default, bool):
            option = click.option(flag, is_flag=True, default=None, help=help_text)
        elif isinstance(field.default, tuple):
            option = click.option(flag, multiple=True, help=help_text)
        else:
            kind = type(field.default)
            shown = f"{help_text} [{field.default}]" if field.default else help_text
            option = click.option(flag, type=kind, default=None, help=shown)
        command = option(command)
    return command


def _shown(name: str, settings: Settings) -> Any:
    value = getattr(settings, name)
    return "(not shown)" if name == "token" and value else value


@click.command()
@_options
@click.option("--config", "file", type=click.Path(path_type=Path), help="a TOML file")
@click.option("--check-config", is_flag=True, help="say what holds and from where, and stop")
@click.option("--reset-state", is_flag=True, help="set the state aside and join as a new node")
@output_option
def agent(
    file: Path | None, check_config: bool, reset_state: bool, output: str, **flags: Any
) -> None:
    """Run the agent of this host, in the foreground.

    Each option is also VXMESH_NAME in the environment and a key in the TOML file.
    """
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    resolved = load(given, os.environ, file)
    if check_config:
        rows = [
            {"setting": name, "value": _shown(name, resolved.settings), "from": source}
            for name, source in resolved.sources.items()
        ]
        columns = [("SETTING", "setting"), ("VALUE", lambda r: str(r["value"])), ("FROM", "from")]
        emit_list(rows, columns, output)
        return
    from agent.daemon import main

    loading.end()
    main(resolved.settings, reset_state)
