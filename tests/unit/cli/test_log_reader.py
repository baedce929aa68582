"""The lines of a container's log as a command prints them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from criserver.cli.log_reader import open_to_read, write_line
from criserver.errors import FailedPreconditionError

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


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_what_is_in_the_place_of_a_log_is_not_read(tmp_path: Path, kind: str) -> None:
    log = tmp_path / "0.log"
    if kind == "link":
        log.symlink_to("/etc/passwd")
    elif kind == "fifo":
        os.mkfifo(log)
    else:
        log.mkdir()
    with pytest.raises(FailedPreconditionError, match="not the container's log"):
        open_to_read(str(log))


def test_a_log_is_opened(tmp_path: Path) -> None:
    (tmp_path / "0.log").write_bytes(b"a")
    with open_to_read(str(tmp_path / "0.log")) as file:
        assert file.read() == b"a"
    with pytest.raises(FileNotFoundError):
        open_to_read(str(tmp_path / "1.log"))
