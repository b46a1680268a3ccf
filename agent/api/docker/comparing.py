"""What an engine's networks lack of what the cluster has, and have too much. Pure.

Wanted: a network in the engine for each of ours that some engine's user made (it bears NAME).
Actual: the engine's own list, and which of ours each is bound to. Nothing follows from what was
done before, so to be told twice, or late, is no matter.
What stands opposite: mirror.py, which asks the engine and does what is found here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.api.docker.bindings import Bound
from agent.api.docker.bodies import FOLLOWS, ID, NETWORK
from agent.errors import Invalid
from agent.model import OVERLAY, Network
from agent.notation import LABEL_BYTES_MAX, LABELS_MAX, parse_labels

PLUGIN = "vxmesh"  # as engines call us
NAME = "docker.network"  # label of ours: what engines call it; such a network is on all hosts
SHORT = 6  # of an id behind a name that another network of the engine has


@dataclass
class Steps:
    """What is to be done, in this order. Docker's ids are the engine's, the others ours."""

    gone: list[str] = field(default_factory=list)  # ours: the engine's user removed it unheard
    forget: list[str] = field(default_factory=list)  # Docker's: bindings of nothing
    bind: dict[str, Bound] = field(default_factory=dict)  # Docker's id -> what it says it is
    remove: list[str] = field(default_factory=list)  # Docker's: ours is gone
    stale: dict[str, str] = field(default_factory=dict)  # Docker's id, of none -> ours made for it
    tell: dict[str, dict[str, Any]] = field(default_factory=dict)  # ours -> the engine's network
    create: list[tuple[Network, str]] = field(default_factory=list)  # and what to call it


def compare(
    listed: Iterable[Mapping[str, Any]],
    bound: Mapping[str, Bound],
    ours: Mapping[str, Network],
    *,
    me: str,
    settled: Collection[str],
    destroyed: Collection[str],
    complete: bool,
) -> Steps:
    """`listed` are all of the engine's networks as its API tells, `ours` those of the cluster.

    `me` is this node's id. `settled`: the bindings that the engine has had time to list;
    `destroyed`: what it says it removed. Unless `complete`, this node may not
    have heard of all networks yet.
    """
    steps = Steps()
    every = {str(n["Id"]): n for n in listed}
    taken = {str(n["Name"]) for n in every.values()}
    there = {id: n for id, n in every.items() if n.get("Driver") == PLUGIN}
    means = dict(bound)
    made_for = {n.labels[ID]: n.id for n in ours.values() if ID in n.labels}
    for id, network in there.items():
        options = network.get("Options") or {}
        if id not in means and id in made_for:  # what was bound was lost
            means[id] = steps.bind[id] = Bound(made_for[id], made=True)
        elif id not in means and (tied := _find(ours, options.get(NETWORK, ""))):
            means[id] = steps.bind[id] = Bound(tied, bool(options.get(FOLLOWS)))
    for id, held in bound.items():
        if id not in there and (id in settled or id in destroyed):
            steps.forget.append(id)
            if held.made and id in destroyed and held.network in ours:
                steps.gone.append(held.network)
    for id, made in made_for.items():
        # The agent or the engine was killed in between; with NAME it is all hosts' by now.
        if id not in means and ours[made].creator == me and NAME not in ours[made].labels:
            steps.stale[id] = made
    has: set[str] = set()
    for id, network in there.items():
        options = network.get("Options") or {}
        means_what = means[id].network if id in means else options.get(NETWORK, "")
        if means_what in ours:
            has.add(means_what)
            if id in means and means[id].made and NAME not in ours[means_what].labels:
                steps.tell[means_what] = dict(network)
        elif means_what and complete:
            steps.remove.append(id)
            taken.discard(str(network["Name"]))
    # Such as the engine is making at this moment.
    has.update(held.network for id, held in means.items() if id not in steps.forget)
    for id in sorted(ours.keys() - has - set(steps.gone)):
        name = ours[id].labels.get(NAME)
        if name and ours[id].driver == OVERLAY and not ours[id].ipam:
            name = f"{name}-{id[:SHORT]}" if name in taken else name
            if name not in taken:
                steps.create.append((ours[id], name))
                taken.add(name)
    return steps


def _find(ours: Mapping[str, Network], ref: str) -> str:
    """The network (id) that an option names: by id, name or prefix of one id; empty: none."""
    if not ref or ref in ours:
        return ref
    named = [id for id, network in ours.items() if network.name == ref]
    begun = [id for id in ours if id.startswith(ref)]
    return named[0] if named else begun[0] if len(begun) == 1 else ""


def body_of(network: Network, name: str) -> dict[str, Any]:
    """The request by which an engine makes its network that stands for ours."""
    pairs = zip(network.subnets, network.gateways, strict=True)
    labels = {k: v for k, v in network.labels.items() if k not in (NAME, ID)}
    return {
        "Name": name,
        "CheckDuplicate": True,
        "Driver": PLUGIN,
        "Internal": network.internal,
        "EnableIPv6": any(":" in subnet for subnet in network.subnets),
        "Labels": labels,
        "Options": {NETWORK: network.id, FOLLOWS: "true"},
        "IPAM": {
            "Driver": PLUGIN,
            "Options": {NETWORK: network.id},
            "Config": [{"Subnet": subnet, "Gateway": gateway} for subnet, gateway in pairs],
        },
    }


def labels_of(network: Mapping[str, Any]) -> dict[str, str]:
    """The labels of ours that stands for an engine's network: its name, and its own as far as
    they are such as ours may be."""
    found = {NAME: str(network["Name"])[:LABEL_BYTES_MAX], ID: str(network["Id"])}
    for key, value in (network.get("Labels") or {}).items():
        try:
            if key not in found:  # of these two nobody else has a say
                found |= parse_labels({str(key): str(value)})
        except Invalid:
            continue
        if len(found) == LABELS_MAX:
            break
    return found
