"""Logging: structured lines on standard error, as JSON or for a terminal, or records of systemd's journal.

A line that is logged during a call has the call's RPC and number, and the pod and the container that the call is for.
So all lines of a failed pod have its name.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import stat
import sys
import time
from collections.abc import Iterator, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import structlog

from criserver import journal
from criserver.errors import CriError
from criserver.telemetry import families

_numbers = itertools.count(1)


@dataclass(slots=True)
class _Call:
    """A call of a client. Its tasks and those that outlive it know it; ``rpc`` is "" after its end."""

    rpc: str
    number: int
    began: float
    about: dict[str, object] = field(default_factory=dict)


_call: ContextVar[_Call | None] = ContextVar("call", default=None)


@contextlib.contextmanager
def call(rpc: str) -> Iterator[None]:
    """Let all lines of this block, and of the tasks that it starts, name the RPC and the number of the call."""
    this = _Call(rpc, next(_numbers), time.monotonic())
    token = _call.set(this)
    try:
        yield
    finally:
        this.rpc = ""
        _call.reset(token)


def about(**fields: object) -> None:
    """Let the lines of the call, or of the task where there is no call, have these fields from now on."""
    this = _call.get()
    if this is None:
        this = _Call("", 0, time.monotonic())
        _call.set(this)
    this.about.update(fields)


def elapsed() -> float:
    """Seconds since the call began, or since the task first said what it is about; 0 without either."""
    this = _call.get()
    return 0.0 if this is None else round(time.monotonic() - this.began, 3)


# The number of the lowest level that is logged; see logging.
_lowest = logging.INFO


def set_level(level: str) -> None:
    """Log from this level on; "debug" to "error"."""
    global _lowest
    _lowest = getattr(logging, level.upper())


def set_up(level: str, form: str) -> None:
    """``level`` is "debug" to "error". ``form`` is "json", "terminal", "journal", or "auto", which looks at stderr."""
    set_level(level)
    if form == "auto" and journal.is_standard_error(os.environ.get("JOURNAL_STREAM")):
        form = "journal"
    elif form == "auto":
        form = "terminal" if sys.stderr.isatty() else "json"
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    output: list[Any]
    records: journal.Journal | _Lines
    if form == "journal":
        # The journal adds the time of each record.
        output = [structlog.processors.format_exc_info, journal.render]
        records = journal.Journal()
    else:
        records = _Lines(sys.stderr.fileno())
        output = [stamp, _tell_dropped]
        if form == "terminal":
            output += [structlog.dev.ConsoleRenderer()]
        else:
            output += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[
            _from_the_level_on,
            _add_call,
            _drop_needless_traceback,
            structlog.processors.add_log_level,
            *output,
        ],
        # The level can change later, so each event is compared with it. Loggers keep their class.
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=lambda *_: records,
        cache_logger_on_first_use=True,
    )


def _from_the_level_on(_logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if getattr(logging, method.upper(), logging.ERROR) < _lowest:
        raise structlog.DropEvent
    return event


def _add_call(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    this = _call.get()
    if this is not None:
        for name, value in this.about.items():
            event.setdefault(name, value)
        if this.rpc:
            event.setdefault("rpc", this.rpc)
            event["call"] = this.number
    return event


def _drop_needless_traceback(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """An error of ours says in words what was wrong. Its traceback would only hide that."""
    given = event.get("exc_info")
    error = sys.exc_info()[1] if given is True else given
    if isinstance(error, CriError):
        del event["exc_info"]
        event.setdefault("error", str(error))
    return event


class _Lines:
    """A structlog logger that writes lines to a descriptor.

    A line that cannot be written is dropped, and the next line has the number of dropped lines. So a full disk, or a
    reader that has ended or hangs, neither fails nor delays the daemon.
    """

    def __init__(self, fd: int) -> None:
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            # The pipe is opened again: O_NONBLOCK must not be set for other processes that write to it.
            with contextlib.suppress(OSError):  # a named pipe without a reader
                fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._fd = fd
        self._torn = False
        self.dropped = 0

    def write(self, line: str) -> None:
        data = line.encode(errors="replace") + b"\n"
        if self._torn:
            data = b"\n" + data
        try:
            written = os.write(self._fd, data)
        except OSError:
            self.dropped += 1
            families.LOG_DROPPED.add(1)
            return
        self._torn = written < len(data)
        self.dropped = self.dropped + 1 if self._torn else 0

    debug = info = warning = warn = error = critical = exception = msg = write


def _tell_dropped(logger: _Lines, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if logger.dropped:
        event["dropped"] = logger.dropped
    return event
