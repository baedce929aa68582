"""Shims of release 0.1.0: this daemon understands their messages, and they understand its requests.

A shim outlives an upgrade of the daemon for as long as its container runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from criserver.runtime.shim_link import ShimLink, connect
from shims.messages import ExecRequest
from tests.support.shimhost import WAIT, Container, Host, members, process_spec, rootfs
from tests.support.waiting import eventually
from tests.vm.releases import RELEASES, has

__all__ = ["rootfs"]

COMMIT = RELEASES["0.1.0"]
PROJECT = str(Path(__file__).parents[3])

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("runc") or not shutil.which("busybox"),
    reason="needs root, runc and busybox",
)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package `shims` of 0.1.0."""
    if not has(PROJECT, COMMIT):
        pytest.skip(f"this clone has not commit {COMMIT[:7]} of 0.1.0; `git fetch --unshallow` brings it")
    archive = subprocess.run(["git", "-C", PROJECT, "archive", COMMIT, "shims"], capture_output=True, check=True)
    directory = tmp_path_factory.mktemp("release")
    subprocess.run(["tar", "-x", "-C", str(directory)], input=archive.stdout, check=True)
    return directory


@pytest.fixture
async def container(rootfs: Path, release: Path) -> AsyncIterator[Container]:
    host = Host(rootfs, release)
    try:
        host.nursery.greeting()
        container = host.fork(host.prepare("c", "sh", "-c", "while :; do sleep 0.1; done"))
        started = container.client.expect("started")
        assert "init" not in started  # this is a shim of 0.1.0
        container.init = started["pid"]
        yield container
    finally:
        host.close()


async def until(done: Callable[[], Any]) -> None:
    """Wait on the event loop, which has the connection."""
    async with asyncio.timeout(WAIT):
        while not done():
            await asyncio.sleep(0.01)


def linked(container: Container) -> tuple[ShimLink, list[Any]]:
    """A daemon's connection, and what comes by it."""
    told: list[Any] = []
    return connect(str(container.directory / "state" / "shim.sock"), told.append, lambda: None), told


async def test_a_container_of_an_old_shim_from_the_greeting_to_the_end(container: Container) -> None:
    link, told = linked(container)
    with closing(link):
        await until(lambda: told)
        greeting = told.pop()
        assert (greeting["state"], greeting["init"]) == ("running", container.init)
        assert {"start_ticks", "started_at"} <= greeting.keys()
        assert "pid" not in greeting
        assert await link.request({"op": "status"}) == []
        assert await link.request({"op": "reopen"}) == []
        container.kill()
        await until(lambda: len(told) == 2)
    exited, gone = told
    assert (exited["event"], exited["code"], exited["oom_killed"]) == ("exited", 137, False)
    assert exited["started_at"] < exited["finished_at"]
    assert gone == {"event": "gone"}


def has_exec(told: list[dict[str, Any]]) -> bool:
    return bool(told) and "exec_id" in told[-1]


async def test_an_exec_by_an_old_shim(container: Container) -> None:
    for args, end in ((("sh", "-c", "exit 4"), ("exec-exited", 4)), (("no-such-command",), ("exec-failed", None))):
        link, told = await _exec(container, *args)
        with closing(link):
            await until(partial(has_exec, told))
            assert (told[-1]["exec_id"], told[-1]["event"], told[-1].get("code")) == ("e1", *end)
            assert told[-1].get("late", False) is False


async def test_an_exec_by_an_old_shim_ends_with_its_connection(container: Container) -> None:
    link, _ = await _exec(container, "sleep", "999")
    await until(lambda: b"999" in _command_lines())
    link.close()
    eventually(lambda: b"999" not in _command_lines())


def _command_lines() -> bytes:
    found = b""
    for pid in members("c"):
        with suppress(OSError):  # it has ended
            found += Path(f"/proc/{pid}/cmdline").read_bytes()
    return found


async def _exec(container: Container, *args: str) -> tuple[ShimLink, list[Any]]:
    spec = container.directory / "e1.json"
    spec.write_text(json.dumps(process_spec(args)))
    link, told = linked(container)
    request: ExecRequest = {"op": "exec", "exec_id": "e1", "spec": str(spec), "owned": True}
    with open(os.devnull, "r+b") as null:
        await link.request(request, [null.fileno()] * 3)
    return link, told
