"""Deletes all that bears our mark on a host, whether an agent runs or not.

What stands opposite: reconciler.py, which makes it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from agent.datapath import entrance, firewall, lans, namespaces, nft, wireguard
from agent.datapath.netlink import Netlink
from agent.datapath.nft import HOST_UPLINK
from agent.datapath.nftables import Nftables
from agent.datapath.sandbox import MARK
from agent.datapath.uplink import MARK as UPLINK_MARK


async def remove_everything(netns: Path, host_netns: str) -> None:
    """Our namespace at `netns` with all in it, our end of the uplink, our rules and routes.

    Devices without our mark stay, those in our namespace included: the kernel gives a physical
    one back to the host when the namespace ends. IP forwarding stays on: others may rely on it.
    """
    if namespaces.is_network_namespace(netns):
        async with Netlink(netns) as own:
            for link in await own.links():
                if link.alias.startswith(MARK):
                    await own.delete_link(link.index)
    namespaces.remove(netns)
    async with Netlink(host_netns) as host:
        uplink = await host.link(HOST_UPLINK)
        if uplink and uplink.alias == UPLINK_MARK:
            await host.delete_link(uplink.index)  # the routes through it go with it
        await lans.remove_all(host)
        await wireguard.remove_all(host, host_netns, netns.parent)
    await asyncio.to_thread(firewall.take_out, host_netns)
    for name in (nft.TABLE, nft.SEALED, *entrance.TABLES.values()):
        table = Nftables(host_netns, table=name)
        try:
            await table.remove()
        finally:
            table.close()
