"""How messages of a shim change a container's record, in cases that a real shim cannot be made to show in time."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from criserver.errors import CriError, FailedPreconditionError, UnavailableError
from criserver.runtime import cgroups, container_process, pidfd, process_records
from criserver.runtime.container_process import ContainerProcess, Started
from criserver.runtime.lifecycle import ContainerState, EventType, SandboxState, events_of
from criserver.runtime.oci_runtime import OciRuntime
from criserver.runtime.record_store import RecordStore
from criserver.runtime.records import Container
from criserver.runtime.shim_link import ShimLink
from tests.support.records import container, sandbox
from tests.support.samples import FakeStore, brought_to
from tests.support.waiting import until

STARTED = {"event": "started", "init": 7, "start_ticks": 8, "started_at": 9}
EXITED = {"event": "exited", "code": 3, "start_ticks": 8, "started_at": 9, "finished_at": 10}


class FakeNode(SimpleNamespace):
    """What a process takes of a node, with one container "c" in a state, and the events that it would tell."""

    def __init__(self, directory: str, state: ContainerState) -> None:
        records = RecordStore(FakeStore())
        brought_to(records, pod := sandbox("p", SandboxState.READY))
        brought_to(records, container("c", pod, state))
        self.events: list[EventType] = []
        records.watch(lambda old, new: self.events.extend(events_of(old and old.state, new and new.state)))
        self.work: set[asyncio.Task[Any]] = set()
        super().__init__(
            records=records,
            processes={},
            stats=Mock(),
            nursery=Mock(),
            snapshotter=SimpleNamespace(unmount=self.unmount),
            cleanup_runtime=lambda name, _: OciRuntime(name, "true", directory),
            container_dir=lambda key: directory,
            rootfs=lambda key: os.path.join(directory, "rootfs"),
            unmounted=[],
        )

    async def unmount(self, point: str) -> None:
        self.unmounted.append(point)

    def background(self, work: Coroutine[Any, Any, Any], what: str) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self.work.add(task)
        return task

    @property
    def container(self) -> Container:
        return self.records.containers["c"]

    @property
    def process(self) -> ContainerProcess:
        return process_records.of_container(self, self.container)


@pytest.fixture(autouse=True)
def no_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "exists", lambda path: False)
    monkeypatch.setattr(cgroups, "thaw", lambda path: None)


@pytest.fixture
def node(tmp_path: Path, request: pytest.FixtureRequest) -> FakeNode:
    return FakeNode(str(tmp_path), getattr(request, "param", ContainerState.STARTING))


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a directory of its own."""
    (tmp_path / "sleeper").mkdir()
    with subprocess.Popen(["sleep", "60"], cwd=tmp_path / "sleeper") as process:
        yield process
        process.kill()


async def start(node: FakeNode, *messages: dict[str, object], cut: bool = False) -> Started:
    """Start "c" with a shim that says these messages at once; ``cut``: after its start has been cut."""
    process = node.process

    async def fork(config: object, on_event: Callable[..., object], on_close: Callable[..., object]) -> Mock:
        def speak() -> None:
            for message in messages:
                on_event(message)

        loop = asyncio.get_running_loop()
        if cut:
            loop.call_soon(process.cut_start)
            loop.call_later(0.05, speak)  # within the time that a shim has for its first word
        else:
            loop.call_soon(speak)
        return Mock()

    node.nursery.fork = fork
    with process.start_under_way():
        return await process.start()


async def test_a_container_that_has_exited_before_its_starter_looks_has_been_running(node: FakeNode) -> None:
    assert await start(node, {"hello": "shim", "state": "starting"}, STARTED, EXITED) == Started(7, 8, 9)
    assert node.events == [EventType.STARTED, EventType.STOPPED]
    found = node.container
    assert (found.state, found.exit_code, found.reason) == (ContainerState.EXITED, 3, "Error")
    assert (found.pid, found.start_ticks, found.started_at, found.finished_at) == (7, 8, 9, 10)
    assert node.process.exited.is_set()


async def test_a_start_that_succeeds_while_it_is_cut_is_one(node: FakeNode) -> None:
    """The stop that has cut it finds it running, and ends it as such."""
    assert await start(node, {"hello": "shim", "state": "starting"}, STARTED, cut=True) == Started(7, 8, 9)
    assert node.container.state is ContainerState.RUNNING
    assert node.events == [EventType.STARTED]


async def test_a_container_that_the_runtime_has_already_is_not_touched(node: FakeNode) -> None:
    os.mkdir(os.path.join(node.container_dir("c"), "c"))
    with pytest.raises(FailedPreconditionError, match=r"container c exists in .*: delete it"):
        await start(node)


@pytest.mark.parametrize("node", [ContainerState.RUNNING], indirect=True)
async def test_a_container_that_its_shim_could_not_delete_is_deleted_by_the_daemon(node: FakeNode) -> None:
    process = node.process
    process._on_event(EXITED)
    process._on_event({"event": "gone", "error": "runc fails"})
    assert not node.unmounted
    await process.wait_cleaned_up()
    await asyncio.gather(*node.work)
    assert node.unmounted == [node.rootfs("c")]


@pytest.mark.parametrize(
    ("record", "pid"),
    [
        ({"hello": "shim", "state": "exited", "init": 7, **EXITED}, 7),
        (EXITED, 0),
    ],
    ids=["a greeting", "a record on disk"],
)
async def test_an_exit_from_a_start_that_an_earlier_daemon_began_tells_of_both(
    node: FakeNode, record: dict[str, Any], pid: int
) -> None:
    node.process._take_exit(record)
    node.process._take_exit(record)
    assert node.events == [EventType.STARTED, EventType.STOPPED]
    found = node.container
    assert (found.pid, found.start_ticks, found.started_at, found.finished_at) == (pid, 8, 9, 10)
    assert (found.state, found.exit_code) == (ContainerState.EXITED, 3)


@pytest.mark.parametrize("node", [ContainerState.RUNNING], indirect=True)
async def test_those_who_wait_for_an_exit_are_woken_whatever_its_record_is(node: FakeNode) -> None:
    with pytest.raises(KeyError):
        node.process._take_exit({"event": "exited"})
    assert node.process.exited.is_set()


async def test_a_start_of_which_nobody_knows_how_it_went_is_not_told_as_one(node: FakeNode) -> None:
    node.process.without_shim()
    assert (node.container.exit_code, node.container.reason) == (255, "Unknown")
    assert node.events == [EventType.STOPPED]
    await asyncio.gather(*node.work)


@pytest.mark.parametrize("node", [ContainerState.RUNNING], indirect=True)
@pytest.mark.parametrize("after", ["ended", "removing", "gone"])
async def test_an_end_that_is_seen_late_takes_the_place_of_nothing(
    node: FakeNode, sleeper: subprocess.Popen[bytes], after: str
) -> None:
    """A container without a shim ends; its code has come from elsewhere, or it is removed, before the kernel tells."""
    process = node.process
    process.started = Started(sleeper.pid, pidfd.start_ticks(sleeper.pid), 9)
    process.without_shim()
    if after == "ended":
        process._take_exit(EXITED)
    else:
        node.records.observe(dataclasses.replace(node.container, state=ContainerState.REMOVING))
        if after == "gone":
            await node.records.forget(node.container)
    before = node.records.containers.get("c")
    sleeper.kill()
    await until(lambda: process._cleaning is not None)
    await process.wait_cleaned_up()
    assert node.records.containers.get("c") == before
    assert process.exited.is_set()


async def test_a_step_that_the_table_does_not_have_costs_no_exit(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node.records, "observe", Mock(side_effect=CriError("no such step")))
    with pytest.raises(CriError):
        node.process._take_exit(EXITED)
    assert node.process.exited.is_set()


@pytest.mark.parametrize("node", [ContainerState.RUNNING], indirect=True)
async def test_a_shim_that_ends_before_it_has_cleaned_up_leaves_that_to_the_daemon(node: FakeNode) -> None:
    process = node.process
    process._take_exit(EXITED)
    process.without_shim()
    assert not node.unmounted
    await process.wait_cleaned_up()
    await asyncio.gather(*node.work)
    assert node.unmounted == [node.rootfs("c")]


@pytest.mark.parametrize("node", [ContainerState.RUNNING], indirect=True)
async def test_an_end_that_a_stuck_shim_does_not_tell_is_kept_for_the_next_daemon(
    node: FakeNode, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has its code only until the shim, its parent, is ended."""
    monkeypatch.setattr(container_process, "_SHIM_PATIENCE", 0.01)
    process = node.process
    process.started = Started(sleeper.pid, pidfd.start_ticks(sleeper.pid), 9)
    await process.kill(5)
    assert node.container.exit_code == 137
    late = FakeNode(node.container_dir("c"), ContainerState.RUNNING)
    late.process.without_shim()
    assert (late.container.exit_code, late.container.reason) == (137, "Error")
    await asyncio.gather(*late.work)


@pytest.mark.parametrize("ends", [True, False], ids=["that ends", "that is stopped"])
async def test_a_shim_does_not_outlive_its_container(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """It has told of everything, and the container is removed with its directory."""
    monkeypatch.setattr(container_process, "_GONE_PATIENCE", 0.05)
    directory = tmp_path / "sleeper"
    process = (node := FakeNode(str(directory), ContainerState.EXITED)).process
    ours, theirs = socket.socketpair()
    process.shim._link = ShimLink(ours, Mock(), Mock())
    directory.rmdir()
    process.let_go()
    if ends:
        theirs.close()
    await until(lambda: process.shim._abandoned)
    await asyncio.gather(*node.work)
    assert ours.fileno() < 0
    theirs.close()
    if ends:
        assert sleeper.poll() is None
    else:
        assert sleeper.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("node", [ContainerState.RUNNING], indirect=True)
@pytest.mark.parametrize("room", ["the record", "the process", "its start"])
async def test_a_process_that_cannot_be_looked_at_has_not_ended(
    node: FakeNode, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, room: str
) -> None:
    """The daemon has no descriptor left when a shim dies."""
    monkeypatch.setattr(container_process, "_ASK_AGAIN", 0.01)
    process = node.process
    process.started = Started(sleeper.pid, pidfd.start_ticks(sleeper.pid), 9)
    refused = Mock(side_effect=OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    with monkeypatch.context() as patch:
        if room == "the process":
            patch.setattr(os, "pidfd_open", refused)
        else:
            patch.setattr(container_process if room == "the record" else pidfd, "open", refused, raising=False)
        process.without_shim()
        if room != "the record":
            with pytest.raises(OSError, match="open files"):
                process.signal(signal.SIGTERM)
        await until(lambda: refused.call_count > 2)
        assert node.container.state is ContainerState.RUNNING
    sleeper.kill()
    await until(process.exited.is_set)
    assert (node.container.exit_code, node.container.reason) == (255, "Unknown")
    await process.wait_cleaned_up()


async def test_a_start_is_made_once_more_if_the_nursery_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first nursery may have forked is ended before."""
    process = FakeNode(str(tmp_path), ContainerState.STARTING).process
    steps = Mock()
    steps.fork = AsyncMock(side_effect=[UnavailableError("it has ended"), None])
    steps.end, steps.destroy = AsyncMock(return_value=[]), AsyncMock()
    monkeypatch.setattr(process.shim, "fork", steps.fork)
    monkeypatch.setattr(process.shim, "end", steps.end)
    monkeypatch.setattr(process, "destroy", steps.destroy)
    await process._fork(Mock(), Mock(), Mock())
    assert [call[0] for call in steps.mock_calls] == ["fork", "end", "destroy", "fork"]
    steps.reset_mock()
    steps.fork.side_effect = [UnavailableError("it has ended")] * 2
    with pytest.raises(UnavailableError):
        await process._fork(Mock(), Mock(), Mock())
    assert [call[0] for call in steps.mock_calls] == ["fork", "end", "destroy", "fork", "end", "destroy"]


async def test_a_process_that_may_have_run_is_not_started_a_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = FakeNode(str(tmp_path), ContainerState.STARTING).process
    Path(process.shim._socket).touch()
    fork = AsyncMock(side_effect=UnavailableError("it has ended"))
    monkeypatch.setattr(process.shim, "fork", fork)
    monkeypatch.setattr(process, "destroy", AsyncMock())
    with pytest.raises(UnavailableError):
        await process._fork(Mock(), Mock(), Mock())
    assert fork.await_count == 1
