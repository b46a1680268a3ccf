"""The sockets on which this agent answers users: which are free, and who listens on them.

They come last, so that who is answered is answered by something whole.
What stands opposite: daemon.py, which builds what is served; api/server.py and metricserver.py,
which answer; `vxmesh` and the scrapers of metrics, which ask.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from cryptography import x509

from agent import cnimodel
from agent.api.cni.attachments import Attachments, See
from agent.api.cni.server import CniServer
from agent.api.control import Control
from agent.api.metrics import Metrics
from agent.api.refusals import Refusals
from agent.api.server import ControlServer
from agent.cluster.trust import Keyring, check_issued
from agent.config import Settings, parse_listen
from agent.datapath.firewall import let_through
from agent.errors import Conflict
from agent.node import NodeState
from agent.operations import Operations
from agent.serviceops import ServiceOperations


async def free_socket(path: Path) -> Path:
    """`path`, with a dead agent's socket removed; Conflict if a living one answers there."""
    await asyncio.to_thread(_make_run_dir, path.parent)
    try:
        _, writer = await asyncio.open_unix_connection(str(path))
    except FileNotFoundError:
        return path
    except OSError:
        await asyncio.to_thread(path.unlink, missing_ok=True)
        return path
    writer.close()
    raise Conflict(
        f"socket {path}", "is another agent's", "Stop that one, or give another --run-dir"
    )


def _make_run_dir(directory: Path) -> None:
    """Whoever may use a socket has to get at it; what is root's alone has a mode of its own."""
    if not directory.exists():
        directory.mkdir(parents=True)
        directory.chmod(0o755)  # whatever the umask


async def serve_control(
    control: Control,
    settings: Settings,
    node: NodeState,
    keyring: Keyring,
    stack: contextlib.AsyncExitStack,
) -> None:
    """Listen on the socket for users, and on `control_listen` if it is set."""
    refusals = Refusals(node)
    stack.callback(refusals.close)
    groups = settings.change_group, settings.read_group
    server = ControlServer(control, Path(settings.run_dir), groups, refusals.note)
    stack.push_async_callback(server.stop)
    if settings.control_listen:  # first: who connects the socket finds all of it there

        def believed(certificate: x509.Certificate) -> None:
            check_issued(certificate, keyring.current.authorities)

        address = parse_listen(settings.control_listen, "control_listen")
        tls = await server.listen(*address, keyring.control_context, believed)
        keyring.on_change.append(tls.recheck)
    await server.start()


async def serve_cni(
    operations: Operations, settings: Settings, see: See, stack: contextlib.AsyncExitStack
) -> None:
    """Answer the CNI plugin, which runtimes of this host start. `see` looks into a sandbox."""
    path = Path(settings.run_dir, Path(cnimodel.SOCKET).name)
    server = CniServer(Attachments(operations, see), path)
    await server.start()
    stack.push_async_callback(server.stop)


async def serve_docker(
    operations: Operations,
    settings: Settings,
    is_complete: Callable[[], bool],
    services: ServiceOperations,
    stack: contextlib.AsyncExitStack,
) -> None:
    """Be a network plugin of this host's Docker engine, and keep its networks the cluster's.

    `is_complete`: whether this node has heard of all that the others know.
    """
    from agent.api.docker.bindings import Bindings
    from agent.api.docker.driver import Driver
    from agent.api.docker.engine import Engine
    from agent.api.docker.ipam import Ipam
    from agent.api.docker.keeping import Keeper
    from agent.api.docker.labelled import Labelled
    from agent.api.docker.mirror import Mirror
    from agent.api.docker.server import DockerPlugin  # aiohttp takes 0.2 s to import

    keeper = Keeper(Path(settings.state_dir))
    bindings, ipam = Bindings(Path(settings.state_dir)), Ipam(operations, keeper)
    plugin = DockerPlugin(Driver(operations.node, operations, bindings, ipam), ipam)
    await plugin.start()
    stack.push_async_callback(plugin.stop)
    engine = await stack.enter_async_context(Engine(Path(settings.docker_socket)))
    mirror = Mirror(operations, bindings, engine, keeper, is_complete, let_through)
    mirror.start()
    stack.push_async_callback(mirror.stop)
    labelled = Labelled(operations.node, services)
    labelled.start()
    stack.push_async_callback(labelled.stop)


async def serve_metrics(metrics: Metrics, where: str, stack: contextlib.AsyncExitStack) -> None:
    """Hand the metrics out over HTTP at `where`."""
    from agent.api.metricserver import MetricServer  # aiohttp takes 0.2 s to import

    server = MetricServer(metrics)
    await server.start(*parse_listen(where, "metrics_listen"))
    stack.push_async_callback(server.stop)
