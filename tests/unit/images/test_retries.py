"""Retry-After, and the waits between attempts."""

from __future__ import annotations

import asyncio
import time
from email.utils import formatdate

import pytest

from criserver.images import retries
from criserver.images.retries import Retries, retry_after


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("17", 17), (" 5 ", 5), ("", 0), ("-1", 0), ("soon", 0), ("1e3", 0), ("9" * 30, 0)]
)
def test_retry_after_in_seconds(text: str, seconds: int) -> None:
    assert retry_after({"Retry-After": text}) == seconds
    assert retry_after({}) == 0


def test_retry_after_as_a_date() -> None:
    assert retry_after({"Retry-After": formatdate(time.time() + 1000, usegmt=True)}) == pytest.approx(1000, abs=60)
    assert retry_after({"Retry-After": formatdate(time.time() - 100, usegmt=True)}) == 0


async def waits(patience: float, monkeypatch: pytest.MonkeyPatch, after: float = 0.0) -> list[float]:
    found = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    tries = Retries(patience)
    while await tries.wait(after):
        pass
    return found


async def test_waits_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    found = await waits(60, monkeypatch)
    assert len(found) == 4
    assert all(0.25 * 2**n <= pause <= 0.5 * 2**n for n, pause in enumerate(found))


async def test_waits_are_as_long_as_the_server_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await waits(60, monkeypatch, after=10) == [10] * 4


async def test_nobody_waits_beyond_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await waits(5, monkeypatch, after=10) == []


async def test_a_queue_is_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_FIRST_WAIT", 0)
    tries = Retries(0)
    tries.forgive(60)
    assert await tries.wait(0)
    assert not await Retries(0).wait(0)


async def test_progress_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_FIRST_WAIT", 0)
    tries = Retries(60)
    for _ in range(10):
        assert await tries.wait(0)
        assert await tries.wait(0)
        tries.progressed()
