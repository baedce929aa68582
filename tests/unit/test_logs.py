"""The daemon's own log lines."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from criserver import logs
from criserver.telemetry import families

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
def test_json_has_one_object_a_line_where_nobody_watches(form: str) -> None:
    (line,) = lines("info", form)
    found = json.loads(line)
    assert (found["event"], found["level"], found["container"]) == ("loud", "error", "abc")
    assert "ValueError: the reason" in found["exception"]
    assert found["timestamp"].endswith("Z")


def test_a_terminal_gets_text() -> None:
    text = "\n".join(lines("debug", "terminal"))
    assert "quiet" in text
    assert "the reason" in text
    with pytest.raises(ValueError):
        json.loads(text.splitlines()[0])


MANY = """
import sys, structlog
from criserver import logs
logs.set_up("info", "json")
log = structlog.get_logger()
for n in range(1000):
    log.info("line", number=n, more="x" * 200)
print("done", flush=True)
sys.stdin.readline()
log.info("after")
"""


def start_many(stderr: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MANY]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    process.communicate("go on\n", timeout=20)
    assert process.returncode == 0


def test_a_reader_that_is_stuck_is_not_waited_for_and_told_what_it_missed() -> None:
    reader, writer = os.pipe()
    process = start_many(writer)
    assert process.stdout is not None
    assert process.stdout.readline() == "done\n"
    assert not fcntl.fcntl(writer, fcntl.F_GETFL) & os.O_NONBLOCK, "whose pipe it is besides sees nothing of it"
    os.close(writer)
    before = os.read(reader, 1 << 20)
    finish(process)
    *some, last = (before + os.read(reader, 1 << 20)).splitlines()
    told = json.loads(last)
    assert told["event"] == "after"
    whole = [line for line in some if line.endswith(b"}")]
    assert len(some) - len(whole) <= 1
    assert told["dropped"] == 1000 - len(whole)
    os.close(reader)


def test_a_record_of_which_a_part_was_written_counts_as_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[float] = []
    monkeypatch.setattr(families.LOG_DROPPED, "_real", SimpleNamespace(inc=counted.append))
    reader, writer = os.pipe()
    records = logs._Lines(writer)
    while not records.dropped:
        assert counted == []
        records.write("x" * 10_000)  # the kernel writes a part of what has more than PIPE_BUF bytes
    assert len(os.read(reader, 1 << 20)) % 10_001 > 0
    assert (records.dropped, counted) == (1, [1])
    records.write("fits again")
    assert (records.dropped, counted) == (0, [1])
    for fd in {reader, writer, records._fd}:
        os.close(fd)


def test_a_reader_that_is_gone_is_no_reason_to_fail() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start_many(writer)
    os.close(writer)
    finish(process)


def test_a_full_disk_is_no_reason_to_fail(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        finish(start_many(full.fileno()))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "full", tmp_path], check=True)
    try:
        with open(tmp_path / "log", "wb") as log:
            process = start_many(log.fileno())
            assert process.stdout is not None
            assert process.stdout.readline() == "done\n"
            subprocess.run(["mount", "-o", "remount,size=1m", tmp_path], check=True)
            finish(process)
        *some, last = (tmp_path / "log").read_bytes().splitlines()
        whole = [line for line in some if line.endswith(b"}")]
        assert len(some) - len(whole) <= 1
        assert json.loads(last)["event"] == "after"
        assert json.loads(last)["dropped"] == 1000 - len(whole)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
