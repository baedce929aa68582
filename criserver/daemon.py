"""The whole daemon: it puts the rooms together, serves, and stops in order."""

from __future__ import annotations

import asyncio
import faulthandler
import fcntl
import gc
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

import grpc
import structlog

from criserver import __version__, upkeep
from criserver.api import admin_service, containerd_service, image_service, runtime_service
from criserver.api.grpc_server import ended, generic_handler, listen
from criserver.api.recovery_gate import pod_recovered
from criserver.config import Config
from criserver.errors import CriError, FailedPreconditionError
from criserver.images import ContentStore, Images, RegistrySettings, host_platform
from criserver.network import Network
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import apparmor, cadvisor_cgroup, cgroups, host, node_readings, recovery
from criserver.runtime.events import Events
from criserver.runtime.features import Features, probe
from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.node import Node
from criserver.runtime.nursery import Nursery
from criserver.runtime.oci_runtime import OciRuntime
from criserver.runtime.record_store import RecordStore
from criserver.runtime.service_manager import notify, report, report_interval
from criserver.stats import CgroupReaders, DiskMeter, NetworkCounters, Statistics
from criserver.store import Store
from criserver.streaming import StreamingServer
from criserver.telemetry import families
from criserver.upkeep import Task
from snapshotter import LayerLimits, Snapshotter, allocator, files
from snapshotter.threads import Threads

log = structlog.get_logger(__name__)

# Seconds that calls under way may still take when the daemon is told to stop.
STOP_GRACE = 5.0
CHECKPOINT_INTERVAL = 60.0
# Seconds between two syncs of new image content, and that the sync at the stop may take: see docs/decisions/0010*.
SYNC_INTERVAL = 30.0
SYNC_GRACE = 10.0


async def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Containers go on without the daemon.

    Raises FailedPreconditionError if another daemon uses the directories, and CriError if the host refuses something
    that the start needs or if a task fails that the daemon cannot work without.
    """
    began = time.monotonic()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.set_default_executor(Threads())
    upkeep.hear_the_rest()
    locks = [hold(directory) for directory in dict.fromkeys((config.root, config.state))]
    host.raise_open_files()
    metrics = _metrics(config)
    store = Store(os.path.join(config.root, "criserver.db"), os.path.join(config.state, "records"))
    snapshotter = Snapshotter(os.path.join(config.root, "snapshots"), limits=LayerLimits(**asdict(config.images)))
    runtimes = os.path.join(config.state, "runtimes")
    features = {h.name: await probe(OciRuntime.of(h, runtimes), snapshotter) for h in config.runtimes.values()}
    node = assemble(config, store, snapshotter, features)
    node_readings.read_from(node)
    cadvisor_cgroup.watch(node)
    try:
        await node.nursery.start()
        await apparmor.load()
        recovery.begin(node)
        await node.streaming.start()
        server = await listen(config.grpc_address, _services(node))
        # Objects of the start live as long as the daemon. The garbage collector need not examine them again.
        gc.collect()
        gc.freeze()
        log.info(
            "serving",
            version=__version__,
            address=config.grpc_address,
            sandboxes=len(node.records.sandboxes),
            containers=len(node.records.containers),
            seconds=round(time.monotonic() - began, 3),
        )
        notify("READY=1")
        node.background(_finish_recovery(node), "the end of recovery failed")
        try:
            await upkeep.keep([*_tasks(node, store, server), *metrics], stop)
        finally:
            log.info("stopping")
            notify("STOPPING=1")
            await server.stop(STOP_GRACE)
            await node.streaming.stop()
            await upkeep.finish(node.settle(), STOP_GRACE)
            await upkeep.finish(node.images.sync(), SYNC_GRACE)
    finally:
        for process in node.processes.values():
            process.abandon()
        await node.nursery.stop()
        node.stats.close()
        node.snapshotter.close()
        store.close()
        for lock in locks:
            os.close(lock)


async def _finish_recovery(node: Node) -> None:
    began = time.monotonic()
    await recovery.finish(node)
    seconds = time.monotonic() - began
    families.RECOVERY_DURATION.set(seconds)
    log.info("recovered", seconds=round(seconds, 3))
    await node.images.collect()


def assemble(
    config: Config,
    store: Store,
    snapshotter: Snapshotter,
    features: Mapping[str, Features],
    *,
    skip_unreadable: bool = False,
) -> Node:
    """Put the rooms together. :class:`RecordStore` says what ``skip_unreadable`` means, and what is raised."""
    records = RecordStore(store, skip_unreadable=skip_unreadable)
    return Node(
        config=config,
        records=records,
        events=Events(records),
        features=features,
        images=Images(
            store,
            ContentStore(os.path.join(config.root, "content")),
            snapshotter,
            RegistrySettings(
                config.registry_config_path,
                config.registry_auth_file,
                config.registry_max_downloads,
                config.registry_progress_timeout,
            ),
            host_platform(),
            note=os.path.join(config.root, "synced.json"),
        ),
        network=Network(conf_dir=config.cni_conf_dir, bin_dirs=config.cni_bin_dirs, timeout=config.cni_timeout),
        snapshotter=snapshotter,
        nursery=Nursery(),
        streaming=_streaming(config),
        stats=Statistics(
            CgroupReaders(cgroups.roots()),
            NetworkCounters(),
            DiskMeter(snapshotter.usage, lambda: _writable_layers(records)),
        ),
    )


def _streaming(config: Config) -> StreamingServer:
    """The streaming server, not yet listening. Raises FailedPreconditionError for an invalid certificate."""
    given = config.streaming
    tls = None
    if given.tls_cert:
        # Imported here: most nodes have no certificate, and save its memory.
        import ssl

        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            tls.load_cert_chain(given.tls_cert, given.tls_key)
        except (OSError, ssl.SSLError) as e:
            raise FailedPreconditionError(
                f"streaming.tls_cert = {given.tls_cert!r} and tls_key = {given.tls_key!r} cannot be used: {e}"
            ) from e
    return StreamingServer(given.host, given.port, tls=tls, idle=given.idle_timeout)


def _tasks(node: Node, store: Store, server: grpc.aio.Server) -> list[Task]:
    """The tasks that run for as long as the daemon serves."""
    for_cadvisor = node.config.containerd_address
    return [
        Task("the CRI server", lambda: ended(server), vital=True),
        Task("the database's checkpoint", store.checkpoint, every=CHECKPOINT_INTERVAL),
        Task("the check of images after an unclean boot", node.images.check_suspects),
        Task("the sync of new images", node.images.sync, every=SYNC_INTERVAL),
        Task("the measuring of writable layers", node.stats.disk.run),
        *([Task("containerd's socket", lambda: containerd_service.serve(for_cadvisor, node))] if for_cadvisor else []),
        # A longer pause would let the watchdog end the daemon.
        Task("the report to systemd", lambda: report(lambda: _status(node.records)), max_pause=report_interval()),
    ]


def _metrics(config: Config) -> list[Task]:
    """Turn the metrics on if they are configured. Returns the tasks that serve them."""
    if not config.metrics_address:
        return []
    # Imported here: most nodes have no metrics, and save the memory of prometheus-client.
    from criserver.telemetry.exposition import CONTENT_TYPE, Exposition, measure_lag
    from criserver.telemetry.scrape_server import ScrapeServer

    endpoint = ScrapeServer(config.metrics_address, Exposition().render, CONTENT_TYPE)
    return [
        Task("the endpoint of metrics", endpoint.run),
        Task("the measuring of the event loop's lag", measure_lag),
    ]


def _status(records: RecordStore) -> str:
    """The text that ``systemctl status`` shows."""
    pods = sum(s.state is SandboxState.READY for s in records.sandboxes.values())
    running = sum(c.state is ContainerState.RUNNING for c in records.containers.values())
    return f"{pods} pods ready, {running} containers running"


def _writable_layers(records: RecordStore) -> dict[str, bool]:
    """The snapshots to be measured, and whether each can still change."""
    unready = (ContainerState.CREATING, ContainerState.REMOVING)
    return {c.id: c.state is not ContainerState.EXITED for c in records.containers.values() if c.state not in unready}


def _services(node: Node) -> list[grpc.GenericRpcHandler]:
    root, containers = node.config.root, node.records.containers
    images = image_service.ImageService(node.images, os.path.join(root, "snapshots"), node.stats.disk.total)
    operator = admin_service.AdminService(
        node.images, os.path.join(root, "spool"), lambda: {c.image_id for c in containers.values()}
    )
    handlers = [generic_handler(admin.DESCRIPTOR.services_by_name["AdminService"], operator, {})]
    handlers += containerd_service.handlers(node)
    before = partial(pod_recovered, node)
    # Kubelets before 1.23 know only v1alpha2. Its messages are the same on the wire, with fewer fields.
    for version in ("v1", "v1alpha2"):
        runtime = runtime_service.RuntimeService(node, version)
        for service, missing in ((runtime, runtime_service.MISSING), (images, image_service.MISSING)):
            descriptor = cri.DESCRIPTOR.services_by_name[type(service).__name__]
            handlers.append(
                generic_handler(descriptor, service, missing, f"runtime.{version}.{descriptor.name}", before)
            )
    return handlers


def hold(directory: str, advice: str = "stop it, or give this one another root and state") -> int:
    """Make a directory that only root can enter, and lock it. The kernel unlocks it however this process ends.

    Raises FailedPreconditionError with ``advice`` if another process has locked it.
    """
    files.make_private(directory)
    path = os.path.join(directory, "criserver.lock")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
        os.close(fd)
        raise FailedPreconditionError(f"another criserver (PID {holder}) uses {directory}; {advice}") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    # Releases before 0.2 let other users pass.
    files.close_to_others(directory)
    return fd


def watch_children() -> None:
    """Let the event loop watch its children by pidfd. Before Python 3.12 its default is a thread for each child."""
    if sys.version_info < (3, 12):
        asyncio.set_child_watcher(asyncio.PidfdChildWatcher())


def run(config: Config) -> int:
    """Run :func:`serve` in an event loop of its own. Returns the process's exit code."""
    if os.geteuid() != 0:
        print(
            "criserver: must be run as root: it mounts, makes namespaces and starts containers",
            file=sys.stderr,
        )
        return 1
    # systemd's watchdog ends the daemon by SIGABRT. The stack of every thread then goes to the log.
    faulthandler.enable()
    allocator.return_memory()
    watch_children()
    try:
        asyncio.run(serve(config))
    except CriError as e:
        print(f"criserver: {e}", file=sys.stderr)
        return 1
    return 0
