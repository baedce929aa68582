"""Logging: structured lines on standard error, as JSON or for a terminal, or records of systemd's journal.

A line that is logged during a call has the call's RPC and number, its trace at the collector, and the pod and the
container that the call is for. So all lines of a failed pod have its name.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import stat
import sys
import time
from collections import deque
from collections.abc import MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import structlog

from criserver import journal
from criserver.errors import CriError
from criserver.telemetry import families
from criserver.text import shown

_numbers = itertools.count(1)


class Call:
    """A call of a client, as a context: the lines of its block, and of the tasks it starts, name its RPC and number.

    Tasks that outlive the call still say what it was about. ``endless`` is for a call that lasts as long as its client
    wants: it is not work under way.
    """

    __slots__ = ("_token", "about", "began", "endless", "number", "rpc", "trace_id")

    def __init__(self, rpc: str, *, endless: bool = False) -> None:
        self.rpc = rpc  # "" after the call's end, and for a task that is part of no call
        self.endless = endless
        self.trace_id = ""  # of a call that a collector gets
        self.number = next(_numbers)
        self.began = time.monotonic()
        self.about: dict[str, object] = {}

    def __enter__(self) -> Call:
        self._token = _call.set(self)
        if not self.endless:
            _under_way[self.number] = self
        return self

    def __exit__(self, *_: object) -> None:
        _under_way.pop(self.number, None)
        self.rpc = ""
        _call.reset(self._token)


@dataclass(frozen=True, slots=True)
class CallUnderWay:
    """A call that has no answer yet: its RPC, its number, how many seconds it takes by now, and what it is for."""

    rpc: str
    number: int
    seconds: float
    about: dict[str, str]


@dataclass(frozen=True, slots=True)
class LastWarning:
    """A warning or error of the log: its Unix nanoseconds, level and event, and its other fields as one text."""

    at: int
    level: str
    event: str
    fields: str


_call: ContextVar[Call | None] = ContextVar("call", default=None)
# The calls that have no answer yet, by number.
_under_way: dict[int, Call] = {}
# The newest is the last one.
_last_warnings: deque[LastWarning] = deque(maxlen=20)
_WARNINGS = ("warning", "error", "critical")
_NAMES_OF_WARNINGS = {"warn": "warning", "exception": "error"}


def calls_under_way() -> list[CallUnderWay]:
    """The calls that have no answer yet, the oldest first."""
    now = time.monotonic()
    return [
        CallUnderWay(c.rpc, c.number, now - c.began, {name: str(value) for name, value in c.about.items()})
        for c in _under_way.values()
    ]


def last_warnings() -> list[LastWarning]:
    """The last warnings and errors, the oldest first."""
    return list(_last_warnings)


def about(**fields: object) -> None:
    """Let the lines of the call, or of the task where there is no call, have these fields from now on."""
    this = _call.get()
    if this is None:
        this = Call("")
        _call.set(this)
    this.about.update(fields)


def elapsed() -> float:
    """Seconds since the call began, or since the task first said what it is about; 0 without either."""
    this = _call.get()
    return 0.0 if this is None else round(time.monotonic() - this.began, 3)


class _Logger(structlog.make_filtering_bound_logger(logging.DEBUG)):  # type: ignore[misc]
    """The class of all loggers. Methods of levels that are not logged do nothing; :func:`set_level` sets them."""


def _nothing(_self: object, _event: object, *_: object, **__: object) -> None:
    """A line that is not logged costs next to nothing: most calls have one of level debug."""


def set_level(level: str) -> None:
    """Log from this level on; "debug" to "error"."""
    lowest = getattr(logging, level.upper())
    for name in ("debug", "info", "warning"):
        if getattr(logging, name.upper()) < lowest:
            setattr(_Logger, name, _nothing)
        elif name in vars(_Logger):
            delattr(_Logger, name)


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
            _add_call,
            _drop_needless_traceback,
            _keep_warning,
            structlog.processors.add_log_level,
            *output,
        ],
        wrapper_class=_Logger,
        logger_factory=lambda *_: records,
        cache_logger_on_first_use=True,
    )


def _add_call(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    this = _call.get()
    if this is not None:
        for name, value in this.about.items():
            event.setdefault(name, value)
        if this.rpc:
            event.setdefault("rpc", this.rpc)
            event["call"] = this.number
            if this.trace_id:
                event["trace_id"] = this.trace_id
    return event


def _drop_needless_traceback(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """An error of ours says in words what was wrong. Its traceback would only hide that."""
    given = event.get("exc_info")
    error = sys.exc_info()[1] if given is True else given
    if isinstance(error, CriError):
        del event["exc_info"]
        event.setdefault("error", str(error))
    return event


def _keep_warning(_logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Keep a warning for :func:`last_warnings`. Texts of others are cut, as they may have any length."""
    level = _NAMES_OF_WARNINGS.get(method, method)
    if level in _WARNINGS:
        given = event.get("exc_info")
        error = sys.exc_info()[1] if given is True else given
        fields = {name: value for name, value in event.items() if name not in ("event", "exc_info")}
        if isinstance(error, BaseException):
            fields.setdefault("error", f"{type(error).__name__}: {error}")
        words = " ".join(f"{name}={shown(value)}" for name, value in fields.items())
        _last_warnings.append(LastWarning(time.time_ns(), level, shown(event.get("event", "")), words))
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
            self._drop()
            return
        self._torn = written < len(data)
        if self._torn:
            self._drop()
        else:
            self.dropped = 0

    def _drop(self) -> None:
        self.dropped += 1
        families.LOG_DROPPED.add(1)

    debug = info = warning = warn = error = critical = exception = msg = write


def _tell_dropped(logger: _Lines, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if logger.dropped:
        event["dropped"] = logger.dropped
    return event
