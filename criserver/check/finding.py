"""The findings of a check."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.Enum):
    """How serious a finding is. Pods cannot run only with MISSING."""

    OK = "ok"
    WARNING = "warning"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report: ``words`` say what was found, ``advice`` what to do; ``check`` is the check's name."""

    level: Level
    words: str
    advice: str = ""
    check: str = ""


def ok(words: str) -> Finding:
    """Something is as it should be."""
    return Finding(Level.OK, words)


def warning(words: str, advice: str = "") -> Finding:
    """Pods run, but a feature that some pods use does not work."""
    return Finding(Level.WARNING, words, advice)


def missing(words: str, advice: str = "") -> Finding:
    """Pods cannot run until this is mended."""
    return Finding(Level.MISSING, words, advice)
