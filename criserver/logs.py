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


def set_up(level: str, form: str) -> None:
    """``level`` is "debug" to "error"; ``form`` is "json", "terminal", "journal", or "auto": by what stderr is."""
    if form == "auto" and journal.is_standard_error(os.environ.get("JOURNAL_STREAM")):
        form = "journal"
    elif form == "auto":
        form = "terminal" if sys.stderr.isatty() else "json"
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    output: list[Any]
    records: journal.Journal | _Lines
    if form == "journal":
        # It has its own time of each record.
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
    """A structlog logger of lines on a descriptor. One that is not taken is dropped, and the next one that is says how
    many were: neither a full disk nor a reader that is gone or stuck is a reason to fail, or to wait.
    """

    def __init__(self, fd: int) -> None:
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            # Anew, as others who have the pipe need not know what to do with one that does not wait.
            with contextlib.suppress(OSError):  # a named one that nobody reads
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
            return
        self._torn = written < len(data)
        self.dropped = self.dropped + 1 if self._torn else 0

    debug = info = warning = warn = error = critical = exception = msg = write


def _tell_dropped(logger: _Lines, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if logger.dropped:
        event["dropped"] = logger.dropped
    return event
