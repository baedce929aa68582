"""The socket for the terminal of a command in a container, and its pipes."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import stat
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import cast

import pytest

from criserver.runtime import container_exec
from criserver.runtime.container_stream import _let_go
from criserver.runtime.exec_process import Console
from criserver.runtime.node import Node


def descriptors() -> set[str]:
    """What is open; not what earlier tests' rubbish has open, which may be collected at any moment."""
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


@contextmanager
def room_for(count: int) -> Iterator[None]:
    """No more than so many descriptors can be opened."""
    free = os.open("/", os.O_PATH)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


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
        await asyncio.sleep(0.01)  # the task waits for a connection
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
