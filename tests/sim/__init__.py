"""A cluster of real nodes, sessions and rings on a virtual clock and a hostile network.

One seed decides everything; the same seed replays the same run, event by event.
`python -m tests.sim --seeds 1000` runs many, `--seed N --trace` shows one.
"""

import logging
from collections.abc import MutableMapping
from typing import Any

import structlog


def _judge(logger: Any, method: str, event: MutableMapping[str, Any]) -> Any:
    """What nodes log is in a run's trace; but a listener that raised is a fault of the code."""
    if event["event"] == "listener.failed":
        raise AssertionError(f"a listener failed: {event['error']}")
    raise structlog.DropEvent


structlog.configure(
    wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR), processors=[_judge]
)
