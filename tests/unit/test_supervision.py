"""What a shim tells, and when, as it becomes a container's record: what cannot be had in time with a real one."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from criserver.errors import CriError
from criserver.runtime import supervision
from criserver.runtime.lifecycle import ContainerState, EventType, SandboxState, told
from criserver.runtime.records import Container
from criserver.runtime.registry import Registry
from criserver.runtime.supervision import Started
from tests.unit.test_lifecycle import FakeStore, brought_to, container, sandbox

STARTED = {"event": "started", "pid": 7, "start_ticks": 8, "started_at": 9}
EXITED = {"event": "exited", "code": 3, "start_ticks": 8, "started_at": 9, "finished_at": 10}


class FakeNode(SimpleNamespace):
    """What supervision takes of a node, with one container "c" in a state, and the events that it would tell."""

    def __init__(self, directory: str, state: ContainerState) -> None:
        registry = Registry(FakeStore())
        brought_to(registry, pod := sandbox("p", SandboxState.READY))
        brought_to(registry, container("c", pod, state))
        self.told: list[EventType] = []
        registry.watch(lambda old, new: self.told.extend(told(old and old.state, new and new.state)))
        super().__init__(
            registry=registry,
            exits={"c": asyncio.Event()},
            gone={"c": asyncio.Event()},
            links={},
            starts={},
            stats=Mock(),
            nursery=Mock(),
            handler=lambda name: SimpleNamespace(name="r", path="true"),
            container_dir=lambda key: directory,
            runtime_root=lambda handler: directory,
            background=lambda work, what: work.close(),
        )

    @property
    def container(self) -> Container:
        return self.registry.containers["c"]


@pytest.fixture
def node(tmp_path, request) -> FakeNode:
    return FakeNode(str(tmp_path), getattr(request, "param", ContainerState.STARTING))


@pytest.fixture
def process():
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


async def start(node: FakeNode, *messages: dict[str, object], cut: bool = False) -> Started:
    """Start "c" with a shim that says these messages in one breath, when its start has been cut or before."""

    async def fork(config, on_event, on_close):
        def speak() -> None:
            for message in messages:
                on_event(message)

        loop = asyncio.get_running_loop()
        if cut:
            loop.call_soon(supervision.cut_start, node, "c")
            loop.call_later(0.05, speak)  # within the time that a shim has for its first word
        else:
            loop.call_soon(speak)
        return Mock()

    node.nursery.fork = fork
    with supervision.under_way(node, "c"):
        return await supervision.start(node, "c", handler="", cgroup_parent="/p")


async def test_a_container_that_has_exited_before_its_starter_looks_has_been_running(node: FakeNode):
    assert await start(node, {"hello": "shim", "state": "starting"}, STARTED, EXITED) == Started(7, 8, 9)
    assert node.told == [EventType.STARTED, EventType.STOPPED]
    found = node.container
    assert (found.state, found.exit_code, found.reason) == (ContainerState.EXITED, 3, "Error")
    assert (found.pid, found.start_ticks, found.started_at, found.finished_at) == (7, 8, 9, 10)
    assert node.exits["c"].is_set()


async def test_a_start_that_succeeds_while_it_is_cut_is_one(node: FakeNode):
    """The stop that has cut it finds it running, and ends it as such."""
    assert await start(node, {"hello": "shim", "state": "starting"}, STARTED, cut=True) == Started(7, 8, 9)
    assert node.container.state is ContainerState.RUNNING
    assert node.told == [EventType.STARTED]


@pytest.mark.parametrize(
    ("record", "pid"),
    [
        ({"hello": "shim", "state": "exited", "pid": 1, "init": 7, **EXITED}, 7),
        (EXITED, 0),
    ],
    ids=["a greeting", "a record on disk"],
)
async def test_an_exit_from_a_start_that_an_earlier_daemon_began_tells_of_both(node: FakeNode, record, pid):
    supervision.exited(node, "c", record)
    supervision.exited(node, "c", record)
    assert node.told == [EventType.STARTED, EventType.STOPPED]
    found = node.container
    assert (found.pid, found.start_ticks, found.started_at, found.finished_at) == (pid, 8, 9, 10)
    assert (found.state, found.exit_code) == (ContainerState.EXITED, 3)


@pytest.mark.parametrize("node", [ContainerState.RUNNING], indirect=True)
async def test_whoever_waits_for_an_exit_is_woken_whatever_its_record_is(node: FakeNode):
    with pytest.raises(KeyError):
        supervision.exited(node, "c", {"event": "exited"})
    assert node.exits["c"].is_set()


@pytest.mark.parametrize("node", [ContainerState.STARTING], indirect=True)
async def test_a_start_of_which_nobody_knows_how_it_went_is_not_told_as_one(node: FakeNode):
    supervision.settle(node, "c")
    assert (node.container.exit_code, node.container.reason) == (255, "Unknown")
    assert node.told == [EventType.STOPPED]


@pytest.mark.parametrize("node", [ContainerState.RUNNING], indirect=True)
@pytest.mark.parametrize("after", ["ended", "removing", "gone"])
async def test_an_end_that_is_seen_late_takes_the_place_of_nothing(
    node: FakeNode, process: subprocess.Popen[bytes], monkeypatch, after: str
):
    """A container without a shim ends; its code has come from elsewhere, or it is removed, before the kernel tells."""
    seen: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    unknown = supervision._unknown

    def see(*arguments) -> None:
        try:
            seen.set_result(unknown(*arguments))
        except Exception as e:
            seen.set_exception(e)

    monkeypatch.setattr(supervision, "_unknown", see)
    ticks = supervision.host.start_ticks(process.pid)
    node.registry.save(dataclasses.replace(node.container, pid=process.pid, start_ticks=ticks))
    supervision.settle(node, "c")
    if after == "ended":
        supervision.exited(node, "c", EXITED)
    else:
        node.registry.observe(dataclasses.replace(node.container, state=ContainerState.REMOVING))
        if after == "gone":
            node.registry.forget(node.container)
    before = node.registry.containers.get("c")
    process.kill()
    await seen
    assert node.registry.containers.get("c") == before
    assert node.exits["c"].is_set() == (after != "gone")


async def test_a_step_that_the_table_does_not_have_costs_no_exit(node: FakeNode, monkeypatch):
    monkeypatch.setattr(node.registry, "observe", Mock(side_effect=CriError("no such step")))
    with pytest.raises(CriError):
        supervision.exited(node, "c", EXITED)
    assert node.exits["c"].is_set()
