"""The whole daemon: it puts the rooms together, serves, and stops in order."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import grpc
import structlog

from criserver import __version__, upkeep, work_under_way
from criserver.api import admin_service, containerd_service, image_service, runtime_service
from criserver.api.call_subject import prepare
from criserver.api.grpc_server import ended, generic_handler, listen
from criserver.config import Config, Settings, config_of
from criserver.errors import CriError, FailedPreconditionError, told_in_words
from criserver.images import ContentStore, Images, RegistrySettings, host_platform
from criserver.network import Network
from criserver.own_directories import DATABASE, ROOT, STATE, hold
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.reload import Reloads, reload_at
from criserver.runtime import apparmor, cadvisor_cgroup, cgroups, host, node_readings, recovery
from criserver.runtime.events import Events
from criserver.runtime.features import Features, probe_all
from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.node import Node
from criserver.runtime.nursery import Nursery
from criserver.runtime.plugin_service import PluginService
from criserver.runtime.record_store import RecordStore
from criserver.runtime.runtime_choice import runtime_of
from criserver.runtime.service_manager import notify, report, report_interval
from criserver.stats import CgroupReaders, DiskMeter, NetworkCounters, Statistics
from criserver.store import Store
from criserver.streaming import ServerCertificate, StreamingServer
from criserver.telemetry import families, otel_libraries
from criserver.upkeep import Task
from snapshotter import LayerLimits, Snapshotter, allocator
from snapshotter.threads import Threads

if TYPE_CHECKING:
    from criserver.telemetry.trace_export import TraceExport

log = structlog.get_logger(__name__)

# Seconds that calls under way may still take when the daemon is told to stop.
STOP_GRACE = 5.0
CHECKPOINT_INTERVAL = 60.0
# Seconds after which a runtime whose features are not known is asked again.
FEATURES_INTERVAL = 10.0
# Seconds between two syncs of new image content, and that the sync at the stop may take: see docs/decisions/0010*.
SYNC_INTERVAL = 30.0
SYNC_GRACE = 10.0
# The threads that make calls that block. A disk that stands still holds one for each call that needs it.
_THREADS = 32
# Seconds that sending the last traces may take.
TRACING_GRACE = 2.0
_NO_START = "the daemon cannot start"


async def serve(settings: Settings, path: str) -> None:
    """Serve until SIGTERM or SIGINT. Containers go on without the daemon.

    SIGHUP reads the configuration file ``path`` anew, and SIGUSR1 logs the work under way.

    Raises FailedPreconditionError if another daemon uses the directories, and CriError if the host refuses something
    that the start needs or if a task fails that the daemon cannot work without.
    """
    began = time.monotonic()
    config = config_of(settings)
    stop, hangup = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    loop.add_signal_handler(signal.SIGUSR1, work_under_way.log_it)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.set_default_executor(Threads(_THREADS))
    upkeep.hear_the_rest()
    locks = [hold(config.root, ROOT, config.grpc_address), hold(config.state, STATE, config.grpc_address)]
    host.raise_open_files()
    metrics, tracing = _metrics(config), _tracing(config)
    with told_in_words(_NO_START):
        store = Store(os.path.join(config.root, DATABASE), os.path.join(config.state, "records"))
        snapshotter = Snapshotter(os.path.join(config.root, "snapshots"), limits=LayerLimits(**asdict(config.images)))
        if words := snapshotter.file_system_trouble():
            raise FailedPreconditionError(f"{_NO_START}: {words}")
        runtimes = [runtime_of(handler, config.state) for handler in config.runtimes.values()]
        features = await probe_all(runtimes, snapshotter)
        node = assemble(config, store, snapshotter, features)
    plugins = PluginService(node)
    node_readings.read_from(node)
    cadvisor_cgroup.watch(node)
    try:
        with told_in_words(_NO_START):
            await node.nursery.start()
            await apparmor.load()
            recovery.begin(node)
            await node.streaming.start()
            await plugins.start()
            server = await listen(
                config.grpc_address,
                _services(node),
                max_request=config.max_recv_message_size,
                max_answer=config.max_send_message_size,
            )
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
            reloads = Task("the reload", partial(reload_at, hangup, Reloads(node, settings, path, tracing)))
            await upkeep.keep([*_tasks(node, store, server), reloads, *metrics], stop)
        finally:
            log.info("stopping")
            notify("STOPPING=1")
            await server.stop(STOP_GRACE)
            await plugins.stop()
            await node.streaming.stop()
            await upkeep.finish(node.settle(), STOP_GRACE)
            await upkeep.finish(node.images.sync(), SYNC_GRACE)
    finally:
        for process in node.processes.values():
            process.shim.abandon()
        await node.nursery.stop()
        if tracing is not None:
            await tracing.stop(TRACING_GRACE)
        node.stats.close()
        node.snapshotter.close()
        store.close()
        for lock in locks:
            os.close(lock)


async def _finish_recovery(node: Node) -> None:
    began = time.monotonic()
    await recovery.finish(node)
    await node.images.collect()
    seconds = time.monotonic() - began
    families.RECOVERY_DURATION.set(seconds)
    log.info("recovered", seconds=round(seconds, 3))


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
            RegistrySettings.of(config),
            host_platform(),
            note=os.path.join(config.root, "synced.json"),
            pinned=config.pinned_images,
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
    certificate = ServerCertificate(given.tls_cert, given.tls_key, given.tls_ca) if given.tls_cert else None
    return StreamingServer(given.host, given.port, certificate=certificate, idle=given.idle_timeout)


def _tasks(node: Node, store: Store, server: grpc.aio.Server) -> list[Task]:
    """The tasks that run for as long as the daemon serves."""
    for_cadvisor = node.config.containerd_address
    return [
        Task("the CRI server", lambda: ended(server), vital=True),
        Task("the database's checkpoint", store.checkpoint, every=CHECKPOINT_INTERVAL),
        Task("the features of runtimes", lambda: _learn_features(node), every=FEATURES_INTERVAL),
        Task("the check of images after an unclean boot", node.images.check_suspects),
        Task("the sync of new images", node.images.sync, every=SYNC_INTERVAL),
        Task("the measuring of writable layers", node.stats.disk.run),
        *([Task("containerd's socket", lambda: containerd_service.serve(for_cadvisor, node))] if for_cadvisor else []),
        # A longer pause would let the watchdog end the daemon.
        Task("the report to systemd", lambda: report(lambda: _status(node.records)), max_pause=report_interval()),
    ]


async def _learn_features(node: Node) -> None:
    """Ask the runtimes again whose features could not be found out before."""
    unknown = [name for name, features in node.features.items() if features.unknown and name in node.config.runtimes]
    if not unknown:
        return
    runtimes = [runtime_of(node.config.runtimes[name], node.config.state) for name in unknown]
    found = await probe_all(runtimes, node.snapshotter)
    # A reload may have changed a handler meanwhile.
    known = {name: features for name, features in found.items() if not features.unknown and node.features[name].unknown}
    node.features = {**node.features, **known}
    for name in known:
        log.info("the features of a runtime handler are known now", handler=name)


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


def _tracing(config: Config) -> TraceExport | None:
    """Turn tracing on if it is configured. Raises FailedPreconditionError without the libraries that it needs."""
    if not config.tracing_endpoint:
        return None
    if not otel_libraries.are_installed():
        raise FailedPreconditionError(
            f"tracing.endpoint = {config.tracing_endpoint!r} needs the libraries of OpenTelemetry, which are not "
            f"installed: {otel_libraries.ADVICE}"
        )
    # Imported here: most nodes have no tracing, and save the memory of OpenTelemetry's SDK.
    from criserver.telemetry.trace_export import TraceExport

    return TraceExport(config.tracing_endpoint, config.tracing_rate)


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
    snapshots = os.path.join(node.config.root, "snapshots")
    images = image_service.ImageService(node.images, snapshots, node.stats.disk.total)
    operator = admin_service.AdminService(node)
    before = partial(prepare, node)
    handlers = [generic_handler(admin.DESCRIPTOR.services_by_name["AdminService"], operator, {}, before=before)]
    handlers += containerd_service.handlers(node)
    # Kubelets before 1.23 know only v1alpha2. Its messages are the same on the wire, with fewer fields.
    for version in ("v1", "v1alpha2"):
        runtime = runtime_service.RuntimeService(node, version)
        for service, missing in ((runtime, runtime_service.MISSING), (images, image_service.MISSING)):
            descriptor = cri.DESCRIPTOR.services_by_name[type(service).__name__]
            handlers.append(
                generic_handler(descriptor, service, missing, f"runtime.{version}.{descriptor.name}", before)
            )
    return handlers


def watch_children() -> None:
    """Let the event loop watch its children by pidfd. Before Python 3.12 its default is a thread for each child."""
    if sys.version_info < (3, 12):
        asyncio.set_child_watcher(asyncio.PidfdChildWatcher())


def run(settings: Settings, path: str) -> int:
    """Run :func:`serve` in an event loop of its own. Returns the process's exit code."""
    if os.geteuid() != 0:
        print(
            "criserver: must be run as root: it mounts, makes namespaces and starts containers",
            file=sys.stderr,
        )
        return 1
    # systemd's watchdog ends the daemon by SIGABRT. The stack of every thread then goes to the log.
    faulthandler.enable()
    # Pods' users enter directories that the daemon makes, as for host paths. A node's service manager or shell may have
    # another umask. Files that are private have a mode of their own.
    os.umask(0o022)
    allocator.return_memory()
    watch_children()
    try:
        runner = asyncio.Runner()
        with told_in_words(_NO_START):
            runner.get_loop()
        with runner:
            runner.run(serve(settings, path))
    except CriError as e:
        print(f"criserver: {e}", file=sys.stderr)
        return 1
    return 0
