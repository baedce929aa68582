"""Spans: the parts of a call, in the order and below the part in which they are, and what is kept of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping
from typing import ClassVar

import pytest

from criserver.telemetry import spans
from criserver.telemetry.spans import MAX_BYTES, MAX_CALLS, MAX_SPANS, Operation, Sample, Trace, held, within

OUTER, INNER = Operation("outer"), Operation("inner", "what")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(spans, "_kept", deque())
    monkeypatch.setattr(spans, "_kept_bytes", 0)
    yield
    assert not spans._under_way


def begun(method: str = "RunPodSandbox", **about: object) -> Trace:
    trace = spans.traced("runtime.v1.RuntimeService", method, 7, about, {})
    assert trace is not None
    return trace


def parts(trace: Trace) -> list[tuple[str, int]]:
    return [(" ".join((span.operation.name, *span.values)), span.parent) for span in trace.spans]


async def test_parts_are_below_the_part_in_which_they_are() -> None:
    trace = begun()
    with within(trace):
        with OUTER.timed():
            with INNER.timed("a"):
                pass
            # Tasks belong to the part that begins them, also when both are under way.
            await asyncio.gather(*(asyncio.create_task(one(name)) for name in "bc"))
        with INNER.timed("d"):
            pass
    assert parts(trace) == [("outer", -1), ("inner a", 0), ("inner b", 0), ("inner c", 0), ("inner d", -1)]
    outer, first = trace.spans[:2]
    assert outer.seconds is not None and first.seconds is not None
    assert outer.began <= first.began <= first.began + first.seconds <= outer.began + outer.seconds
    trace.answered("OK", "")
    assert (trace.is_complete, trace.code, spans.traces()) == (True, "OK", [trace])


async def one(name: str) -> None:
    with INNER.timed(name):
        await asyncio.sleep(0)


async def test_a_callback_that_was_set_in_a_part_that_has_ended_is_below_what_is_still_under_way() -> None:
    trace, called = begun(), asyncio.Event()

    def callback() -> None:
        with INNER.timed("late"):
            called.set()

    with within(trace), OUTER.timed():
        with INNER.timed("ended"):
            asyncio.get_running_loop().call_soon(callback)
        await called.wait()
    assert parts(trace)[-1] == ("inner late", 0)
    trace.answered("OK", "")


async def test_work_that_goes_on_without_its_caller_stays_a_part_and_is_kept_when_it_has_ended() -> None:
    trace, go = begun(), asyncio.Event()

    async def work() -> None:
        await go.wait()
        with INNER.timed("late"):
            pass

    with within(trace):
        task = asyncio.create_task(held(work()))
        await asyncio.sleep(0)
    trace.answered("CANCELLED", "")
    assert not trace.is_complete
    assert spans.traces() == [trace]
    go.set()
    await task
    assert trace.is_complete
    assert parts(trace) == [("inner late", -1)]
    assert spans.traces() == [trace]
    # A callback of the container that the call has started comes much later.
    with within(trace), OUTER.timed():
        pass
    assert len(trace.spans) == 1


async def test_a_failure_is_the_error_of_the_block_or_what_it_notes() -> None:
    trace = begun()
    with within(trace):
        with pytest.raises(KeyError), OUTER.timed():
            raise KeyError("x" * 1000)
        with OUTER.timed() as timed:
            timed.fail("a\nb")
        with pytest.raises(asyncio.CancelledError), OUTER.timed():
            raise asyncio.CancelledError
        with OUTER.timed():
            pass
    long, noted, cancelled, fine = (span.error for span in trace.spans)
    assert len(long) < 400
    assert (noted, cancelled, fine) == (r"a\nb", "CancelledError", "")
    trace.answered("INTERNAL", "it failed")


async def test_nothing_is_kept_outside_of_a_call_and_of_calls_that_only_look() -> None:
    with OUTER.timed() as timed:
        assert timed.elapsed() >= 0
    assert spans.traced("runtime.v1.RuntimeService", "ListContainers", 7, {}, {}) is None
    with within(None), OUTER.timed():
        pass
    assert spans.traces() == []


async def test_only_calls_that_are_sampled_are_exported() -> None:
    class Exported:
        calls: ClassVar[list[Trace]] = []

        def sample(self, metadata: Mapping[str, str]) -> Sample | None:
            return Sample(metadata["traceparent"], None) if metadata else None

        def send(self, trace: Trace) -> None:
            self.calls.append(trace)

    spans.export_to(Exported())
    try:
        assert spans.traced("s", "ListContainers", 7, {}, {}) is None
        look = spans.traced("s", "ListContainers", 7, {}, {"traceparent": "a"})
        assert look is not None
        change = begun("StartContainer")
        assert spans.traces() == [change]
        for trace in (look, change):
            trace.answered("OK", "")
        assert (Exported.calls, spans.traces()) == ([look], [change])
    finally:
        spans.export_to(None)


async def test_calls_parts_and_bytes_have_limits() -> None:
    trace = begun("PullImage")
    with within(trace):
        for _ in range(MAX_SPANS + 5):
            with OUTER.timed():
                pass
    assert (len(trace.spans), trace.dropped) == (MAX_SPANS, 5)
    trace.answered("OK", "")
    for _ in range(MAX_CALLS):
        begun().answered("OK", "")
    assert len(spans.traces()) == MAX_CALLS
    assert trace not in spans.traces()
    assert trace.spans == []
    for _ in range(20):
        begun(pod="x" * (MAX_BYTES // 10)).answered("OK", "")
    assert 5 < len(spans.traces()) < 10
    assert spans._kept_bytes <= MAX_BYTES
    assert spans._kept_bytes == sum(kept.size for kept in spans._kept)
