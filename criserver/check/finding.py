"""What a check finds."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.Enum):
    """How grave a finding is: only with MISSING could a pod not run."""

    OK = "ok"
    WARNING = "warning"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was found, what it means, and what to do; ``check`` is the part that it belongs to."""

    level: Level
    words: str
    advice: str = ""
    check: str = ""


def ok(words: str) -> Finding:
    """Something is as it should be."""
    return Finding(Level.OK, words)


def warning(words: str, advice: str = "") -> Finding:
    """Pods run, but something that some want does not work."""
    return Finding(Level.WARNING, words, advice)


def missing(words: str, advice: str = "") -> Finding:
    """Pods cannot run until this is mended."""
    return Finding(Level.MISSING, words, advice)
