"""Logging: structured lines on standard error, as JSON or for a terminal, or records of systemd's journal."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from criserver import journal
from criserver.telemetry import families


def set_up(level: str, form: str) -> None:
    """``level`` is "debug" to "error". ``form`` is "json", "terminal", "journal", or "auto", which looks at stderr."""
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
        processors=[structlog.processors.add_log_level, *output],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=lambda *_: records,
        cache_logger_on_first_use=True,
    )


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
