"""Logging: structured lines on standard error, as JSON or for a terminal, or records of systemd's journal."""

from __future__ import annotations

import logging
import os
import sys
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
    logger: Any = structlog.WriteLoggerFactory(file=sys.stderr)
    if form == "journal":
        # It has its own time of each record.
        output = [structlog.processors.format_exc_info, journal.render]
        records = journal.Journal()
        logger = lambda *_: records  # noqa: E731 - a factory by structlog's protocol
    elif form == "terminal":
        output = [stamp, structlog.dev.ConsoleRenderer()]
    else:
        output = [stamp, structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[structlog.processors.add_log_level, *output],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=logger,
        cache_logger_on_first_use=True,
    )
