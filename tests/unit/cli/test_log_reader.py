"""The lines of a container's log as a command prints them."""

from __future__ import annotations

import sys

import pytest

from criserver.cli.log_reader import write_line

STAMP = "2026-01-01T00:00:00.5Z"


@pytest.mark.parametrize(
    ("line", "timestamps", "out", "err"),
    [
        (f"{STAMP} stdout F a  b\n", False, "a  b\n", ""),
        (f"{STAMP} stderr F bad\n", False, "", "bad\n"),
        (f"{STAMP} stdout P half\n", False, "half", ""),
        (f"{STAMP} stdout F \n", True, f"{STAMP} \n", ""),
        ("of another form\n", False, "of another form\n", ""),
    ],
)
def test_a_line_goes_to_its_stream(
    line: str, timestamps: bool, out: str, err: str, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    write_line(line.encode(), timestamps=timestamps)
    sys.stdout.flush()
    sys.stderr.flush()
    written = capfdbinary.readouterr()
    assert (written.out.decode(), written.err.decode()) == (out, err)
