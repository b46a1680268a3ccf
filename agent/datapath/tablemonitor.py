"""Whether somebody else changes a nftables table of ours in one namespace.

The kernel tells each change of a transaction, and at its end the name of the thread that made
it: that of ours is THREAD (see nftables.py), which nobody else has.
What stands opposite: nftables.py, which looks and loads. Source: Linux
net/netfilter/nf_tables_api.c (nf_tables_gen_notify), linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agent.datapath.monitor import RECEIVE_BUFFER, Listener
from agent.datapath.nftables import THREAD
from agent.datapath.packing import ATTRIBUTE, HEADER, messages

NETLINK_NETFILTER, NFNLGRP_NFTABLES = 12, 7
NEWGEN = 0x0A0F  # NFNL_SUBSYS_NFTABLES and NFT_MSG_NEWGEN: a transaction is done
NFTA_GEN_PROC_NAME = 3
_OURS = (b"vxmesh\0", b"vxmesh_sealed\0", b"vxmesh_balance\0")


class TableMonitor(Listener):
    """Listens in one namespace."""

    def __init__(
        self, netns: str | Path, changed: Callable[[], None], buffer: int = RECEIVE_BUFFER
    ) -> None:
        """Call `changed` when somebody else changed the table, or events were lost."""
        super().__init__(netns, NETLINK_NETFILTER, changed)
        self._changed = changed
        self._touched = False  # by the transaction that is being told
        self._start((NFNLGRP_NFTABLES,), buffer)

    def _handle(self, received: list[bytes]) -> None:
        heard = False
        for data in received:
            for offset, kind in messages(data):
                length = HEADER.unpack_from(data, offset)[0]
                message = data[offset : offset + length]
                if kind != NEWGEN:
                    self._touched = self._touched or any(name in message for name in _OURS)
                    continue
                heard = heard or (self._touched and _who(message) != THREAD)
                self._touched = False
        if heard:
            self._changed()


def _who(message: bytes) -> str:
    """The name of the thread whose transaction it was; empty if the kernel does not say."""
    at = 20
    while at + 4 <= len(message):
        size, kind = ATTRIBUTE.unpack_from(message, at)
        if size < 4:
            break
        if kind == NFTA_GEN_PROC_NAME:
            return message[at + 4 : at + size].rstrip(b"\0").decode(errors="replace")
        at += (size + 3) & ~3
    return ""
