"""Records of systemd's journal, read from a socket as journald reads them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from criserver import journal


class Journald:
    """The receiving side of the protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(30)

    def receive(self) -> dict[str, str]:
        data, fds, _, _ = socket.recv_fds(self._socket, 1 << 20, 1)
        if fds:
            assert data == b""
            with open(fds[0], "rb") as f:
                f.seek(0)
                data = f.read()
                with pytest.raises(OSError):  # sealed: journald takes no file that may still change
                    os.ftruncate(f.fileno(), 0)
        return self.parse(data)

    @staticmethod
    def parse(data: bytes) -> dict[str, str]:
        found = {}
        while data:
            line, _, data = data.partition(b"\n")
            name, equals, value = line.partition(b"=")
            if not equals:
                size = int.from_bytes(data[:8], "little")
                value, end, data = data[8 : 8 + size], data[8 + size : 9 + size], data[9 + size :]
                assert end == b"\n"
            found[name.decode()] = value.decode()
        return found

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    found = Journald(tmp_path / "socket")
    yield found
    found.close()


def test_a_record_has_a_message_for_people_and_fields_for_searches(journald: Journald) -> None:
    journal.Journal(journald.path).write(
        {"event": "container exited", "level": "warning", "container": "abc", "code": 0, "ips": ("10.0.0.1", "fd::1")}
    )
    assert journald.receive() == {
        "MESSAGE": "container exited container=abc code=0 ips=10.0.0.1,fd::1",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "criserver",
        "CRI_CONTAINER": "abc",
        "CRI_CODE": "0",
        "CRI_IPS": "10.0.0.1,fd::1",
    }


def test_a_traceback_is_part_of_the_message(journald: Journald) -> None:
    journal.Journal(journald.path).write({"event": "lost", "level": "error", "exception": "Traceback\nValueError"})
    found = journald.receive()
    assert (found["MESSAGE"], found["PRIORITY"]) == ("lost\nTraceback\nValueError", "3")
    assert set(found) == {"MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER"}


def test_a_value_cannot_make_up_a_field(journald: Journald) -> None:
    journal.Journal(journald.path).write({"event": "pulled", "level": "info", "image": "x\n_UID=0\nPRIORITY=0"})
    found = journald.receive()
    assert found["CRI_IMAGE"] == "x\n_UID=0\nPRIORITY=0"
    assert (found["PRIORITY"], "_UID" in found) == ("6", False)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("container", "CRI_CONTAINER"),
        ("CNI_CONTAINERID", "CRI_CNI_CONTAINERID"),
        ("a-b.c", "CRI_A_B_C"),
        ("größe", "CRI_GR_SSE"),
        ("x" * 100, "CRI_" + "X" * 60),
    ],
)
def test_names_are_made_the_journals(name: str, known: str) -> None:
    assert journal.field_name(name) == known


def test_what_is_too_large_for_a_datagram_goes_as_a_file(journald: Journald) -> None:
    text = "x" * 250_000 + "\n"
    journal.Journal(journald.path).write({"event": "large", "level": "info", "error": text, "more": text})
    found = journald.receive()
    assert found["CRI_ERROR"] == found["CRI_MORE"] == text


def test_nothing_is_larger_than_the_limit(journald: Journald) -> None:
    journal.Journal(journald.path).write({"event": "huge", "level": "info", "error": "x" * 5_000_000})
    assert {len(value) for value in journald.receive().values()} >= {256 << 10}


def test_a_journal_that_does_not_read_is_not_waited_for(journald: Journald) -> None:
    sender = journal.Journal(journald.path)
    start = time.monotonic()
    for number in range(2000):
        sender.write({"event": "tick", "level": "info", "number": number})
    assert time.monotonic() - start < 30
    received = [journald.receive()]
    journald._socket.settimeout(0)
    while True:
        try:
            received.append(journald.receive())
        except BlockingIOError:
            break
    assert [found["CRI_NUMBER"] for found in received] == [str(n) for n in range(len(received))]
    assert len(received) < 2000
    sender.write({"event": "again", "level": "info"})
    assert journald._socket.recv(1 << 16).startswith(b"MESSAGE=again dropped=%d\n" % (2000 - len(received)))


def test_without_a_journal_nothing_happens(tmp_path: Path) -> None:
    sender = journal.Journal(str(tmp_path / "none"))
    sender.write({"event": "lost", "level": "info"})
    later = Journald(tmp_path / "none")
    sender.write({"event": "found", "level": "info"})
    assert later.receive()["CRI_DROPPED"] == "1"
    later.close()


SCRIPT = """
import sys, os, structlog
from criserver import journal, logs
journal.Journal.__init__.__defaults__ = (sys.argv[1],)
if sys.argv[3] == "matching":
    found = os.fstat(2)
    os.environ["JOURNAL_STREAM"] = f"{found.st_dev}:{found.st_ino}"
logs.set_up("info", sys.argv[2])
log = structlog.get_logger()
log.debug("quiet")
try:
    raise ValueError("the reason")
except ValueError:
    log.exception("loud", container="abc")
"""


@pytest.mark.parametrize(("form", "stream"), [("journal", "none"), ("auto", "matching")])
def test_the_log_goes_to_the_journal(journald: Journald, form: str, stream: str) -> None:
    command = [sys.executable, "-c", SCRIPT, journald.path, form, stream]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = journald.receive()
    assert done.stderr == ""
    assert found["MESSAGE"].startswith("loud container=abc\nTraceback")
    assert (found["CRI_CONTAINER"], found["PRIORITY"]) == ("abc", "3")


def test_standard_error_that_leads_elsewhere_gets_json(journald: Journald) -> None:
    command = [sys.executable, "-c", SCRIPT, journald.path, "auto", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"JOURNAL_STREAM": "1:2"})
    assert json.loads(done.stderr)["event"] == "loud"
