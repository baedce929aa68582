"""Spans: what took the time of a call, part by part.

The table :mod:`criserver.telemetry.operations` has the kinds of parts. A room times one with
:meth:`Operation.timed`. That has two effects:

1. The operation's histogram observes it, if metrics are on.
2. It is a span of the call that it is part of. Tasks that the call begins belong to the call too.

The last calls that change pods, containers or images are kept in memory for ``criserver trace``. If tracing is on, each
call is also given to a collector, by :mod:`criserver.telemetry.trace_export`. Spans are for the event loop: work in a
thread is timed by the coroutine that waits for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TypeVar

from criserver.telemetry.instruments import Counter, Histogram
from criserver.text import shown

# The calls that are kept, and their size in bytes as estimated. A pod from its start to its removal has some 10 KiB.
MAX_CALLS = 500
MAX_BYTES = 512 << 10
# Spans of one call. An image may have hundreds of layers.
MAX_SPANS = 300
# Bytes that a call and a span occupy, besides their texts.
_CALL_BYTES, _SPAN_BYTES = 700, 220
_MAX_ERROR = 300

# Calls that change nothing are not kept. There are so many of them that they would displace all others.
KEPT = frozenset(
    {
        "CheckpointContainer",
        "CreateContainer",
        "PullImage",
        "RemoveContainer",
        "RemoveImage",
        "RemovePod",
        "RemovePodSandbox",
        "RunPodSandbox",
        "StartContainer",
        "StopContainer",
        "StopPodSandbox",
        "UpdateContainerResources",
    }
)

_T = TypeVar("_T")


class Span:
    """A part of a call.

    ``values`` are those of the operation's labels. ``parent`` is the number of the span that it is part of, -1 for the
    call itself. ``began`` is in seconds since the call began. ``seconds`` is None while the part is under way.
    ``error`` says how it failed.
    """

    __slots__ = ("began", "error", "operation", "parent", "seconds", "values")

    def __init__(self, operation: Operation, values: tuple[str, ...], parent: int, began: float) -> None:
        self.operation = operation
        self.values = values
        self.parent = parent
        self.began = began
        self.seconds: float | None = None
        self.error = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """The place of a call in a trace of the collector.

    ``trace_id`` has 32 hexadecimal digits. ``above`` is the SDK's context with the span of the caller.
    """

    trace_id: str
    above: object


class CallExporter(Protocol):
    """What gives calls to a collector."""

    def sample(self, metadata: Mapping[str, str]) -> Sample | None:
        """The place of a call with these W3C headers; None for a call that is not sent."""

    def send(self, trace: Trace) -> None:
        """Send a complete call that has a place. It must not block."""


class Trace:
    """A call with its spans. It is complete when the call and all work of it have ended.

    ``about`` names the pod and the container as in the log. ``number`` is that of the log. ``at`` is its begin in Unix
    nanoseconds. ``seconds`` and ``code`` (gRPC's name) are None and "" until the call has an answer. ``sample`` is None
    for a call that no collector gets. ``dropped`` counts the spans above :data:`MAX_SPANS`.
    """

    __slots__ = (
        "about", "at", "began", "code", "dropped", "error", "method", "number", "open", "sample", "seconds", "service",
        "size", "spans",
    )  # fmt: skip

    def __init__(
        self, service: str, method: str, number: int, about: Mapping[str, object], sample: Sample | None = None
    ) -> None:
        self.service = service
        self.method = method
        self.number = number
        self.about = about
        self.sample = sample
        self.at = time.time_ns()
        self.began = time.monotonic()
        self.seconds: float | None = None
        self.code = ""
        self.error = ""
        self.spans: list[Span] = []
        self.dropped = 0
        self.size = _CALL_BYTES
        self.open = 1  # the call, its spans under way, and its work that goes on without a caller
        _under_way[id(self)] = self

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing under way of it any more. It gets no more spans then."""
        return self.open == 0

    def begin(self, operation: Operation, values: tuple[str, ...], parent: int, began: float) -> int:
        """Begin a span, and return its number; -1 if there are too many."""
        if len(self.spans) >= MAX_SPANS:
            self.dropped += 1
            return -1
        while parent >= 0 and self.spans[parent].seconds is not None:
            parent = self.spans[parent].parent  # a callback that was set in a part that has ended
        self.open += 1
        self.size += _SPAN_BYTES + sum(map(len, values))
        self.spans.append(Span(operation, values, parent, began - self.began))
        return len(self.spans) - 1

    def answered(self, code: str, error: str) -> None:
        """The call ends. Its work may go on."""
        self.seconds = time.monotonic() - self.began
        self.code = code
        self.error = shown(error, _MAX_ERROR)
        self.end_part()

    def end_part(self) -> None:
        """One part of the call's work has ended."""
        self.open -= 1
        if self.open == 0:
            _under_way.pop(id(self), None)
            _completed(self)


class Operation:
    """A kind of work: its name, and the labels whose values say which.

    ``duration`` and ``failures`` are metrics with the same labels. Values of the labels ``of_one`` have no limit, so
    they are not in the names of a collector's spans.
    """

    def __init__(
        self,
        name: str,
        *labels: str,
        duration: Histogram | None = None,
        failures: Counter | None = None,
        of_one: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.labels = labels
        self.duration = duration
        self.failures = failures
        self.of_one = of_one
        assert all(metric is None or metric.labels == labels for metric in (duration, failures)), name

    def timed(self, *values: str) -> Timed:
        """A context whose time is taken. An error that is raised in it is its failure."""
        return Timed(self, values)


class Timed:
    """The context of :meth:`Operation.timed`."""

    __slots__ = ("_began", "_failure", "_number", "_operation", "_token", "_trace", "_values")

    def __init__(self, operation: Operation, values: tuple[str, ...]) -> None:
        self._operation = operation
        self._values = values
        self._trace: Trace | None = None
        self._token: Token[tuple[Trace, int] | None] | None = None
        self._failure: str | None = None

    def __enter__(self) -> Timed:
        self._began = time.monotonic()
        place = _place.get()
        if place is not None and place[0].open:
            trace, parent = place
            self._number = trace.begin(self._operation, self._values, parent, self._began)
            if self._number >= 0:
                self._trace = trace
                self._token = _place.set((trace, self._number))
        return self

    def elapsed(self) -> float:
        """Seconds since it began, for the log."""
        return round(time.monotonic() - self._began, 3)

    def fail(self, reason: str) -> None:
        """Note a failure that is no error of the block."""
        self._failure = reason

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        operation, seconds = self._operation, time.monotonic() - self._began
        if operation.duration is not None:
            operation.duration.observe(seconds, *self._values)
        if error is not None:
            self._failure = str(error) or type(error).__name__
        if self._failure is not None and operation.failures is not None:
            operation.failures.add(1, *self._values)
        if self._trace is None or self._token is None:
            return
        _place.reset(self._token)
        span = self._trace.spans[self._number]
        span.seconds = seconds
        if self._failure is not None:
            span.error = shown(self._failure, _MAX_ERROR)
            self._trace.size += len(span.error)
        self._trace.end_part()


# The call that the running code is part of, and the number of its span there.
_place: ContextVar[tuple[Trace, int] | None] = ContextVar("place", default=None)
_under_way: dict[int, Trace] = {}
_kept: deque[Trace] = deque()
_kept_bytes = 0
_export: CallExporter | None = None


def export_to(export: CallExporter | None) -> None:
    """Give the calls that begin from now on to ``export``. None is the end of it."""
    global _export
    _export = export


def is_exporting() -> bool:
    """Whether calls are given to a collector."""
    return _export is not None


def traced(
    service: str, method: str, number: int, about: Mapping[str, object], metadata: Mapping[str, str]
) -> Trace | None:
    """The trace of a call that begins, with its W3C headers; None if it is neither kept nor sent."""
    sample = _export.sample(metadata) if _export is not None else None
    if sample is None and method not in KEPT:
        return None
    return Trace(service, method, number, about, sample)


@contextmanager
def within(trace: Trace | None) -> Iterator[None]:
    """Let what is timed in the block, and in tasks that it begins, be spans of the call; of none for None."""
    token = _place.set(None if trace is None else (trace, -1))
    try:
        yield
    finally:
        _place.reset(token)


async def held(work: Awaitable[_T]) -> _T:
    """Await work that may go on after its call, as a part of the call."""
    place = _place.get()
    if place is None or not place[0].open:
        return await work
    trace = place[0]
    trace.open += 1
    try:
        return await work
    finally:
        trace.end_part()


def traces() -> list[Trace]:
    """The calls under way and the last ones that have ended, the oldest first. Those that are not kept are left out."""
    found = [*_kept, *(t for t in _under_way.values() if t.method in KEPT)]
    return sorted(found, key=lambda t: t.at)


def _completed(trace: Trace) -> None:
    global _kept_bytes
    if _export is not None and trace.sample is not None:
        _export.send(trace)
    if trace.method not in KEPT:
        return
    trace.size += len(trace.error) + sum(len(str(value)) for value in trace.about.values())
    _kept.append(trace)
    _kept_bytes += trace.size
    while len(_kept) > MAX_CALLS or _kept_bytes > MAX_BYTES:
        old = _kept.popleft()
        _kept_bytes -= old.size
        # Callbacks of a container that runs refer to the call that has started it, and keep it in memory.
        old.spans = []
