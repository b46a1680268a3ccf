"""The host driver: a workload in the node's own stack, which is left as it is.

It has no interface and no address of its own: what it listens on is the node's.
What stands opposite: datapath/sandbox.py, which finds nothing to do.
"""

from __future__ import annotations

from agent.drivers.base import Stack
from agent.model import Sandbox


def stack(sandbox: Sandbox) -> Stack:
    """What a sandbox holds whose workload is in this network: nothing of ours."""
    return Stack(sandbox.netns, sandbox.inode, up=())
