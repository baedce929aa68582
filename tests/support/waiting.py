"""Waits of tests: for a condition, and for how long at most.

A test that passes waits no longer than it must. What it would wait at most is generous: a machine has other work too.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

T = TypeVar("T")

# By how much longer everything may take than on a machine of usual speed.
SLOWNESS = float(os.environ.get("E2E_SLOWNESS", "1"))


def eventually(found: Callable[[], T], seconds: float = 30, told: Callable[[], str] = str, every: float = 0.01) -> T:
    """What ``found()`` is once it is true, within so many seconds of a machine of usual speed.

    Raises AssertionError with what ``told()`` says if it does not come true. ``every`` is in seconds.
    """
    deadline = time.monotonic() + seconds * SLOWNESS
    while not (got := found()):
        assert time.monotonic() < deadline, f"it did not come true within {seconds * SLOWNESS:g} s\n{told()}"
        time.sleep(every)
    return got


async def until(true: Callable[[], object], seconds: float = 30) -> None:
    """Let other tasks work until ``true()`` holds."""
    deadline = time.monotonic() + seconds * SLOWNESS
    while not true():
        assert time.monotonic() < deadline, f"it did not come true within {seconds * SLOWNESS:g} s"
        await asyncio.sleep(0.005)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """The block is done in so many seconds of a machine of usual speed: it does not wait for what takes longer."""
    begun = time.monotonic()
    yield
    took = time.monotonic() - begun
    assert took < seconds * SLOWNESS, f"it took {took:.1f} s"


async def cancelled(call: Coroutine[object, object, object]) -> None:
    task = asyncio.ensure_future(call)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """End a program by SIGTERM, and by SIGKILL if it has not ended after so many seconds."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
