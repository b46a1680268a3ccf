"""Results as each version of the specification has them, and what CHECK reads out of them.

Source: CNI specification 1.1, section 5; its versions 0.3.1 and 0.4.0 for the older form.
What stands opposite: config.py; api/cni/attachments.py, whose answers are rendered here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent import cnimodel as cni
from agent.cnimodel import CniError


def versions(asked: str) -> dict[str, Any]:
    """The answer to VERSION."""
    return {"cniVersion": asked, "supportedVersions": list(cni.VERSIONS)}


def added(
    version: str, config: Mapping[str, Any], ifname: str, netns: str, made: Mapping[str, Any]
) -> dict[str, Any]:
    """The result of an ADD: what the agent made, after what plugins before us did."""
    previous = config.get("prevResult") or {}
    interfaces = list(previous.get("interfaces") or [])
    interface = {"name": ifname, "mac": made["mac"], "sandbox": netns}
    if version == "1.1.0":
        interface["mtu"] = made["mtu"]
    ips = []
    for address in made["addresses"]:
        ip = {"address": address, "interface": len(interfaces)}
        if version in ("0.3.1", "0.4.0"):
            ip["version"] = "6" if ":" in address else "4"
        gateway = _of_family(made["gateways"], address)
        ips.append({**ip, "gateway": gateway} if gateway else ip)
    return {
        "cniVersion": version,
        "interfaces": [*interfaces, interface],
        "ips": [*(previous.get("ips") or []), *ips],
        "routes": [*(previous.get("routes") or []), *made["routes"]],
        "dns": _dns(made["dns"], previous.get("dns") or {}, config.get("dns") or {}),
    }


def _of_family(gateways: list[str], address: str) -> str:
    return next((g for g in gateways if (":" in g) == (":" in address)), "")


def _dns(ours: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """Ours, but for what the plugins before us or the configuration say otherwise."""
    found = dict(ours)
    for other in others:
        found |= {key: value for key, value in other.items() if value}
    return {key: value for key, value in found.items() if value}


def expected(config: Mapping[str, Any], ifname: str, netns: str) -> dict[str, Any]:
    """What CHECK is to find, by the result of the ADD: mac, addresses, routes.

    BAD_CONFIG if that result is missing, or is not of this attachment.
    """
    previous = config.get("prevResult")
    if not previous:
        raise CniError(cni.BAD_CONFIG, "prevResult is missing, which CHECK compares with")
    interfaces = previous.get("interfaces") or []
    index = next(
        (
            i
            for i, it in enumerate(interfaces)
            if (it.get("name"), it.get("sandbox")) == (ifname, netns)
        ),
        None,
    )
    if index is None:
        raise CniError(cni.BAD_CONFIG, f"prevResult has no interface {ifname} in {netns}")
    ips = previous.get("ips") or []
    return {
        "mac": str(interfaces[index].get("mac") or "").lower(),
        "addresses": [str(ip.get("address")) for ip in ips if ip.get("interface") == index],
        "routes": [str(route.get("dst")) for route in previous.get("routes") or []],
    }
