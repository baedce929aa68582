"""A connection to a shim: late answers, events that cannot be taken, and messages of shims of 0.1.0."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from typing import Any

import pytest

from criserver.errors import CriError, DeadlineExceededError
from criserver.runtime.shim_link import ShimLink, present_shape
from shims import messages, wire

START = {"start_ticks": 8, "started_at": 9}
END = {"code": 137, "finished_at": 10, "oom_killed": False}


def old_greeting(state: str, **keys: Any) -> dict[str, Any]:
    return {"hello": "shim", "version": 1, "container": "c", "pid": 1, "state": state, **keys}


@pytest.mark.parametrize(
    ("old", "present", "kind"),
    [
        (old_greeting("starting", init=None), {}, messages.StartingGreeting),
        (old_greeting("running", init=7, **START), {"init": 7}, messages.RunningGreeting),
        (old_greeting("exited", init=7, **START, **END, signal=9), {"init": 7}, messages.ExitedGreeting),
        ({"event": "started", "pid": 7, **START}, {"init": 7}, messages.StartedEvent),
        ({"event": "failed", "error": "no"}, {"error": "no", "late": False}, messages.FailedEvent),
        ({"event": "exited", **START, **END, "signal": 9}, {"code": 137}, messages.ExitedEvent),
        ({"event": "gone"}, {}, messages.GoneEvent),
        ({"event": "gone", "error": "no"}, {"error": "no"}, messages.GoneEvent),
        (
            {"event": "exec-failed", "exec": "e", "error": "no"},
            {"exec_id": "e", "error": "no", "late": False},
            messages.ExecFailedEvent,
        ),
        ({"event": "exec-exited", "exec": "e", "code": 4, "signal": 0}, {"exec_id": "e"}, messages.ExecExitedEvent),
    ],
)
def test_a_message_of_a_shim_of_0_1_0(old: dict[str, Any], present: dict[str, Any], kind: Any) -> None:
    shaped: dict[str, Any] = dict(present_shape(dict(old)))
    assert shaped.items() >= present.items()
    assert shaped.keys() >= kind.__required_keys__
    assert not shaped.keys() & {"pid", "exec"}


@pytest.mark.parametrize(
    ("sent", "present"),
    [
        ({"event": "started", "init": 7, "pid": 7, **START}, {"event": "started", "init": 7, **START}),
        ({"event": "started", "init": 7, **START}, {"event": "started", "init": 7, **START}),
        (
            {"event": "exec-failed", "exec_id": "e", "exec": "e", "error": "no", "late": True},
            {"event": "exec-failed", "exec_id": "e", "error": "no", "late": True},
        ),
        ({"event": "of a later version", "pid": 3}, {"event": "of a later version", "pid": 3}),
    ],
)
def test_a_message_of_a_present_or_later_shim(sent: dict[str, Any], present: dict[str, Any]) -> None:
    assert present_shape(dict(sent)) == present


async def test_a_link_hands_on_the_present_shape_alone() -> None:
    ours, theirs = socket.socketpair()
    taken: list[Any] = []
    link = ShimLink(ours, taken.append, lambda: None)
    with theirs:
        theirs.sendall(wire.encode({"event": "started", "pid": 7, **START}))
    while not link.closed:
        await asyncio.sleep(0)
    assert taken == [{"event": "started", "init": 7, **START}]


async def test_an_answer_that_comes_with_the_end_of_its_time_counts() -> None:
    """A daemon that was busy, or a machine that was asleep, hears of both at once; an answer may bring descriptors."""
    ours, theirs = socket.socketpair()
    link = ShimLink(ours, lambda _: None, lambda: None)
    asking = asyncio.create_task(link.request({"op": "attach", "streams": []}, timeout=0.05))
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


async def test_an_event_that_cannot_be_taken_does_not_cost_the_next() -> None:
    """Both may come at the same time, and the next may be an exit."""
    ours, theirs = socket.socketpair()
    taken: list[object] = []

    def take(message: Any) -> None:
        if message["event"] == "started":
            raise CriError("refused")
        taken.append(message["event"])

    link = ShimLink(ours, take, lambda: taken.append("closed"))
    theirs.sendall(wire.encode({"event": "started"}) + wire.encode({"event": "exited"}))
    theirs.close()
    while not link.closed:
        await asyncio.sleep(0)
    assert taken == ["exited", "closed"]
