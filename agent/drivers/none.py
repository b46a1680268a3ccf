"""The none driver: a workload's stack with loopback alone.

There is no network behind it: no endpoint, no address, no name.
What stands opposite: datapath/sandbox.py makes it so.
"""

from __future__ import annotations

from agent.drivers.base import Stack
from agent.model import Sandbox


def stack(sandbox: Sandbox) -> Stack:
    """What a sandbox holds whose workload is in this network."""
    return Stack(sandbox.netns, sandbox.inode, up=("lo",))
