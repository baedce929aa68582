"""The daemon's own log lines."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import sys, structlog
from criserver import logs
logs.set_up(sys.argv[1], sys.argv[2])
log = structlog.get_logger()
log.debug("quiet")
try:
    raise ValueError("the reason")
except ValueError:
    log.exception("loud", container="abc")
"""


def lines(level: str, form: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, level, form], capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


@pytest.mark.parametrize("form", ["json", "auto"])
def test_json_has_one_object_a_line_where_nobody_watches(form):
    (line,) = lines("info", form)
    found = json.loads(line)
    assert (found["event"], found["level"], found["container"]) == ("loud", "error", "abc")
    assert "ValueError: the reason" in found["exception"]
    assert found["timestamp"].endswith("Z")


def test_a_terminal_gets_text():
    text = "\n".join(lines("debug", "terminal"))
    assert "quiet" in text
    assert "the reason" in text
    with pytest.raises(ValueError):
        json.loads(text.splitlines()[0])
