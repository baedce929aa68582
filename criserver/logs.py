"""Logging: structured lines on standard error, as JSON or for a terminal."""

from __future__ import annotations

import logging
import sys

import structlog


def set_up(level: str, form: str) -> None:
    """``level`` is "debug" to "error"; ``form`` is "json", "terminal" or "auto" (by what standard error is)."""
    terminal = form == "terminal" or (form == "auto" and sys.stderr.isatty())
    renderer: list[structlog.typing.Processor]
    if terminal:
        renderer = [structlog.dev.ConsoleRenderer()]
    else:
        renderer = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
