"""Starting a shim for a bundle, and what its events mean for a container's record.

An exit status comes from the shim, live or as the record it left on disk. Where the shim is gone without one,
the kernel is asked whether the process still runs; only when nothing knows better does a container end as
exit 255, reason Unknown.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import structlog

from criserver.errors import CriError, DeadlineExceededError, FailedPreconditionError
from criserver.runtime import cgroups, command, filesystems, host
from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.node import Node
from criserver.runtime.records import Container
from criserver.runtime.shim_link import Message, connect
from shims import tree

log = structlog.get_logger(__name__)

# A shim gives the runtime up after 100 s and tells why; one that does not is stuck. The kubelet waits two minutes.
START_TIMEOUT = 110.0
# What a shim needs to delete an exited container. It takes milliseconds; one that takes longer is asked if it is there.
GONE_TIMEOUT = 15.0
GONE_PATIENCE = 2.0
GREETING_TIMEOUT = 2.0
DELETE_TIMEOUT = 30.0
# What the kernel may take to let go of killed processes; it takes milliseconds, unless a dead disk holds them.
END_TIMEOUT = 5.0
_END_INTERVAL = 0.01
# Where a container may have a process.
_ALIVE = (ContainerState.STARTING, ContainerState.RUNNING)

# Why a start was ended early, for its caller and for the record.
STOPPED = "it was stopped before its process ran"


@contextmanager
def under_way(node: Node, key: str) -> Iterator[None]:
    """A start, from before it waits for anything: :func:`cut_start` ends it."""
    node.starts[key] = asyncio.get_running_loop().create_future()
    try:
        yield
    finally:
        del node.starts[key]


def cut_start(node: Node, key: str) -> None:
    """Have a start under way end at once. Nothing where there is none; one that has succeeded meanwhile stays so."""
    cut = node.starts.get(key)
    if cut is not None and not cut.done():
        cut.set_result(None)


@dataclass(frozen=True, slots=True)
class Started:
    """A running first process: its PID, start in ticks since boot, and start in Unix nanoseconds."""

    pid: int
    start_ticks: int
    started_at: int


async def start(
    node: Node,
    key: str,
    *,
    handler: str,
    cgroup_parent: str,
    log_path: str = "",
    tty: bool = False,
    stdin: bool = False,
) -> Started:
    """Fork a shim that runs the bundle in ``node.container_dir(key)``, and wait until the process runs.

    It is :func:`under_way`. A container's record goes from STARTING to RUNNING as soon as its shim tells. Raises
    FailedPreconditionError with the runtime's own words where it cannot be started, and where it was cut;
    DeadlineExceededError where the runtime or its shim does not come back. Nothing of it is left then.
    """
    runtime = node.handler(handler)
    program = shutil.which(runtime.path)
    if program is None:
        raise FailedPreconditionError(
            f"runtime handler {runtime.name}: {runtime.path} is not an executable; install it or change its path "
            f"in [runtimes.{runtime.name}]"
        )
    directory = node.container_dir(key)
    cut = node.starts[key]
    if cut.done():
        raise FailedPreconditionError(STOPPED)
    greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    begun: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

    def on_event(message: Message) -> None:
        if not greeted.done():
            greeted.set_result(None)
        if message.get("event") in ("started", "failed") and not begun.done():
            begun.set_result(message)
            if message["event"] == "failed":
                return
        # Written down before the next message is looked at, which may be that it has exited.
        _on_event(node, key, message)

    def on_close() -> None:
        if not begun.done():
            begun.set_result({"event": "failed", "error": "the shim ended before the container had started"})
        elif begun.result()["event"] == "started":
            _on_close(node, key)

    node.exits[key], node.gone[key] = asyncio.Event(), asyncio.Event()
    link = await node.nursery.fork(
        {
            "id": key,
            "bundle": directory,
            "directory": directory,
            "runtime": program,
            "runtime_root": node.runtime_root(handler),
            "runtime_args": cgroups.runtime_args(cgroup_parent),
            "log_path": log_path,
            "tty": tty,
            "stdin": stdin,
            "oom_files": cgroups.oom_files(cgroups.path(cgroup_parent, key)),
            "pod_events": cgroups.pod_events(cgroup_parent),
        },
        on_event,
        on_close,
    )
    node.links[key] = link
    either: list[asyncio.Future[Any]] = [begun, cut]
    await asyncio.wait(either, timeout=START_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
    if not begun.done():
        # It is found by its directory, where it is once it has said a word.
        await asyncio.wait([greeted], timeout=GREETING_TIMEOUT)
    if not begun.done():
        await end_start(node, key, handler, cgroup_parent)
        if cut.done():
            raise FailedPreconditionError(STOPPED)
        raise DeadlineExceededError(
            f"the shim of {key} did not tell within {START_TIMEOUT:g} s whether {runtime.path} has started it"
        )
    message = begun.result()
    if message["event"] == "failed":
        # A runtime that was given up may have left what it had made by then, and a shim that died its runtime.
        await end_start(node, key, handler, cgroup_parent)
        raise (DeadlineExceededError if message.get("late") else FailedPreconditionError)(message["error"])
    return _started(message)


async def end_start(node: Node, key: str, handler: str, cgroup_parent: str) -> None:
    """End a start under way, whichever daemon began it: its shim, the OCI runtime, and what that has half made.

    Not by a request: a shim that is stuck, or that an earlier version has started, has to end too. Raises
    DeadlineExceededError where the kernel does not let go of a process.
    """
    if (link := node.links.pop(key, None)) is not None:
        link.abandon()
    # What is frozen takes no signal, and the runtime would wait for it.
    cgroups.thaw(cgroups.path(cgroup_parent, key))
    left = await _end_shim(node, key)
    await destroy(node, key, handler, cgroup_parent)
    if left:
        raise DeadlineExceededError(_words_of_the_unkillable(key, left))


def _started(message: Message) -> Started:
    """From the shim's event, or from its greeting, where "pid" is the shim itself."""
    return Started(
        message["init"] if "hello" in message else message["pid"], message["start_ticks"], message["started_at"]
    )


def start_failed(node: Node, key: str, words: str) -> None:
    """Record that a container's process could not be started, as the kubelet shows it."""
    container = node.registry.containers.get(key)
    if container is None or container.state is not ContainerState.STARTING:
        return
    node.registry.observe(container.ended(128, "StartError", words))
    node.background(filesystems.unmount(node, key), "unmount of an unstarted container's files failed")


async def replace_stuck_shim(node: Node, container: Container) -> None:
    """Where the process has ended and its shim does not tell: take its code from the kernel and end the shim.

    Nothing where the process still runs, or where the shim is at work.
    """
    if host.start_ticks(container.pid) == container.start_ticks:
        code = host.zombie_code(container.pid)
        if code is None:
            return
        log.error("a shim is stuck; its container's end is taken from the kernel", container=container.id, code=code)
        exited(node, container.id, {"code": code, "finished_at": time.time_ns()})
        await _end_shim(node, container.id)
    elif await _answers(node, container.id):
        return
    else:
        log.error("a shim is stuck that has its container's end and does not tell of it", container=container.id)
        await _end_shim(node, container.id)
        settle(node, container.id)
    sandbox = node.registry.sandbox(container.sandbox_id)
    await destroy(node, container.id, sandbox.runtime, sandbox.cgroup_parent)


async def _end_shim(node: Node, key: str) -> list[int]:
    """Kill a shim, or the runtime that one has left behind, with all that it has started; what does not end."""
    left = await asyncio.to_thread(_end_all_in, os.path.realpath(node.container_dir(key)))
    if left:
        log.error("killed processes of a shim do not end", container=key, pids=left)
    return left


def _end_all_in(directory: str) -> list[int]:
    deadline = time.monotonic() + END_TIMEOUT
    while pids := host.processes_in(directory):
        if time.monotonic() > deadline:
            return pids
        for pid in pids:
            tree.end(pid, lambda pid=pid: host.is_in(pid, directory))  # type: ignore[misc]
        time.sleep(_END_INTERVAL)
    return []


def _words_of_the_unkillable(key: str, pids: list[int]) -> str:
    named = ", ".join(map(str, pids))
    return f"processes of {key} have not ended {END_TIMEOUT:g} s after SIGKILL; the kernel holds them: PID {named}"


def _running(node: Node, container: Container, begun: Started) -> Container:
    """Record that a container runs whose start was under way, and return the new record."""
    container = dataclasses.replace(
        container,
        state=ContainerState.RUNNING,
        pid=begun.pid,
        start_ticks=begun.start_ticks,
        started_at=begun.started_at,
    )
    node.registry.observe(container)
    node.stats.disk.nudge()
    log.info("container started", container=container.id, pid=begun.pid)
    return container


async def wait_gone(node: Node, key: str) -> None:
    """Wait until the shim of a container that has ended has cleaned up after it; one without a shim needs no wait.

    A shim that is stuck is ended.
    """
    event = node.gone.get(key)
    if event is None or key not in node.links:
        return
    for patience in (GONE_PATIENCE, GONE_TIMEOUT):
        try:
            async with asyncio.timeout(patience):
                await event.wait()
            return
        except TimeoutError:
            if not await _answers(node, key):
                log.warning("a shim is stuck; its container is cleaned up without it", container=key)
                await _end_shim(node, key)
                break
    else:
        log.warning("a shim has not cleaned up in time; done without it", container=key)
    if (link := node.links.get(key)) is not None:
        link.close()


async def _answers(node: Node, key: str) -> bool:
    """Whether a shim is at work: it answers whatever it waits for."""
    link = node.links.get(key)
    try:
        return link is not None and bool(await link.request({"op": "status"}, timeout=GREETING_TIMEOUT))
    except DeadlineExceededError:
        return False
    except CriError:
        return True  # it has just ended


async def reconnect(node: Node, key: str) -> bool:
    """Connect to a shim that an earlier daemon started, and take over what it greets with.

    False where the shim is gone. One that does not speak (stopped, or the node is busy) is left to do so later.
    """
    node.exits[key], node.gone[key] = asyncio.Event(), asyncio.Event()
    greeted = asyncio.Event()

    def on_event(message: Message) -> None:
        _on_event(node, key, message)
        greeted.set()

    try:
        link = connect(os.path.join(node.container_dir(key), "shim.sock"), on_event, lambda: _on_close(node, key))
    except BlockingIOError:
        # It is there, and so busy or so stopped that its queue is full: what it says is awaited, not guessed.
        log.warning("a shim does not accept; its container is taken as it was", container=key)
        node.background(_connect_later(node, key), "connecting to a busy shim failed")
        return True
    except OSError:
        return False
    node.links[key] = link
    try:
        async with asyncio.timeout(GREETING_TIMEOUT):
            await greeted.wait()
    except TimeoutError:
        log.warning("a shim does not greet; its container is taken as it was", container=key)
    return True


async def _connect_later(node: Node, key: str) -> None:
    while key in node.registry.containers or key in node.registry.sandboxes:
        await asyncio.sleep(GREETING_TIMEOUT)
        try:
            node.links[key] = connect(
                os.path.join(node.container_dir(key), "shim.sock"),
                lambda message: _on_event(node, key, message),
                lambda: _on_close(node, key),
            )
        except BlockingIOError:
            continue
        except OSError:
            if key not in node.starts:  # or whoever ends it tells
                settle(node, key)
        return


def settle(node: Node, key: str) -> None:
    """A started container without a shim to tell of it: take the record it left, or watch the kernel."""
    container = node.registry.containers.get(key)
    if container is None and (event := node.exits.get(key)) is not None and not event.is_set():
        exited(node, key, {"reason": "its shim is gone"})
    if container is None or container.state not in _ALIVE:
        return
    if (record := _exit_record(node, key)) is not None:
        exited(node, key, record)
    elif (pidfd := open_process(container.pid, container.start_ticks)) is not None:
        log.error("a container's shim is gone; its log is lost, its end will be seen", container=key)
        _watch(node, key, pidfd)
    else:
        _unknown(node, key)


def open_process(pid: int, start_ticks: int) -> int | None:
    """A descriptor of the very process that was started, or None where it is gone. The caller closes it."""
    if not pid:
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    # Checked after opening: from here on the descriptor cannot come to mean another process.
    if host.start_ticks(pid) != start_ticks:
        os.close(pidfd)
        return None
    return pidfd


def send_signal(container: Container, number: int) -> None:
    """Signal the container's first process; one that is gone is no error. Needs no answer of the shim."""
    pidfd = open_process(container.pid, container.start_ticks)
    if pidfd is None:
        return
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)


async def destroy(node: Node, key: str, handler: str, cgroup_parent: str = "") -> None:
    """End whatever runs of a container, by its runtime and in its cgroup, and what the runtime keeps of it.

    A runtime that fails is logged; one that is not configured any more leaves its work to the default one. Raises
    DeadlineExceededError where the kernel does not let go of a process.
    """
    await _delete(node, key, handler)
    if cgroup_parent and await _clear_cgroup(cgroup_parent, key):
        # The runtime fails where cgroups are deeper in each other than a path may be long.
        await _delete(node, key, handler)


async def _delete(node: Node, key: str, handler: str) -> None:
    runtime = node.config.runtimes.get(handler) or node.handler("")
    program = shutil.which(runtime.path)
    root = node.runtime_root(handler)
    if program is None or not os.path.isdir(os.path.join(root, key)):
        return
    try:
        done = await command.run([program, "--root", root, "delete", "--force", key], DELETE_TIMEOUT)
    except TimeoutError:
        log.warning("runtime delete timed out", container=key)
        return
    # Where its shim was as quick with the same, there is nothing left to delete.
    if done.code and os.path.isdir(os.path.join(root, key)):
        log.warning("runtime delete failed", container=key, error=done.words)


async def _clear_cgroup(parent: str, key: str) -> bool:
    """End what is in a container's cgroup, and remove that; whether there was one.

    A runtime that came to no state of its own leaves both.
    """
    path = cgroups.path(parent, key)
    if not cgroups.exists(path):
        return False
    if left := await asyncio.to_thread(cgroups.end_processes, path, END_TIMEOUT):
        raise DeadlineExceededError(_words_of_the_unkillable(key, left))
    await cgroups.remove_container(parent, key)
    return True


def exited(node: Node, key: str, record: Message) -> None:
    """Take an exit record over: the container's new state, and everyone who waits is woken."""
    try:
        _take_over(node, key, record)
    finally:
        # Whatever may be wrong with the record: it has ended.
        _wake(node, key)


def _take_over(node: Node, key: str, record: Message) -> None:
    container = node.registry.containers.get(key)
    if container is None:
        sandbox = node.registry.sandboxes.get(key)
        if sandbox is not None and sandbox.state is SandboxState.READY:
            log.error("a pod's infra process ended; its shared PID namespace is gone", sandbox=key, record=record)
            node.registry.observe(dataclasses.replace(sandbox, state=SandboxState.NOT_READY))
    elif container.state in _ALIVE:
        code, finished_at = record["code"], record["finished_at"]
        if container.state is ContainerState.STARTING:
            # An earlier daemon did not hear of its start. A greeting has its PID, the record on disk has none.
            begun = Started(
                record.get("init") or 0, record.get("start_ticks", 0), record.get("started_at") or finished_at
            )
            container = _running(node, container, begun)
        reason = "OOMKilled" if record.get("oom_killed") else "Completed" if code == 0 else "Error"
        node.registry.observe(container.ended(code, reason, finished_at=finished_at))
        log.info("container exited", container=key, code=code, reason=reason)


def _wake(node: Node, key: str) -> None:
    """Wake whoever waits for a container's end."""
    if (event := node.exits.get(key)) is not None:
        event.set()


def _on_event(node: Node, key: str, message: Message) -> None:
    match message:
        case {"hello": "shim", "state": "exited"} | {"event": "exited"}:
            exited(node, key, message)
        case {"hello": "shim", "state": "running"} | {"event": "started"}:
            # The start is ours, or an earlier daemon's that did not see the end of it.
            container = node.registry.containers.get(key)
            if container is not None and container.state is ContainerState.STARTING:
                _running(node, container, _started(message))
        case {"event": "failed"}:
            start_failed(node, key, message["error"])
        case {"event": "gone"}:
            _gone(node, key)


def _on_close(node: Node, key: str) -> None:
    node.links.pop(key, None)
    settle(node, key)
    if (event := node.exits.get(key)) is not None and event.is_set():
        _gone(node, key)


def _gone(node: Node, key: str) -> None:
    """Nothing of the container runs any more: its root file system need not stay mounted."""
    event = node.gone.get(key)
    if event is None or event.is_set():
        return
    event.set()
    if key in node.registry.containers:
        node.background(filesystems.unmount(node, key), "unmount of an exited container's files failed")


def _exit_record(node: Node, key: str) -> Message | None:
    try:
        with open(os.path.join(node.container_dir(key), "exit.json")) as f:
            found: Message = json.load(f)
            return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        log.exception("an exit record cannot be read", container=key, error=str(e))
        return None


def _watch(node: Node, key: str, pidfd: int) -> None:
    """A process descriptor becomes readable when its process ends (pidfd_open(2))."""
    loop = asyncio.get_running_loop()

    def ended() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        _unknown(node, key)

    loop.add_reader(pidfd, ended)


def _unknown(node: Node, key: str) -> None:
    """A container has ended whose shim was gone before it: where nobody knows better, with a code that says so."""
    container = node.registry.containers.get(key)
    if container is None:
        return
    if container.state in _ALIVE:
        words = "the container's shim ended without a record of its exit"
        node.registry.observe(container.ended(255, "Unknown", words))
    _wake(node, key)

    async def clean() -> None:
        sandbox = node.registry.sandbox(container.sandbox_id)
        await _end_shim(node, key)  # or the runtime that it was running
        await destroy(node, key, sandbox.runtime, sandbox.cgroup_parent)
        _gone(node, key)

    node.background(clean(), "clean-up after a lost shim failed")
