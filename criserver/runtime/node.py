"""What every operation needs: the rooms, the records and the work under way, as one value that each is given."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakValueDictionary

import structlog

from criserver.config import Config, RuntimeHandler
from criserver.errors import InvalidArgumentError
from criserver.images import Images
from criserver.network import Network
from criserver.oci import cdi
from criserver.runtime.attempts import Attempts
from criserver.runtime.container_process import ContainerProcess
from criserver.runtime.events import Events
from criserver.runtime.features import Features
from criserver.runtime.handler_runtime import HandlerRuntime
from criserver.runtime.node_plugins import NodePlugins
from criserver.runtime.nursery import Nursery
from criserver.runtime.output_room import OutputRoom
from criserver.runtime.record_store import RecordStore
from criserver.runtime.runtime_choice import former_handler, runtime_of
from criserver.stats import Statistics
from criserver.streaming import StreamingServer
from criserver.telemetry import operations, spans
from criserver.text import quoted
from snapshotter import Snapshotter
from snapshotter.tasks import outlive

log = structlog.get_logger(__name__)

# Seconds before work that has failed is tried again: the first time, and at most.
_FIRST_PAUSE = 1.0
_LAST_PAUSE = 10.0


class _RecordLock(asyncio.Lock):
    """A lock that logs how long somebody waited for it."""

    def __init__(self, record_id: str) -> None:
        super().__init__()
        self._id = record_id

    async def acquire(self) -> Literal[True]:
        if not self.locked():
            return await super().acquire()
        with operations.LOCK.timed(self._id) as timed:
            taken = await super().acquire()
            log.debug("waited for another operation", id=self._id, seconds=timed.elapsed())
        return taken


@dataclass(slots=True)
class Node:
    """The rooms, the records and the work under way."""

    config: Config
    records: RecordStore
    images: Images
    network: Network
    snapshotter: Snapshotter
    nursery: Nursery
    stats: Statistics
    events: Events
    streaming: StreamingServer
    # By the handler's name.
    features: Mapping[str, Features]
    # When the daemon began, on the monotonic clock.
    began: float = field(default_factory=time.monotonic)
    # As last read, so that only what has changed is read again.
    cdi: cdi.CdiCatalog | None = None
    plugins: NodePlugins = field(default_factory=NodePlugins)
    attempts: Attempts = field(default_factory=Attempts)
    # By the ID of a container, or of the pod sandbox whose infra process it is; see process_records.py.
    processes: dict[str, ContainerProcess] = field(default_factory=dict)
    # The recovery of a pod that is under way, by the ID of the sandbox; see recovery.py.
    recovering: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    # Of all ExecSync calls under way.
    output: OutputRoom = field(default_factory=OutputRoom)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _locks: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    def handler(self, name: str) -> RuntimeHandler:
        """The runtime handler by name, the default one for "". Raises InvalidArgumentError for an unknown one."""
        runtime = self.config.runtimes.get(name or self.config.default_runtime)
        if runtime is None:
            known = ", ".join(sorted(self.config.runtimes))
            raise InvalidArgumentError(f"runtime handler {quoted(name)} is not configured; there are: {known}")
        return runtime

    def sandbox_dir(self, sandbox_id: str) -> str:
        """Where a sandbox's mounts are; they end with the boot."""
        return os.path.join(self.config.state, "sandboxes", sandbox_id)

    def sandbox_files_dir(self, sandbox_id: str) -> str:
        """The directory of a sandbox's files that its containers may write to."""
        return os.path.join(self.config.root, "sandboxes", sandbox_id)

    def namespaces_dir(self, sandbox_id: str) -> str:
        """Where a sandbox's namespaces are pinned."""
        return os.path.join(self.config.state, "ns", sandbox_id)

    def container_dir(self, container_id: str) -> str:
        """A container's bundle, and its shim's directory."""
        return os.path.join(self.config.state, "containers", container_id)

    def rootfs(self, container_id: str) -> str:
        """Where a container's root file system is mounted."""
        return os.path.join(self.container_dir(container_id), "rootfs")

    def runtime(self, handler: str) -> HandlerRuntime:
        """The runtime of a handler, "" for the default one. Raises InvalidArgumentError for an unknown handler."""
        return runtime_of(self.handler(handler), self.config.state)

    def cleanup_runtime(self, handler: str, owner_id: str) -> HandlerRuntime:
        """As :meth:`runtime`, for what runs a container or the infra process ``owner_id`` already.

        For a handler that is not configured any more see :func:`former_handler`.
        """
        configured = self.config.runtimes.get(handler)
        if configured is None:
            configured = former_handler(handler, self.container_dir(owner_id), self.handler(""))
        return runtime_of(configured, self.config.state)

    def let_go_of_process(self, owner_id: str) -> None:
        """Forget the process of a container or pod sandbox that is completely removed."""
        process = self.processes.pop(owner_id, None)
        if process is not None:
            process.let_go()

    def lock(self, record_id: str) -> asyncio.Lock:
        """The lock of a sandbox or container: one operation at a time. It exists while an operation refers to it."""
        lock = self._locks.get(record_id)
        if lock is None:
            lock = self._locks[record_id] = _RecordLock(record_id)
        return lock

    async def recovered(self, sandbox_id: str) -> None:
        """Wait for the recovery of a pod, where that is under way."""
        task = self.recovering.get(sandbox_id)
        if task is not None:
            await asyncio.wait([task])

    def background(self, work: Coroutine[Any, Any, object], what: str) -> asyncio.Task[None]:
        """Let work go on by itself; a failure is logged as ``what``."""

        async def run() -> None:
            try:
                await work
            except Exception as e:
                log.exception(what, error=str(e))

        return self.begin(run())

    def try_again(self, owner: str, work: Callable[[], Awaitable[object]], what: str) -> None:
        """Let work be done later that has failed, within the lock of its owner, as often as it takes.

        Each failure is logged as ``what``. The stop of the daemon does not wait for it: the next start undoes the rest.
        """

        async def run() -> None:
            pause = _FIRST_PAUSE
            while not await self._stops_within(pause):
                try:
                    async with self.lock(owner):
                        await work()
                except Exception as e:
                    log.exception(f"{what}; that is tried again", id=owner, error=str(e))
                    pause = min(2 * pause, _LAST_PAUSE)
                else:
                    return

        self.begin(run())

    async def _stops_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        return self._stopping.is_set()

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start work that the daemon waits for at its stop. The event loop itself keeps no task alive."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Await work. It goes on to its end where the caller is cancelled."""
        await outlive(self.begin(spans.held(work)))

    async def settle(self) -> None:
        """Wait for all work under way, at the daemon's orderly stop. Checkpoints are cut short."""
        self._stopping.set()
        for process in self.processes.values():
            if process.checkpoint is not None:
                process.checkpoint.cut.set()
        await self.attempts.finish()
        await asyncio.gather(*self._tasks, return_exceptions=True)
