"""``criserver check``: prints what this node lacks, as text or as JSON."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap

from criserver import logs
from criserver.check import ExaminedNode, Finding, Level, able, run
from criserver.config import Config

_COLOURS = {Level.OK: "32", Level.WARNING: "33", Level.MISSING: "31"}
_INDENT = " " * 23
_MIN_WIDTH = 60


def check(config: Config, *, as_json: bool) -> int:
    """Check the node and print each finding. Returns 1 if pods cannot run."""
    # The findings already have what the rooms would log.
    logs.set_up("critical", "auto")
    found = run(config, ExaminedNode(privileged=os.geteuid() == 0))
    if as_json:
        lines = [{"check": f.check, "level": f.level.value, "found": f.words, "advice": f.advice} for f in found]
        print(json.dumps({"pods_can_run": able(found), "findings": lines}, indent=2))
    else:
        for finding in found:
            print(_line(finding))
        lacking = sum(finding.level is Level.MISSING for finding in found)
        print(f"\npods cannot run: {lacking} missing" if lacking else "\npods can run")
    return 0 if able(found) else 1


def _width() -> int:
    """The columns for a line: those of the terminal. A narrow one breaks lines by itself."""
    return max(shutil.get_terminal_size().columns, _MIN_WIDTH) if sys.stdout.isatty() else 120


def _line(finding: Finding) -> str:
    level = f"{finding.level.value:<8}"
    if sys.stdout.isatty():
        level = f"\033[{_COLOURS[finding.level]}m{level}\033[0m"
    width = _width()
    words = textwrap.fill(finding.words, width, initial_indent=_INDENT, subsequent_indent=_INDENT).lstrip()
    line = f"{level} {finding.check:<13} {words}"
    if finding.advice:
        advice = textwrap.fill(finding.advice, width, initial_indent=_INDENT + "-> ", subsequent_indent=_INDENT + "   ")
        line += f"\n{advice}"
    return line
