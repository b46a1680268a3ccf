"""vxmesh metrics: how the agent and its name server are doing."""

from __future__ import annotations

import math
from typing import Any

import click

from agent.cli.calls import call
from agent.cli.output import emit_list, host_option, output_option


@click.command()
@host_option
@output_option
def metrics(host: str, output: str) -> None:
    """Show the agent's metrics, as Prometheus reads them.

    With -o json or yaml a list of name, labels and value. docs/metrics.md explains each.
    """
    text = call(host, lambda client: client.metrics())
    if output == "table":
        click.echo(text, nl=False)
    else:
        emit_list(parse(text), [], output)


def parse(text: str) -> list[dict[str, Any]]:
    """Prometheus' text as one object a series."""
    from prometheus_client.parser import text_string_to_metric_families

    return [
        {"name": sample.name, "labels": dict(sample.labels), "value": _number(sample.value)}
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


def _number(value: float) -> float | int | None:
    """Without a fraction if it has none; None for what JSON has no number for."""
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else value
