"""A container's first process, or the infra process of a pod, with the shim that holds it: from its start to its end.

How the process ended is taken from its shim, or from the exit record that a shim has left on disk. Where there is
neither, the kernel is asked whether the process still runs. If it does not, nobody knows how it ended: the observer is
told that it is lost.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from criserver.errors import CriError, DeadlineExceededError, FailedPreconditionError, UnavailableError
from criserver.runtime import cgroups, pidfd
from criserver.runtime.container_shim import GREETING_TIMEOUT, ContainerShim, OnClose, OnEvent
from criserver.runtime.handler_runtime import HandlerRuntime
from criserver.runtime.nursery import Nursery
from criserver.runtime.shim_link import kernel_error
from criserver.runtime.start_under_way import StartUnderWay
from criserver.telemetry import operations
from shims.log_writer import MAX_LINE

if TYPE_CHECKING:
    from shims.messages import ForkConfig, RunningGreeting, ShimMessage, SignalRequest, StartedEvent

log = structlog.get_logger(__name__)

# An exit record, as a shim tells it or has written it; of any version, so that a key may be missing.
ExitRecord = Mapping[str, Any]

# In the directory of a container; shims write it (shims/exit_record.py).
_EXIT_RECORD = "exit.json"
# Seconds.
# A shim gives the runtime up after 100 s and tells why; one that does not is stuck. The kubelet waits two minutes.
START_TIMEOUT = 110.0
# The time that a shim has to delete an exited container. It takes milliseconds. A slow shim is asked whether it works.
_GONE_TIMEOUT = 15.0
_GONE_PATIENCE = 2.0
# The time that a shim has to report that its process has ended. After it the daemon checks whether the shim is stuck.
_SHIM_PATIENCE = 5.0
# The time that the kernel has to end killed processes. It takes milliseconds, unless they wait for a dead disk.
END_TIMEOUT = 5.0
# Seconds before the daemon asks the kernel again, after it had no descriptor or no memory left for the question.
_ASK_AGAIN = 1.0

# Why a start was ended early, for its caller and for the record.
STOPPED = "it was stopped before its process ran"


@dataclass(frozen=True, slots=True)
class Started:
    """A process that runs: its PID, its start in clock ticks since boot, and its start in Unix nanoseconds."""

    pid: int
    start_ticks: int
    started_at: int


@dataclass(slots=True)
class Checkpoint:
    """A checkpoint under way. Setting ``cut`` ends it early; ``thawed`` tells that its container runs again."""

    location: str
    cut: threading.Event = field(default_factory=threading.Event)
    thawed: bool = False
    task: asyncio.Task[None] | None = None


class Observer(Protocol):
    """Keeps the record that a process belongs to, and is told what becomes of the process."""

    def running(self, started: Started) -> None:
        """The process runs. This may be told twice."""

    def start_failed(self, message: str) -> None:
        """The process could not be started; ``message`` says why."""

    def exited(self, record: ExitRecord) -> None:
        """The process has ended; the shim's exit record says how. This may be told twice."""

    def lost(self) -> None:
        """The process has ended, and nobody knows how."""

    def cleaned_up(self) -> None:
        """No process of the container runs any more, and its OCI runtime has deleted its state."""


class ContainerProcess:
    """One process with its shim. Its owner is ``id``, a container's or a pod sandbox's; ``directory`` is its bundle.

    Attributes:
        runtime: what starts and deletes it.
        shim: the shim that holds it.
        cgroup: its cgroup below the roots of the hierarchies.
        started: which process it is, once it runs.
        exited: set once the process has ended and the observer has been told.
        stopping: whether a stop was sent to the process. From then on nothing may freeze it.
        checkpoint: the checkpoint under way.

    """

    def __init__(
        self,
        owner_id: str,
        directory: str,
        runtime: HandlerRuntime,
        cgroup_parent: str,
        nursery: Nursery,
        observer: Observer,
        background: Callable[[Coroutine[Any, Any, object], str], asyncio.Task[None]],
    ) -> None:
        self.id = owner_id
        self.directory = directory
        self.runtime = runtime
        self.cgroup = cgroups.path(cgroup_parent, owner_id)
        self.started: Started | None = None
        self.exited = asyncio.Event()
        self.stopping = False
        self.checkpoint: Checkpoint | None = None
        self._cgroup_parent = cgroup_parent
        self.shim = ContainerShim(owner_id, directory, nursery, background, self._on_event, self._on_close)
        self._observer = observer
        self._background = background
        self._start: StartUnderWay | None = None
        self._gone = asyncio.Event()
        self._cleaning: asyncio.Task[None] | None = None
        self._killing = False

    @property
    def has_lost_shim(self) -> bool:
        """Whether the process runs and the daemon has no connection to its shim."""
        return self.started is not None and not self.exited.is_set() and not self.shim.connected

    # The start

    @contextmanager
    def start_under_way(self) -> Iterator[None]:
        """A start, from before it waits for anything: :meth:`cut_start` ends it."""
        self._start = StartUnderWay()
        try:
            yield
        finally:
            self._start = None

    def cut_start(self) -> None:
        """Have a start under way end at once. Nothing happens where none is, or where it has succeeded meanwhile."""
        if self._start is not None:
            self._start.cut()

    async def start(
        self,
        *,
        log_path: str = "",
        max_line: int = MAX_LINE,
        tty: bool = False,
        stdin: bool = False,
        owner: tuple[int, int] | None = None,
    ) -> Started:
        """Fork a shim that runs the bundle, and wait until the process runs.

        ``max_line`` are the bytes of a line in one record of the log. ``owner`` is the user and group to own the
        standard streams, where the OCI runtime cannot make the process their owner.

        The call is made within :meth:`start_under_way`. The observer is told as soon as the shim tells. Raises
        FailedPreconditionError with the runtime's own message where the process cannot be started, and where the start
        was cut; DeadlineExceededError where the runtime or the shim does not come back. Nothing is left of it then.
        """
        start = self._start
        assert start is not None
        launch = self.runtime.launch(self._cgroup_parent, owner)
        if self.runtime.has(self.id):
            raise FailedPreconditionError(f"container {self.id} exists in {self.runtime.root}: delete it there first")
        if start.is_cut:
            raise FailedPreconditionError(STOPPED)

        def on_event(message: ShimMessage) -> None:
            # The record is written before the next message is looked at, which may tell of the exit.
            if not start.take(message):
                self._on_event(message)

        def on_close() -> None:
            if not start.shim_ended():
                self._on_close()

        config: ForkConfig = {
            "id": self.id,
            "bundle": self.directory,
            "directory": self.directory,
            **launch,
            "log_path": log_path,
            "max_line": max_line,
            "tty": tty,
            "stdin": stdin,
            "oom_files": cgroups.oom_files(self.cgroup),
            "pod_events": cgroups.pod_events(self._cgroup_parent),
        }
        with operations.RUNTIME.timed(self.runtime.handler, "run"):
            with operations.SHIM.timed():
                await self._fork(config, on_event, on_close)
            if not await start.wait(START_TIMEOUT):
                await self.end_start()
                if start.is_cut:
                    raise FailedPreconditionError(STOPPED)
                raise DeadlineExceededError(
                    f"the shim of {self.id} did not tell within {START_TIMEOUT:g} s whether {self.runtime.path} has "
                    "started the container"
                )
            outcome = start.outcome.result()
            if outcome["event"] == "failed":
                # An OCI runtime that was ended early may have left something, and a shim that died its OCI runtime.
                await self.end_start()
                kind = DeadlineExceededError if outcome["late"] else FailedPreconditionError
                raise kind(outcome["error"]) from kernel_error(outcome)
            return _started(outcome)

    async def _fork(self, config: ForkConfig, on_event: OnEvent, on_close: OnClose) -> None:
        """Fork the shim, and a second time where the nursery has ended: that is no fault of the container.

        The nursery may have forked a shim that nobody hears. It is ended, with all that it has begun. If it has begun
        something, there is no second time: a process must not run twice.
        """
        try:
            await self.shim.fork(config, on_event, on_close)
        except UnavailableError as e:
            log.warning("the nursery of shims has ended while it was to fork a shim", owner=self.id, error=str(e))
            await self._end_shim_and_runtime()
            if self.shim.has_begun:
                raise
            try:
                await self.shim.fork(config, on_event, on_close)
            except UnavailableError:
                await self._end_shim_and_runtime()
                raise

    async def end_start(self) -> None:
        """End a start under way, whichever daemon began it: its shim, the OCI runtime, and what that has half made.

        No request is sent to the shim: one that is stuck, or that an earlier version has started, has to end too.
        Raises DeadlineExceededError where the kernel does not let go of a process.
        """
        self.shim.abandon()
        # A frozen process takes no signal, and the runtime would wait for it.
        await asyncio.to_thread(cgroups.thaw, self.cgroup)
        await self._end_shim_and_runtime()

    async def _end_shim_and_runtime(self) -> None:
        left = await self.shim.end(END_TIMEOUT)
        await self.destroy()
        if left:
            raise cgroups.unkillable(self.id, left, END_TIMEOUT)

    def start_failed(self, message: str) -> None:
        """Tell the observer that the start has failed. The caller has removed everything of the start."""
        self._observer.start_failed(message)
        self.exited.set()
        self._cleaned_up()

    async def update(self, resources: Mapping[str, object]) -> None:
        """Set limits of the running container. Raises as :meth:`OciRuntime.update`."""
        await self.runtime.update(self.id, self._cgroup_parent, resources, self.shim.ask)

    # What its shim tells

    def _on_event(self, message: ShimMessage) -> None:
        if "hello" in message:
            if message["state"] == "running":
                self._runs(message)
            elif message["state"] == "exited":
                self._take_exit(message)
        elif message["event"] == "started":
            self._runs(message)
        elif message["event"] == "failed":
            self.start_failed(message["error"])
        elif message["event"] == "exited":
            self._take_exit(message)
        elif message["event"] == "gone" and "error" not in message:
            self._cleaned_up()
        elif message["event"] == "gone":
            log.warning("runtime delete failed in a shim", owner=self.id, error=message["error"])
            self._clean_up()

    def _runs(self, message: StartedEvent | RunningGreeting) -> None:
        """The start is ours, or an earlier daemon's that did not see the end of it."""
        self.started = _started(message)
        self._observer.running(self.started)

    def _on_close(self) -> None:
        if self._killing:
            # The shim may have ended before it sent the signal.
            with suppress(OSError):
                self.signal(signal.SIGKILL)
        self.without_shim()

    # The end

    def signal(self, number: int) -> None:
        """Send a signal to the process; one that has ended is no error. Needs no answer of the shim.

        Raises OSError where the kernel cannot say whether it runs, such as when no descriptor is left.
        """
        if self.runtime.has_signals and self.shim.connected:
            # The process may be in a virtual machine, and the PID that of the machine.
            self._background(self._signal_by_shim(number), "a signal cannot be given to a runtime's shim")
        elif self.started is not None:
            pidfd.send_signal(self.started.pid, self.started.start_ticks, number)

    async def _signal_by_shim(self, number: int) -> None:
        """Have the runtime's shim send a signal. A shim that is stuck cannot hinder SIGKILL."""
        request: SignalRequest = {"op": "signal", "signal": number}
        try:
            await self.shim.request(request, timeout=GREETING_TIMEOUT)
        except CriError:
            if number != signal.SIGKILL or self.started is None:
                raise
            pidfd.send_signal(self.started.pid, self.started.start_ticks, number)

    async def wait(self, seconds: float) -> bool:
        """Wait for the end of the process for so long; whether it has ended."""
        try:
            async with asyncio.timeout(seconds):
                await self.exited.wait()
        except TimeoutError:
            return False
        return True

    async def kill(self, limit: float) -> None:
        """Send SIGKILL and wait for the end. Raises DeadlineExceededError if it has not ended after ``limit`` seconds.

        A killed process ends at once unless the kernel holds it (a dead network disk); its shim then drains the log.
        """
        with operations.KILL.timed():
            self._killing = True
            self.signal(signal.SIGKILL)
            deadline = time.monotonic() + limit
            while not await self.wait(min(_SHIM_PATIENCE, limit)):
                if time.monotonic() > deadline:
                    pid = self.started.pid if self.started else "unknown"
                    raise DeadlineExceededError(
                        f"container {self.id} (PID {pid}) has not ended {limit:g} s after SIGKILL"
                    )
                await self._replace_stuck_shim()

    async def _replace_stuck_shim(self) -> None:
        """Take the exit code from the kernel where the process has ended and its shim does not tell; end the shim."""
        if self.started is not None and pidfd.start_ticks(self.started.pid) == self.started.start_ticks:
            code = pidfd.zombie_code(self.started.pid)
            if code is None:
                return  # it still runs
            log.error("a shim is stuck; its container's end is taken from the kernel", owner=self.id, code=code)
            ended: ExitRecord = {"code": code, "finished_at": time.time_ns()}
            await asyncio.to_thread(_keep_exit, self.directory, ended)
            self._take_exit(ended)
            await self.shim.end(END_TIMEOUT)
        elif (record := _exit_record(self.directory)) is not None:
            # It is busy with what is left in the cgroup, or with a runtime that hangs.
            log.warning("a shim is slow to report its container's end; the daemon reads it from disk", owner=self.id)
            self._take_exit(record)
            return
        elif await self.shim.answers():
            return
        else:
            log.error("a stuck shim does not report the end of its container", owner=self.id)
            await self.shim.end(END_TIMEOUT)
            self.without_shim()
        await self.destroy()

    def without_shim(self) -> None:
        """Go on without a shim: take the exit record that it left, or watch the process, or say that it is lost."""
        try:
            if not self.exited.is_set():
                self._find_end()
        except OSError as e:
            # Without a descriptor, for example, nothing can be seen of a process. That does not mean that it has ended.
            log.warning("it cannot be seen now whether a process has ended", owner=self.id, error=str(e))
            asyncio.get_running_loop().call_later(_ASK_AGAIN, self.without_shim)
        if self.exited.is_set() and not self._gone.is_set():
            self._clean_up()

    def _find_end(self) -> None:
        """Raises OSError where the end can be looked up neither on disk nor in the kernel."""
        if (record := _exit_record(self.directory)) is not None:
            self._take_exit(record)
            return
        process = self.started
        if process is not None and pidfd.watch(process.pid, process.start_ticks, self._lost):
            log.error("a container's shim is gone; its log is lost, and the daemon waits for its end", owner=self.id)
            return
        self._lost()

    def _take_exit(self, record: ExitRecord) -> None:
        try:
            self._observer.exited(record)
        finally:
            # The process has ended, whatever may be wrong with the record.
            self.exited.set()

    def _lost(self) -> None:
        if not self.exited.is_set():
            self._observer.lost()
            self.exited.set()
        self._clean_up()

    # The clean-up after it

    def _clean_up(self) -> None:
        """Do what the shim would have done. It may have left the OCI runtime, which it was waiting for."""

        async def work() -> None:
            await self.shim.end(END_TIMEOUT)
            await self.destroy()
            self._cleaned_up()

        if self._cleaning is None:
            self._cleaning = self._background(work(), "clean-up after a lost shim failed")

    def _cleaned_up(self) -> None:
        if not self._gone.is_set():
            self._gone.set()
            self._observer.cleaned_up()

    async def wait_cleaned_up(self) -> None:
        """Wait for the clean-up after a process that has ended. A shim that is stuck in it is ended.

        A failure is logged; :meth:`destroy` does the same and raises it.
        """
        with operations.CLEAN_UP.timed():
            if self.shim.connected and self._cleaning is None and not await self._shim_cleans_up():
                log.warning("a shim is stuck; its container is cleaned up without it", owner=self.id)
                self.shim.abandon()
                self._clean_up()
            if self._cleaning is not None:
                await asyncio.wait([self._cleaning])

    async def _shim_cleans_up(self) -> bool:
        """Whether the shim has cleaned up in time."""
        for patience in (_GONE_PATIENCE, _GONE_TIMEOUT):
            try:
                async with asyncio.timeout(patience):
                    await self._gone.wait()
                return True
            except TimeoutError:
                if not await self.shim.answers():
                    break
        return False

    async def destroy(self) -> None:
        """End whatever runs of the container, by its runtime and in its cgroup, and what the runtime keeps of it.

        A runtime that fails is logged: the daemon does its work then. Raises DeadlineExceededError where the kernel
        does not let go of a process, CriError where something cannot be deleted.
        """
        again = await self.runtime.delete(self.id, self._cgroup_parent)
        if await cgroups.clear(self.cgroup, self.id, END_TIMEOUT) and again:
            # The runtime fails where cgroups are deeper in each other than a path may be long.
            await self.runtime.delete(self.id, self._cgroup_parent)
        await self.runtime.forget(self.id)

    def let_go(self) -> None:
        """Forget the process, of which nothing is left but its shim. A shim that does not end by itself is ended."""
        if self.shim.connected:
            asyncio.get_running_loop().call_later(_GONE_PATIENCE, self._end_shim)
        else:
            self.shim.abandon()

    def _end_shim(self) -> None:
        if self.shim.connected:
            log.warning("the shim of a removed container is stuck; it is ended", owner=self.id)
            self._background(self.shim.end(END_TIMEOUT), "a stuck shim cannot be ended")
        self.shim.abandon()


def _started(message: StartedEvent | RunningGreeting) -> Started:
    return Started(message["init"], message["start_ticks"], message["started_at"])


def _keep_exit(directory: str, record: ExitRecord) -> None:
    """Write an end that no shim has written, for a daemon that is started before it is in the database. Blocks."""
    path = os.path.join(directory, _EXIT_RECORD)
    try:
        with open(path + ".tmp", "w") as f:
            json.dump(record, f)
        os.rename(path + ".tmp", path)
    except OSError as e:
        log.warning("a container's end cannot be written beside its bundle", directory=directory, error=str(e))


def _exit_record(directory: str) -> ExitRecord | None:
    """The end of its process that a shim has written to disk; None if there is no file. Raises OSError."""
    try:
        with open(os.path.join(directory, _EXIT_RECORD)) as f:
            record: ExitRecord = json.load(f)
            return record
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as e:
        log.exception("an exit record cannot be read", directory=directory, error=str(e))
        return None
