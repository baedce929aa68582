"""The daemon's side of the nursery and of shims: starts, one that fails, and an answer that is late."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time

import pytest

from criserver.errors import CriError, DeadlineExceededError
from criserver.runtime.nursery import Nursery
from criserver.runtime.shim_link import ShimLink
from shims import launch, wire


async def test_a_started_nursery_has_greeted_and_ends_with_its_daemon():
    nursery = Nursery()
    await nursery.start()
    await nursery.stop()
    assert nursery._process is not None
    assert nursery._process.returncode == 0


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "import os; os.write(int(os.sys.argv[1]), b'HTTP/1.1 200')"])
async def test_a_nursery_that_does_not_start_is_told(monkeypatch, code):
    monkeypatch.setattr(launch, "command", lambda python, fd: [sys.executable, "-c", code, str(fd)])
    nursery = Nursery()
    with pytest.raises(CriError, match="nursery of shims does not start"):
        await nursery.start()
    await nursery.stop()


async def test_an_answer_that_comes_with_the_end_of_its_time_counts():
    """A daemon that was busy, or a machine that was asleep, hears of both at once; an answer may bring descriptors."""
    ours, theirs = socket.socketpair()
    link = ShimLink(ours, lambda _: None, lambda: None)
    asking = asyncio.create_task(link.request({"op": "attach"}, timeout=0.05))
    await asyncio.sleep(0)
    with open(os.devnull) as null:
        socket.send_fds(theirs, [wire.encode({"re": 1, "ok": True, "fds": 1})], [null.fileno()])
    time.sleep(0.1)  # noqa: ASYNC251 - busy
    (fd,) = await asking
    os.close(fd)
    with pytest.raises(DeadlineExceededError, match="'status' within"):
        await link.request({"op": "status"}, timeout=0.01)
    link.close()
    theirs.close()


async def test_an_event_that_cannot_be_taken_does_not_cost_the_next():
    """Both may come in one breath, and the next may be an exit."""
    ours, theirs = socket.socketpair()
    taken = []

    def take(message: wire.Message) -> None:
        if message["event"] == "started":
            raise CriError("refused")
        taken.append(message["event"])

    link = ShimLink(ours, take, lambda: taken.append("closed"))
    theirs.sendall(wire.encode({"event": "started"}) + wire.encode({"event": "exited"}))
    theirs.close()
    while not link.closed:
        await asyncio.sleep(0)
    assert taken == ["exited", "closed"]
