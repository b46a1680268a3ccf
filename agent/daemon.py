"""The composition root: builds the parts of an agent, starts them in order, stops them in turn.

Order: state from disk, kernel as it should be from that alone (so that a restart mends before
it talks), peers, name server, and last the socket for users, so that who is answered is
answered by something whole. On the way down the kernel and the name server are left as they
are: traffic and names go on while the agent is away.
What stands opposite: cli/agent.py, which starts it; thisnode.py says what this node is and
serving.py listens for users.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import os
import random
import secrets
import signal
import sys
import time
from pathlib import Path

import structlog

from agent import restart, store
from agent.api.control import Control
from agent.api.front import SOCKET
from agent.api.metrics import Metrics, Sources
from agent.api.watch import Watchers
from agent.cluster.detector import Detector
from agent.cluster.identity import establish as identities
from agent.cluster.identity.administration import Administration
from agent.cluster.identity.files import ANEW, Files
from agent.cluster.identity.service import Identity
from agent.cluster.identity.tokens import Token
from agent.cluster.identity.users import Users
from agent.cluster.pathprober import PathProber
from agent.cluster.peers import Peers
from agent.cluster.server import check_port, split_address
from agent.cluster.signing import seal_records
from agent.cluster.tunnelprober import TunnelProber
from agent.config import CERT_LIFE, Settings, parse_duration
from agent.core.membership import PRESETS
from agent.core.tunnels import Turn
from agent.datapath import sandbox
from agent.datapath.guardrules import REASONS
from agent.datapath.guests import Guests
from agent.datapath.probetunnel import ProbeTunnel
from agent.datapath.reconciler import Reconciler
from agent.datapath.refusals import Refusal
from agent.datapath.repairs import KINDS, Repair
from agent.datapath.underlay import device_of
from agent.datapath.wireguard import check_supported
from agent.departures import Departures
from agent.drains import Drains
from agent.encryption import Encryption, can_encrypt
from agent.errors import VxmeshError
from agent.feed import ToResolver
from agent.health import HealthChecker
from agent.keys import WireguardKeys
from agent.listeners import ToKernel, ToStore
from agent.logs import configure
from agent.model import Node
from agent.node import NodeState
from agent.offences import Offences
from agent.operations import Operations
from agent.pathwatch import PathWatch, keep_known
from agent.plan import Plan
from agent.remote.client import Plugins
from agent.remote.driver import RemoteDriver
from agent.remote.ipam import RemoteIpam
from agent.remote.ledger import Ledger
from agent.remote.undoing import Undoer
from agent.serviceops import ServiceOperations
from agent.serving import free_socket, serve_cni, serve_control, serve_docker, serve_metrics
from agent.syscalls import raise_file_limit
from agent.thisnode import Carrier, describe_node, watch_underlay
from agent.watcher import Watcher

log = structlog.get_logger()

# A Python process with 100,000 endpoints has a million objects that live on; looking through
# them for cycles at the default rate stalls the loop for 100 ms and more at a time.
GC_THRESHOLDS = (50_000, 50, 1_000)
# s; the datapath's threads hold the interpreter while they pack rows: with the default of 5 ms
# the loop would wait for each of them that long.
SWITCH_INTERVAL = 0.0005
PROGRESS_INTERVAL = 1.0  # s
CATCH_UP_WITHIN = 10.0  # s; then what peers did not tell counts as gone
SPREAD_WITHIN = 5.0  # s; for all live nodes to know that a join token is void
ANSWERED_WITHIN = 0.2  # s; what is left of a call when the node has left
TUNNELS_EVERY = 6  # path intervals between two looks at how frames come through VXLAN
NETNS = "netns"  # below the run directory: the namespace that holds bridges and VXLAN devices


def main(settings: Settings, reset_state: bool) -> None:
    """Run an agent until SIGTERM or SIGINT. VxmeshError says what keeps it from starting."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    configure(settings.log_level, settings.log_format)
    if os.geteuid() != 0:
        raise VxmeshError("the agent", "needs root to change the kernel", "Start it as root")
    raise_file_limit()
    gc.set_threshold(*GC_THRESHOLDS)
    sys.setswitchinterval(SWITCH_INTERVAL)
    asyncio.run(run(settings, reset_state))


async def run(settings: Settings, reset_state: bool) -> None:
    """Build an agent, run it until it is told to stop, and take it apart."""
    run_dir, state_dir = Path(settings.run_dir), Path(settings.state_dir)
    socket = await free_socket(run_dir / SOCKET)
    files = Files(state_dir)
    token = identities.read_token(settings.token, settings.token_file)
    if reset_state:
        _check_joins(settings, token)
        for aside in (store.reset(state_dir), files.set_aside()):
            if aside:
                log.warning("state.reset", aside=str(aside))
    elif not files.exists():
        _check_joins(settings, token)
    async with contextlib.AsyncExitStack() as stack:
        disk = store.Store(state_dir)
        stack.push_async_callback(disk.close)
        boot = restart.BOOT_ID.read_text().strip()
        life = restart.begin(disk, boot, lambda: _new_id(files))
        keys = WireguardKeys(state_dir, life.node, settings.wireguard_port, time.time)
        check = functools.partial(check_supported, settings.wireguard)
        if await can_encrypt(check):
            keys.ensure()
            me = await describe_node(settings, life, keys.records())
        else:
            me = await describe_node(settings, life)
        check_port(me.address, me.port)  # before anything is changed in the kernel
        identity = await _establish(settings, token, files, me, disk)
        me = identity.describe(me)
        node = NodeState(me, time.time, random.SystemRandom())
        node.monotonic = time.monotonic
        seal_records(node, identity.keyring)
        restart.recall(node, disk, life)
        me = keep_known(me, node)
        identity.attach(node)
        ending: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def expelled(error: VxmeshError) -> None:
            # On disk, so that it does not hand out addresses again where nobody can tell it.
            disk.write(store.Batch(meta={"removed": error.why}))
            if not ending.done():
                ending.set_exception(error)

        node.on_expelled = expelled
        plan = Plan(node, keys.private)
        plan.is_complete = len(node.nodes) == 1  # alone: nobody knows more than this node
        peers: Peers | None = None

        def published() -> None:
            if peers:
                peers.wake()

        def applied(mark: object) -> None:
            node.kernel_has(mark)  # type: ignore[arg-type]
            if peers:
                peers.wake()

        def repaired(repair: Repair) -> None:
            names = [node.catalogue.name(id) for id in sorted(repair.networks)]
            node.tell(
                "drift.repaired",
                repair.describe(names),
                kind=repair.kind,
                count=str(repair.count),
                networks=",".join(names),
            )

        offences = Offences(node)

        def dropped(refusal: Refusal) -> None:
            offences.note(
                refusal.endpoint,
                refusal.spoofed,
                refusal.flooded,
                refusal.reasons,
                refusal.groups,
            )

        storing = ToStore(node, disk, published)
        stack.callback(storing.keep_peers)
        node.settle_conflicts(quietly=True)
        node.settle_services(quietly=True)
        kernel = Reconciler(
            plan,
            run_dir,
            on_applied=applied,
            on_repair=repaired,
            on_withheld=node.kernel_withholds,
            on_refusal=dropped,
            data_port=settings.data_port,
            wireguard=settings.wireguard,
            at_sockets=settings.socket_balancing == "auto",
            has_shortcuts=settings.shortcuts == "auto",
        )
        peers = Peers(
            node,
            me,
            secrets.token_hex(8),
            storing.durable,
            identity.keyring,
            run_dir,
            enrol=identity.desk.handlers(),
        )
        links = peers.links
        tuning = dataclasses.replace(PRESETS[settings.detection], agent_grace=settings.agent_grace)
        detector = Detector(node, tuning, me.incarnation, lambda: links, peers.dialer)
        peers.server.pings = detector
        peers.on_rumours = detector.take
        peers.on_link.append(detector.stream_changed)
        peers.live = detector.live
        detector.on_change.append(peers.membership_changed)
        operations = Operations(node, peers, kernel, storing.durable)
        kernel.on_port_gone = operations.lost_port
        operations.furnish = sandbox.set_up
        watcher = Watcher(node, operations.drop_sandbox)
        encryption = Encryption(
            node,
            keys,
            plan,
            kernel,
            check,
            operations.done,
            settings.wireguard_rotate,
        )
        operations.encrypter = encryption
        guests, plugins = Guests(), Plugins(settings.plugin_dir)
        undoer = Undoer(
            node,
            plugins,
            Ledger(state_dir / "plugins.json"),
            {"move_out": guests.move_out, "hide": guests.hide},
        )
        operations.remote = RemoteDriver(node, peers, plugins, undoer, guests)
        operations.ipam = ipam = RemoteIpam(node, plugins, undoer)
        operations.adopt()
        ToKernel(node, plan, kernel)
        node.describe(me)
        try:
            await kernel.start()
        except OSError as error:
            raise VxmeshError(
                "this host's kernel",
                f"cannot be prepared ({error})",
                "See whether another agent runs here with another --run-dir, and dmesg",
            ) from error
        stack.push_async_callback(kernel.stop)
        undoer.start()
        stack.push_async_callback(undoer.stop)
        ipam.start()
        stack.push_async_callback(ipam.stop)
        watcher.start()
        stack.callback(watcher.stop)
        checker = HealthChecker(node)
        checker.start()
        stack.push_async_callback(checker.stop)
        drains = Drains(node)
        drains.start()
        stack.callback(drains.stop)
        feed = ToResolver(node, run_dir, run_dir / NETNS, settings.name_server_workers)
        await feed.start()
        operations.names_settled = feed.settle
        stack.push_async_callback(feed.stop)
        await storing.durable()
        await peers.start([split_address(seed) for seed in settings.join])
        stack.push_async_callback(peers.stop)
        watch = PathWatch(node)
        every = settings.path_interval
        paths = PathProber(node, identity.keyring, every, watch.known(), watch.found)
        watch.narrow = paths.narrow
        await paths.start()
        stack.push_async_callback(paths.stop)

        async def turned(turns: list[Turn]) -> None:
            device = ""
            with contextlib.suppress(OSError):
                device = await device_of(me.vtep)
            watch.turned(turns, device)

        tunnels = TunnelProber(node, paths, TUNNELS_EVERY * every, turned)
        tunnels.start(ProbeTunnel(paths.take_frame))
        stack.push_async_callback(tunnels.stop)

        def underlay_changed() -> None:
            paths.hasten()
            tunnels.hasten()

        def cable_is_back() -> None:
            peers.redial()
            underlay_changed()

        carrier = Carrier(node, cable_is_back)
        stack.callback(carrier.close)
        await detector.start()
        stack.push_async_callback(detector.stop)
        await identity.start()
        stack.push_async_callback(identity.stop)
        if settings.mdns:
            from agent.cluster.discovery import Mdns  # zeroconf: 30 ms

            mdns = Mdns(me, peers.dial, identity.held.cluster)
            await mdns.start()
            stack.push_async_callback(mdns.stop)
        encryption.start()
        stack.push_async_callback(encryption.stop)
        watchers = Watchers(node, peers)
        stack.callback(watchers.close)
        streams, refused = peers.links, peers.refusals.counts
        sources = Sources(
            kernel_failures=lambda: len(kernel.failures()),
            peer_streams=lambda: len(streams),
            resolver=feed.counters,
            repair_kinds=KINDS,
            peer_refused=lambda: refused,
            refused=lambda: {**dict.fromkeys(REASONS, 0), **kernel.refused},
            records_refused=lambda: node.refused,
            health_checks=lambda: checker.count,
            connections=kernel.connections,
            paths=paths.measures,
            tunnels=tunnels.states,
        )
        metrics = Metrics(node, sources)
        detector.on_answered.append(metrics.probes.observe)
        await stack.enter_async_context(metrics.sampling())
        if settings.metrics_listen:
            await serve_metrics(metrics, settings.metrics_listen, stack)
        departures = Departures(
            node, operations, peers.consent, detector.leave, lambda: _end(ending)
        )

        async def spread() -> list[str]:
            version = node.replica.written()
            await storing.durable()
            return list(await peers.wait_applied(version, SPREAD_WITHIN))

        administration = Administration(identity, spread)
        control = Control(
            node,
            operations,
            departures,
            peers,
            feed,
            watchers,
            metrics,
            administration,
            encryption,
        )
        control.users = Users(identity, node)
        control.paths, control.tunnels = paths.measures, tunnels.states
        control.service_operations = ServiceOperations(node, peers, peers, operations.done)
        control.service_operations.ipam = ipam
        if settings.docker:
            services = control.service_operations
            await serve_docker(operations, settings, lambda: plan.is_complete, services, stack)
        await serve_cni(operations, settings, sandbox.see, stack)
        await serve_control(control, settings, node, identity.keyring, stack)
        catching_up = asyncio.create_task(_catch_up(peers, plan, kernel))
        stack.callback(catching_up.cancel)
        progress = asyncio.create_task(_report_progress(node, peers))
        stack.callback(progress.cancel)
        underlay = asyncio.create_task(watch_underlay(node, underlay_changed))
        stack.callback(underlay.cancel)
        gc.freeze()
        log.info("agent.ready", node=me.id, name=me.name, address=me.address, socket=str(socket))
        await _until_told(ending)
        log.info("agent.stopping", node=me.id)


def _check_joins(settings: Settings, token: Token | None) -> None:
    if settings.join and token is None:
        raise identities.no_token()
    if token and not (settings.join or settings.mdns):
        raise identities.no_seed()


def _new_id(files: Files) -> str:
    """For a state without a node. Beside an identity it is one that was lost: under that id it
    must not go on, as it may have owned addresses."""
    if files.exists():
        raise VxmeshError(
            f"state beside {files.directory}",
            f"is gone, which is of node {files.node()}",
            "Restore it from a backup. " + ANEW,
        )
    return secrets.token_hex(8)


async def _establish(
    settings: Settings, token: Token | None, files: Files, me: Node, disk: store.Store
) -> Identity:
    """What this node is: as its disk has it, of a new cluster, or got by the token."""
    life = parse_duration("setting cert_life", settings.cert_life, CERT_LIFE)
    if not files.exists() and not token and disk.load_peers():
        raise VxmeshError(
            f"identity {files.directory}",
            "is gone, and the state is of a node that was in a cluster",
            "Restore it from a backup. " + ANEW,
        )
    seeds = [split_address(seed) for seed in settings.join]
    async with contextlib.AsyncExitStack() as stack:
        find = None
        if settings.mdns and token:
            from agent.cluster.discovery import seen_on_lan

            find = await stack.enter_async_context(seen_on_lan(me))
        wish = identities.Wish(me.id, me.name, seeds, token, life, find)
        return Identity(files, await identities.establish(files, wish), life)


async def _report_progress(node: NodeState, peers: Peers) -> None:
    """While what others had before this node came is still on its way: how far that is."""
    most = 0
    while True:
        await asyncio.sleep(PROGRESS_INTERVAL)
        missing = max(0, peers.missing())
        most = max(most, missing)
        if missing:
            node.tell(
                "join.progress",
                f"{100 * (most - missing) // most} % of what the others know is here",
                missing=str(missing),
                of=str(most),
            )
        elif most:
            node.tell("join.done", "all that the others know is here", of=str(most))
            most = 0


async def _catch_up(peers: Peers, plan: Plan, kernel: Reconciler) -> None:
    """Only once it has heard from all does a restarted agent take rows away."""
    if plan.is_complete:
        return
    try:
        missing = await peers.catch_up(CATCH_UP_WITHIN)
        if missing:
            log.warning("peers.missing", nodes=missing, waited=CATCH_UP_WITHIN)
    finally:
        plan.is_complete = True
        kernel.touch_all()


def _end(ending: asyncio.Future[None]) -> None:
    """Stop as planned, once the answer to who asked for it is out."""

    def end() -> None:
        if not ending.done():
            ending.set_result(None)

    asyncio.get_running_loop().call_later(ANSWERED_WITHIN, end)


async def _until_told(ending: asyncio.Future[None]) -> None:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    ending.add_done_callback(lambda _: told.set())
    await told.wait()
    if ending.done():
        ending.result()  # raises why this node cannot go on, if it did not leave
