"""An event loop for a command whose agent is not of this host: for gRPC's own library."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

# Read when gRPC is loaded, which is after this. It would start its threads again in a forked child,
# and a process with threads cannot move into another mount namespace: `vxmesh exec` forks for that.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
import agent.clientgrpc  # noqa: E402, F401 - a client would load it only when it first calls


def run_until_interrupted(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end. KeyboardInterrupt at SIGINT.

    asyncio.run's own handler is not enough: a signal that comes just before the loop waits for
    its files does not end that wait, and a quiet stream (`events --follow`) would never be told.
    """
    interrupted = False

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            task.cancel()

        # Whoever started us may want it ignored, and only a main thread can handle it.
        if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
            with contextlib.suppress(ValueError, RuntimeError):
                asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt)
        return await coroutine

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        if interrupted:
            raise KeyboardInterrupt from None
        raise
