"""The daemon's side of the nursery: its start, and a start that fails."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from criserver.errors import CriError, UnavailableError
from criserver.runtime import nursery as nursery_module
from criserver.runtime.nursery import Nursery
from shims import launch
from tests.support.waiting import until


async def test_a_started_nursery_has_greeted_and_ends_with_its_daemon() -> None:
    nursery = Nursery()
    await nursery.start()
    await nursery.stop()
    assert nursery._process is not None
    assert nursery._process.returncode == 0


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "import os; os.write(int(os.sys.argv[1]), b'HTTP/1.1 200')"])
async def test_a_nursery_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(launch, "command", lambda python, fd: [sys.executable, "-c", code, str(fd)])
    nursery = Nursery()
    with pytest.raises(CriError, match="nursery of shims does not start"):
        await nursery.start()
    await nursery.stop()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["ends", "is stuck"])
async def test_forks_under_way_hear_that_the_nursery_is_gone_and_the_next_ones_succeed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    """Each of them is made again by its caller: it is no fault of a container."""
    monkeypatch.setattr(nursery_module, "FORK_TIMEOUT", 0.3)
    nursery = Nursery()
    await nursery.start()
    assert nursery._process is not None
    first = nursery._process.pid
    os.kill(first, signal.SIGSTOP)
    config = {"id": "x", "directory": str(tmp_path), "bundle": str(tmp_path)}
    forks = [asyncio.ensure_future(nursery.fork(config, Mock(), Mock())) for _ in range(3)]  # type: ignore[arg-type]
    await asyncio.sleep(0)
    if number == signal.SIGKILL:
        os.kill(first, number)
    outcomes = await asyncio.gather(*forks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [UnavailableError] * 3
    await until(lambda: not os.path.exists(f"/proc/{first}"))
    await nursery.start()
    assert nursery._process.pid != first
    await nursery.stop()
