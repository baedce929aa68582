"""The socket for the terminal of a command in a container, and its pipes."""

from __future__ import annotations

import asyncio
import gc
import os
import stat
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from criserver.errors import DeadlineExceededError
from criserver.runtime import container_exec, exec_process, process_records
from criserver.runtime.container_stream import _let_go
from criserver.runtime.exec_process import Console, ExecProcess
from criserver.runtime.node import Node
from criserver.runtime.output_room import OutputRoom
from criserver.runtime.records import Container
from tests.support.descriptors import room_for


def descriptors() -> set[str]:
    """What is open; not what earlier tests' rubbish has open, which may be collected at any moment."""
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


def test_the_console_socket_is_for_root_alone_and_touches_no_other_file(tmp_path: Path) -> None:
    """The umask is one for all threads, and others make directories meanwhile."""
    wrong: list[int] = []
    done = threading.Event()

    def others() -> None:
        while not done.is_set():
            os.mkdir(tmp_path / "other", 0o755)
            if (mode := stat.S_IMODE(os.stat(tmp_path / "other").st_mode)) != 0o755:
                wrong.append(mode)
            os.rmdir(tmp_path / "other")

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(3000):
            with closing(Console(str(tmp_path))) as console:
                assert stat.S_IMODE(os.stat(console.path).st_mode) == 0o600
    finally:
        done.set()
        thread.join()
    assert wrong == []
    assert os.listdir(tmp_path) == []


def test_a_console_for_which_there_is_no_descriptor_left_leaks_none(tmp_path: Path) -> None:
    before = descriptors()
    with room_for(1), pytest.raises(OSError, match="Too many open files"):
        Console(str(tmp_path))
    assert descriptors() == before


async def test_a_command_for_whose_pipes_there_is_no_descriptor_left_leaks_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(container_exec, "running_container", lambda node, given: None)
    before = descriptors()
    with room_for(2), pytest.raises(OSError, match="Too many open files"):
        await container_exec.exec_sync(cast(Node, None), "c", ["true"], 0)
    assert descriptors() == before


async def test_a_terminal_that_nobody_waits_for_any_more_is_closed(tmp_path: Path) -> None:
    before = descriptors()
    with closing(Console(str(tmp_path))) as console:
        arrival = asyncio.create_task(console.master())
        await asyncio.sleep(0)  # the task begins to wait for a connection
        await _let_go(arrival)
    assert descriptors() == before
    # The number of the listener's descriptor is another's next, and nothing is left that watches the old one.
    reader, writer = os.pipe()
    called = asyncio.Event()
    asyncio.get_running_loop().add_reader(reader, called.set)
    os.write(writer, b"x")
    await asyncio.wait_for(called.wait(), 30)
    asyncio.get_running_loop().remove_reader(reader)
    os.close(reader)
    os.close(writer)


class SlowRuntime:
    """A runtime that takes its time: the test says when the command runs and ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.process: ExecProcess
        self.asked = asyncio.Event()
        monkeypatch.setattr(container_exec, "running_container", lambda node, given: SimpleNamespace(id="c"))
        monkeypatch.setattr(container_exec, "exec_process", self._exec_process)

    @asynccontextmanager
    async def _exec_process(self, *_: Any, **__: Any) -> AsyncIterator[ExecProcess]:
        loop = asyncio.get_running_loop()
        self.process = ExecProcess(loop.create_future(), loop.create_future())
        self.asked.set()
        yield self.process


def begin(timeout: float) -> asyncio.Task[container_exec.ExecResult]:
    node = cast(Node, SimpleNamespace(output=OutputRoom(1 << 20)))
    return asyncio.create_task(container_exec.exec_sync(node, "c", ["probe"], timeout))


async def test_the_time_of_a_command_begins_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy node may take longer to start a probe than the probe itself may take."""
    runtime = SlowRuntime(monkeypatch)
    probe = begin(0.01)
    await runtime.asked.wait()
    await asyncio.wait({probe}, timeout=0.1)  # ten times as long as the command may take
    assert not probe.done()
    runtime.process.started.set_result(None)
    runtime.process.ended.set_result(0)
    assert (await probe).code == 0


async def test_a_command_that_runs_too_long_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SlowRuntime(monkeypatch)
    probe = begin(0.01)
    await runtime.asked.wait()
    runtime.process.started.set_result(None)
    with pytest.raises(DeadlineExceededError, match=r"timed out after 0\.01 s"):
        await probe


@pytest.mark.parametrize(("timeout", "limit"), [(0.01, 0.02), (0.03, 0.03)])
async def test_a_command_that_nobody_starts_is_late(
    timeout: float, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = SlowRuntime(monkeypatch)
    monkeypatch.setattr(container_exec, "_START_LIMIT", 0.02)
    probe = begin(timeout)
    await runtime.asked.wait()
    with pytest.raises(DeadlineExceededError, match=f"command 'probe' in container c did not start within {limit} s"):
        await probe


@pytest.mark.parametrize("version", [1, 2])
async def test_a_shim_of_before_0_3_0_does_not_tell_when_a_command_runs(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []

    class Link:
        async def request(self, *_: Any) -> None:
            """Asked, and not yet started."""

        def close(self) -> None:
            """The command has ended."""

    async def open_link(on_event: Any, _: Any) -> Link:
        events.append(on_event)
        on_event({"hello": "shim", "version": version, "state": "running"})
        return Link()

    shim = SimpleNamespace(shim=SimpleNamespace(open_link=open_link))
    monkeypatch.setattr(process_records, "of_container", lambda *_: shim)
    monkeypatch.setattr(exec_process, "stream_owner", lambda *_: None)
    monkeypatch.setattr(exec_process, "_write_process", lambda *_, **__: None)
    records = SimpleNamespace(sandbox=lambda _: None)
    node = cast(Node, SimpleNamespace(records=records, container_dir=lambda _: str(tmp_path)))
    container = cast(Container, SimpleNamespace(id="c", sandbox_id="p", user=None))
    async with exec_process.exec_process(node, container, ["probe"]) as process:
        assert process.started.done() is (version == 1)
        events[0]({"event": "exec-started", "exec": "e"})
        assert process.started.done()
        assert not process.ended.done()
