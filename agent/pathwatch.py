"""What follows from the paths that this node measured: its record, and what operators are told.

A path that is too narrow is stated in the node's own record; from all nodes' records follows the
MTU of each network, on every host the same (drivers/overlay.py).
What stands opposite: cluster/pathprober.py, which measures; plan.py, which heeds the record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from agent.core.bounds import NARROW_MAX
from agent.core.pathmtu import State
from agent.core.paths import Found
from agent.core.tunnels import Tunnel, Turn
from agent.drivers import overlay
from agent.model import OVERLAY, Narrow, Node
from agent.node import NodeState


def keep_known(me: Node, node: NodeState) -> Node:
    """This node's record at its start, with what its last life found narrow: until that is
    measured again it is the best that is known."""
    return msgspec.structs.replace(me, narrow=node.nodes[node.me].narrow)


class PathWatch:
    """Of one node. `narrow` gives what fits through its paths that are too narrow, by node."""

    def __init__(self, node: NodeState) -> None:
        self.narrow: Callable[[], Mapping[str, int]] = dict
        self._node = node
        self._told: dict[str, int] = {n.node: n.mtu for n in node.nodes[node.me].narrow}

    def known(self) -> dict[str, int]:
        """What the last life found narrow, by node."""
        return {path.node: path.mtu for path in self._node.nodes[self._node.me].narrow}

    def found(self, changes: Sequence[Found]) -> None:
        """Paths are not what they were, or there are fewer."""
        self._told = {id: mtu for id, mtu in self._told.items() if id in self._node.nodes}
        self._state()
        for change in changes:
            self._tell(change)

    def turned(self, turns: Sequence[Turn], device: str) -> None:
        """Frames through VXLAN come otherwise than they did. `device` is the host's interface by
        which they leave."""
        node, me = self._node, self._node.nodes[self._node.me]
        for id, before, after in turns:
            name = node.node_name(id)
            fields = {"node": id, "name": name, "device": device}
            if after is Tunnel.CHECKSUMS:
                node.tell(
                    "tunnel.checksums",
                    f"what {me.name} sends to {name} through VXLAN comes with wrong checksums, or "
                    f"not at all, where {device} is to compute them: TCP in networks stands still. "
                    f"Run 'ethtool -K {device} tx off' on {me.name}",
                    **fields,
                )
            elif after is Tunnel.BLOCKED:
                node.tell(
                    "tunnel.blocked",
                    f"nothing that {me.name} sends to {name} through VXLAN comes, though the "
                    f"agents reach each other. Let UDP port {me.data_port} through between them",
                    **fields,
                )
            elif before is not Tunnel.UNKNOWN:
                node.tell(
                    "tunnel.mended",
                    f"what {me.name} sends to {name} through VXLAN comes as it should again",
                    **fields,
                )

    def _state(self) -> None:
        """Put into this node's record what is narrow, if that says something else."""
        me = self._node.nodes[self._node.me]
        held = [(mtu, id) for id, mtu in self.narrow().items() if id in self._node.nodes]
        chosen = sorted(held)[:NARROW_MAX]
        paths = tuple(Narrow(id, mtu) for id, mtu in sorted((id, mtu) for mtu, id in chosen))
        if paths != me.narrow:
            self._node.describe(msgspec.structs.replace(me, narrow=paths))

    def _concerned(self, other: str) -> dict[str, int]:
        """The MTUs, by name, of the overlay networks whose frames go over the path to a node."""
        node, found = self._node, {}
        for network in node.present_networks():
            members = node.partakers(network.id)
            if network.driver == OVERLAY and {node.me, other} <= members:
                mtu = overlay.mtu(network, node.nodes.values(), members)
                found[node.catalogue.name(network.id)] = mtu
        return found

    def _tell(self, change: Found) -> None:
        """An event, if the path became narrow, more or less so, or is whole again."""
        after, id = change.after, change.node
        is_narrower = after.state is State.NARROW and self._told.get(id) != after.mtu
        if not is_narrower and not (after.state is State.WHOLE and id in self._told):
            return  # as of nearly all, and whom it concerns takes a look at every network
        name, mine = self._node.node_name(id), self._node.node_name(self._node.me)
        fields = {"node": id, "name": name, "mtu": str(after.mtu), "expected": str(after.expected)}
        concerned = self._concerned(id)
        fields["networks"] = ",".join(sorted(concerned))
        now = "; ".join(f"{n} has an MTU of {mtu}" for n, mtu in sorted(concerned.items()))
        if is_narrower:
            self._told[id] = after.mtu
            self._node.tell(
                "path.narrow",
                f"path from {mine} to {name} takes packets of {after.mtu} bytes, and should take "
                f"{after.expected}" + (f"; {now}" if now else "") + f". Let {after.expected} bytes "
                f"through between them, or give the interface of one an MTU of {after.mtu}",
                **fields,
            )
        else:
            del self._told[id]
            self._node.tell(
                "path.mended",
                f"path from {mine} to {name} takes packets of {after.mtu} bytes again"
                + (f"; {now}" if now else ""),
                **fields,
            )
