"""The daemon's messages to systemd and its questions, on a socket that is read as systemd reads it."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from criserver.runtime import service_manager
from tests.support.waiting import until


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket that $NOTIFY_SOCKET names."""
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield receiver


def received(manager: socket.socket) -> list[str]:
    found = []
    while True:
        try:
            found.append(manager.recv(4096).decode())
        except BlockingIOError:
            return found


def test_it_is_told_of_states(manager: socket.socket) -> None:
    service_manager.notify("READY=1", "STATUS=2 pods")
    assert received(manager) == ["READY=1\nSTATUS=2 pods"]


def test_an_abstract_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"criserver-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        service_manager.notify("READY=1")
        assert receiver.recv(100) == b"READY=1"


def test_one_that_does_not_read_is_not_waited_for(manager: socket.socket) -> None:
    start = time.monotonic()
    for _ in range(2000):
        service_manager.notify("WATCHDOG=1")
    assert time.monotonic() - start < 30


def test_without_one_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    service_manager.notify("READY=1")


@pytest.mark.parametrize(
    ("usec", "pid", "interval"),
    [
        ("3000000", str(os.getpid()), 1.5),
        ("3000000", "", 1.5),
        ("3000000", "1", None),
        ("0", "", None),
        ("", "", None),
        ("soon", "", None),
    ],
    ids=["own PID", "no PID", "another's PID", "zero", "empty", "no number"],
)
def test_the_interval_is_half_of_what_the_watchdog_waits(
    monkeypatch: pytest.MonkeyPatch, usec: str, pid: str, interval: float | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", pid)
    assert service_manager.watchdog_interval() == interval


async def test_pings_come_as_long_as_the_loop_runs(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "40000")
    count = iter(range(1000))
    task = asyncio.create_task(service_manager.report(lambda: f"{next(count)} pods"))
    pings: list[str] = []
    await until(lambda: pings.extend(received(manager)) or len(pings) >= 5)
    assert pings == [f"STATUS={n} pods\nWATCHDOG=1" for n in range(len(pings))]
    time.sleep(0.3)  # the loop stands still  # noqa: ASYNC251
    assert received(manager) == []
    await until(lambda: received(manager))
    task.cancel()


async def test_without_a_watchdog_it_is_told_how_things_are(manager: socket.socket) -> None:
    task = asyncio.create_task(service_manager.report(lambda: "3 pods"))
    told: list[str] = []
    await until(lambda: told.extend(received(manager)) or told)
    assert told == ["STATUS=3 pods"]
    task.cancel()


async def test_a_daemon_that_systemd_has_not_started_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    await asyncio.wait_for(service_manager.report(lambda: "3 pods"), 30)


def test_nothing_is_put_apart_where_systemd_has_not_started_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INVOCATION_ID", raising=False)
    assert service_manager.own_scope("x") == []
