"""The lines of ``criserver check``."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

from criserver.check import Finding, Level
from criserver.cli import check


@pytest.mark.parametrize(("columns", "terminal", "width"), [(70, True, 70), (30, True, 60), (70, False, 120)])
def test_a_line_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, terminal: bool, width: int) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    found = check._line(Finding(Level.OK, "word " * 60, "advice " * 60, "network"))
    longest = max(len(line.replace("\033[32m", "").replace("\033[0m", "")) for line in found.splitlines())
    assert width - 10 < longest <= width
