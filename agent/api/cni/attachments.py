"""Attachments, as CNI calls them: an interface of a container, known by that one's id and its name.

Each is an endpoint of ours, and its labels say which: so it is found again after a restart of the
agent, and whatever became of the namespace and of the configuration.
Source: CNI specification 1.1, section 2. Opposite: server.py (the socket), agent/operations.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec

from agent import cnimodel as cni
from agent.cnimodel import CniError
from agent.core.waysout import reached
from agent.drivers.base import Seen
from agent.errors import (
    Conflict,
    Exhausted,
    InUse,
    Invalid,
    NotFound,
    Timeout,
    Unavailable,
    VxmeshError,
)
from agent.lanmodel import is_on_lan
from agent.model import Endpoint, Network, Sandbox
from agent.notation import format_address, parse_alias, parse_name
from agent.operations import Operations
from agent.requests import EndpointSpec, parse_endpoint, parse_publish
from agent.workload import identify

# Labels of endpoints: the name of the network configuration, and whose interface it is.
CONFIG, CONTAINER, IFNAME = "cni.network", "cni.container", "cni.ifname"
SHORT = 12  # characters of an id that a runtime has made
ID_LENGTH = 64  # of such an id
ON_LINK = ("0.0.0.0", "::")

See = Callable[[str, int, str], Awaitable[Seen | None]]
"""An interface by the path and inode of its namespace and its name; None if it is not there."""


class Port(msgspec.Struct, forbid_unknown_fields=True):
    """A port of the host that is to lead to the container."""

    host: int
    target: int
    protocol: str = "tcp"
    address: str = ""


class Asked(msgspec.Struct, forbid_unknown_fields=True):
    """What the plugin asks; which of the fields there are depends on the command."""

    command: str
    config: str = ""
    container: str = ""
    ifname: str = ""
    network: str = ""
    netns: str = ""
    addresses: list[str] = []
    mac: str = ""
    names: list[str] = []
    aliases: list[str] = []
    labels: dict[str, str] = {}
    ports: list[Port] = []
    routes: list[str] = []
    valid: list[tuple[str, str]] = []


class Attachments:
    """Those of this node. Each method is a command and raises CniError."""

    def __init__(self, operations: Operations, see: See) -> None:
        self.node, self._operations, self._see = operations.node, operations, see
        self._turns: weakref.WeakValueDictionary[tuple[str, str], asyncio.Lock]
        self._turns = weakref.WeakValueDictionary()

    async def add(self, asked: Asked) -> dict[str, Any]:
        """Make an attachment; what the result is to say of it. Nothing is left if it fails."""
        async with self._turn(asked.container, asked.ifname):
            if self._find(asked.container, asked.ifname):
                raise CniError(
                    cni.TAKEN, f"{asked.ifname} of container {asked.container} is attached already"
                )
            network = self._network(asked.network)
            _check_namespace(asked.netns)
            with _told():
                spec = self._spec(network, asked)
                made = await self._operations.create_endpoint(
                    network.id, spec, asked.netns, asked.ifname
                )
            try:
                with _told():
                    await self._publish(network, made, asked.ports)
                return await self._describe(network, made)
            except BaseException:
                await asyncio.shield(asyncio.ensure_future(self._remove(made)))
                raise

    async def delete(self, asked: Asked) -> dict[str, Any]:
        """Take an attachment away; no error if there is none."""
        async with self._turn(asked.container, asked.ifname):
            found = self._find(asked.container, asked.ifname)
            if found:
                with _told():
                    await self._remove(found[1])
        return {}

    async def check(self, asked: Asked) -> dict[str, Any]:
        """NOT_AS_IT_SHOULD_BE says what of an attachment is not as its ADD left it."""
        what = f"{asked.ifname} of container {asked.container}"
        found = self._find(asked.container, asked.ifname)
        if found is None:
            raise CniError(cni.UNKNOWN_CONTAINER, f"{what} is not attached")
        sandbox, endpoint = found
        seen = await self._look(sandbox, asked.ifname)
        if seen is None:
            raise CniError(cni.NOT_AS_IT_SHOULD_BE, f"{what} is not in {sandbox.netns}")
        wrong = [] if seen.up else ["it is down"]
        if asked.mac and seen.mac != asked.mac:
            wrong.append(f"its MAC is {seen.mac}, not {asked.mac}")
        wrong += [f"it has no address {a}" for a in asked.addresses if a not in seen.addresses]
        wrong += [f"there is no route to {r}" for r in asked.routes if r not in seen.destinations]
        why = self.node.why_withheld([endpoint.network])
        if why:
            wrong.append(why)
        if wrong:
            raise CniError(cni.NOT_AS_IT_SHOULD_BE, f"{what}: {'; '.join(wrong)}")
        return {}

    async def status(self, asked: Asked) -> dict[str, Any]:
        """Whether an ADD in the network would be done; NOT_AVAILABLE or LIMITED if not."""
        try:
            self.node.check_stays()
            network = self.node.find_network(asked.network)
        except VxmeshError as error:
            raise CniError(cni.NOT_AVAILABLE, str(error)) from None
        why = self.node.why_withheld([network.id])
        if why:
            raise CniError(cni.LIMITED, f"network {asked.network} on this host: {why}")
        addresses = self.node.addresses.get(network.id)
        for family in addresses.families() if addresses else ():
            if addresses and addresses.usage(family).free == 0:
                usage = self.node.describe_usage(network.id, family)
                raise CniError(
                    cni.NOT_AVAILABLE, f"network {asked.network} has no free address: {usage}"
                )
        return {}

    async def collect(self, asked: Asked) -> dict[str, Any]:
        """Take away those of a configuration that are none of the valid ones; the rest of them
        too if one cannot be taken away."""
        valid = set(asked.valid)
        stale = [
            (endpoint.labels[CONTAINER], endpoint.labels.get(IFNAME, ""))
            for _, endpoint in self._all()
            if endpoint.labels.get(CONFIG) == asked.config
        ]
        failures = []
        for container, ifname in stale:
            if (container, ifname) not in valid:
                try:
                    await self.delete(Asked("DEL", container=container, ifname=ifname))
                except CniError as error:
                    failures.append(error)
        if failures:
            raise CniError(failures[0].code, "; ".join(error.details for error in failures))
        return {}

    # -- their parts --

    def _turn(self, container: str, ifname: str) -> asyncio.Lock:
        """One call at a time for each attachment: a runtime that was restarted may ask for its
        end while it is still being made."""
        key = container, ifname
        lock = self._turns.get(key)
        if lock is None:
            self._turns[key] = lock = asyncio.Lock()
        return lock

    def _all(self) -> Iterator[tuple[Sandbox, Endpoint]]:
        for sandbox in self.node.sandboxes.values():
            for id in sandbox.endpoints:
                endpoint = self.node.local_endpoint(id)
                if endpoint and CONTAINER in endpoint.labels:
                    yield sandbox, endpoint

    def _find(self, container: str, ifname: str) -> tuple[Sandbox, Endpoint] | None:
        for sandbox, endpoint in self._all():
            labels = endpoint.labels
            if labels[CONTAINER] == container and labels.get(IFNAME) == ifname:
                return sandbox, endpoint
        return None

    def _network(self, ref: str) -> Network:
        try:
            return self.node.find_network(ref)
        except VxmeshError as error:
            raise CniError(cni.BAD_CONFIG, str(error)) from None

    def _spec(self, network: Network, asked: Asked) -> EndpointSpec:
        """What the endpoint is to be. It is called as the pod, or else as the container, unless
        somebody else is called so already; then that is an alias, which may be shared."""
        short = asked.container[:SHORT] if len(asked.container) == ID_LENGTH else asked.container
        names = [name.lower() for name in (*asked.names, short) if _is_name(name)]
        key = f"{asked.container}/{asked.ifname}".encode()
        own = f"cni-{hashlib.sha256(key).hexdigest()[:SHORT]}"
        name = next((name for name in names if self._is_free(network, name)), own)
        aliases = [*names, *(parse_alias(alias) for alias in asked.aliases)]
        return parse_endpoint(
            name,
            addresses=asked.addresses,
            mac=asked.mac,
            aliases=[a for a in aliases if a != name and not self._is_services(network, a)],
            labels={
                **asked.labels,
                CONFIG: asked.config,
                CONTAINER: asked.container,
                IFNAME: asked.ifname,
            },
        )

    def _is_free(self, network: Network, name: str) -> bool:
        members = self.node.members.get(network.id)
        taken = bool(members and members.with_name(name))
        return not taken and not self._is_services(network, name)

    def _is_services(self, network: Network, name: str) -> bool:
        return bool(self.node.services.named(network.id, name))

    async def _publish(self, network: Network, made: Endpoint, ports: list[Port]) -> None:
        if not ports:
            return
        if is_on_lan(network):
            raise Invalid(
                "portMappings",
                f"have no use in network {network.name}: who is on its wire reaches the container "
                "at its own address",
                "Leave them out",
            )
        wanted = [parse_publish(p.host, p.target, p.protocol, p.address) for p in ports]
        self._operations.publish(made.id, wanted)
        await self._operations.done()

    async def _describe(self, network: Network, made: Endpoint) -> dict[str, Any]:
        found = self._find(made.labels[CONTAINER], made.labels[IFNAME])
        seen = await self._look(found[0], made.labels[IFNAME]) if found else None
        if found is None or seen is None:
            raise CniError(cni.TRY_AGAIN, "the interface went again as soon as it had been made")
        own = {format_address(address) for address in made.addresses}
        outside = () if network.internal else reached(network, made)
        return {
            "mac": seen.mac,
            "mtu": seen.mtu,
            "addresses": sorted((a for a in seen.addresses if a.partition("/")[0] in own), key=_v4),
            "gateways": [gateway for gateway in outside if gateway not in ON_LINK],
            "routes": [
                {"dst": to, "gw": via} if via else {"dst": to} for to, via in sorted(seen.routes)
            ],
            "dns": _dns(self._operations.resolv_conf(found[0])),
        }

    async def _look(self, sandbox: Sandbox, ifname: str) -> Seen | None:
        with contextlib.suppress(VxmeshError, OSError):  # the namespace is gone
            return await self._see(sandbox.netns, sandbox.inode, ifname)
        return None

    async def _remove(self, endpoint: Endpoint) -> None:
        with contextlib.suppress(NotFound):
            await self._operations.remove_endpoints([endpoint.id])


def _v4(address: str) -> bool:
    return ":" in address  # IPv4 first


def _is_name(text: str) -> bool:
    try:
        parse_name(text, "endpoint")
    except Invalid:
        return False
    return True


def _check_namespace(path: str) -> None:
    """UNKNOWN_CONTAINER if there is no namespace at `path`, BAD_ENVIRONMENT if it is no
    container's."""
    try:
        identify(path)
    except NotFound as error:
        raise CniError(cni.UNKNOWN_CONTAINER, f"CNI_NETNS: {error}") from None
    except VxmeshError as error:
        raise CniError(cni.BAD_ENVIRONMENT, f"CNI_NETNS: {error}") from None


def _dns(resolv_conf: str) -> dict[str, list[str]]:
    """What a resolv.conf says, as results have it."""
    found: dict[str, list[str]] = {"nameservers": [], "search": [], "options": []}
    for line in resolv_conf.splitlines():
        key, *values = line.split()
        found["nameservers" if key == "nameserver" else key] += values
    return found


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Our errors as a runtime's."""
    try:
        yield
    except VxmeshError as error:
        raise CniError(_code(error), str(error)) from None


def _code(error: VxmeshError) -> int:
    if isinstance(error, Invalid):
        return cni.BAD_CONFIG
    if isinstance(error, Conflict | InUse):
        return cni.TAKEN
    if isinstance(error, Exhausted):
        return cni.EXHAUSTED
    if isinstance(error, NotFound | Unavailable | Timeout):
        # Not found: what was there when it was looked for has gone meanwhile.
        return cni.TRY_AGAIN
    return cni.FAILED
