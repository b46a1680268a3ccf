"""The vxmesh command: finds a noun's module, runs it, turns errors into a line and a status.

A noun's module is imported when the noun is used and not before, so that --help needs none of
them. Opposite stand the modules of NOUNS; statuses are those of agent/errors.py.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from agent import __version__
from agent.cli.output import host_option, output_option, report
from agent.errors import Invalid, VxmeshError

INTERRUPTED = 130  # 128 + SIGINT

# noun: where its command is, and what --help says of it
NOUNS: dict[str, tuple[str, str]] = {
    "agent": ("agent.cli.agent:agent", "Run the agent of this host, in the foreground."),
    "cluster": ("agent.cli.cluster:cluster", "Who belongs to it: its CA, join tokens."),
    "node": ("agent.cli.node:node", "Hosts that run an agent."),
    "network": ("agent.cli.network:network", "Isolated networks."),
    "endpoint": ("agent.cli.endpoint:endpoint", "Interfaces of workloads in networks."),
    "service": ("agent.cli.service:service", "Names with an address, ports and backends."),
    "sandbox": ("agent.cli.sandbox:sandbox", "Network stacks of workloads on this node."),
    "run": ("agent.cli.run:run", "Run a command in a sandbox of its own."),
    "exec": ("agent.cli.run:exec_", "Run a command in a sandbox that exists."),
    "resolve": ("agent.cli.resolve:resolve", "What a name is answered with, and why."),
    "events": ("agent.cli.events:events", "What changed, and what an operator should hear of."),
    "metrics": ("agent.cli.metrics:metrics", "How the agent and its name server are doing."),
    "testbed": ("agent.cli.testbed:testbed", "Hosts out of namespaces on this machine."),
}


class LazyGroup(click.Group):
    """A group whose commands are named in NOUNS and imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(NOUNS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in NOUNS:
            return None
        module, _, attribute = NOUNS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(noun, text) for noun, (_, text) in NOUNS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@host_option
@output_option
@click.version_option(__version__, prog_name="vxmesh")
def root(host: str, output: str) -> None:
    """Join the containers, namespaces and processes of several hosts into isolated networks."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line; the exit status. Errors have been shown."""
    chosen: dict[str, str] = {}  # what _remember in output.py puts there
    try:
        status = root.main(list(arguments), "vxmesh", standalone_mode=False, obj=chosen)
    except VxmeshError as error:
        report(error, chosen.get("output") or _find_output(arguments))
        return error.exit_status
    except click.UsageError as error:
        if error.ctx is not None and error.message == error.ctx.get_help():
            click.echo(error.message, err=True)  # a group without a verb
        else:
            report(_explain(error), chosen.get("output") or _find_output(arguments))
        return error.exit_code
    except UnicodeEncodeError:
        why = "has a word that is not UTF-8"
        report(Invalid("the command line", why, "Write names in UTF-8"), _find_output(arguments))
        return Invalid.exit_status
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    return status if isinstance(status, int) else 0


def main() -> NoReturn:
    """Run the process's own command line and end it."""
    status = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read us has gone, which is no error; without this Python says so at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)


def _explain(error: click.UsageError) -> VxmeshError:
    """click's message in the form of our own."""
    context: Any = error.ctx
    path = context.command_path if context is not None else "vxmesh"
    message = error.format_message().rstrip(".")
    return Invalid(
        path.removeprefix("vxmesh").strip() or "the command line",
        message[:1].lower() + message[1:],
        f"See '{path} --help'",
    )


def _find_output(arguments: Sequence[str]) -> str:
    """The -o of a line that click could not parse as far as that."""
    before = list(arguments)
    if "--" in before:
        before = before[: before.index("--")]
    for i, word in enumerate(before):
        for flag in ("-o", "--output"):
            if word == flag and i + 1 < len(before):
                return before[i + 1]
            if word.startswith(flag):
                return word.removeprefix(flag).removeprefix("=")
    return "table"
