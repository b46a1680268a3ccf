"""When a cable is back: devices of the host that come up, or get their carrier again.

What stands opposite: the daemon, which then makes haste. Source: rtnetlink(7).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from pathlib import Path

from agent.datapath.linkstate import (
    IFF_LOWER_UP,
    IFF_UP,
    RTM_DELLINK,
    RTM_NEWLINK,
    read_link,
)
from agent.datapath.monitor import RECEIVE_BUFFER, Listener
from agent.datapath.packing import HEADER
from agent.drivers.wireguard import DEVICES

RTNLGRP_LINK = 1
_LINK_INFO = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change


class CarrierMonitor(Listener):
    """Devices of one namespace that come up, or get their carrier back."""

    def __init__(
        self, netns: str | Path, up: Callable[[], None], buffer: int = RECEIVE_BUFFER
    ) -> None:
        """Call `up` when one did, or events were lost."""
        super().__init__(netns, socket.NETLINK_ROUTE, up)
        self._up = up
        self._running: dict[int, bool] = {}
        self._start((RTNLGRP_LINK,), buffer)

    def _handle(self, received: list[bytes]) -> None:
        came = False
        for data in received:
            _, kind, _, _, _ = HEADER.unpack_from(data)
            if kind not in (RTM_NEWLINK, RTM_DELLINK):
                continue
            family, _, index, flags, _ = _LINK_INFO.unpack_from(data, 16)
            if family != socket.AF_UNSPEC:
                continue  # what a bridge says of its ports
            now = kind == RTM_NEWLINK and flags & (IFF_UP | IFF_LOWER_UP) == IFF_UP | IFF_LOWER_UP
            # A device is told of again and again; only the first event after it was down counts.
            came = came or (now and not self._running.get(index, True) and not _is_ours(data))
            self._running[index] = now
            if kind == RTM_DELLINK:
                del self._running[index]
        if came:
            self._up()


def _is_ours(data: bytes) -> bool:
    """Whether a device is WireGuard's for us: it comes up whenever it is made, and is no cable."""
    return read_link(data).name in DEVICES
