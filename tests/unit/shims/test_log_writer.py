"""The CRI log format: the log gives back every byte that a container writes."""

from __future__ import annotations

import gc
import os
import re
import resource
import signal
import socket
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shims.log_writer import MAX_LINE, Clock, Framer, LogWriter, make_room

STAMP = b"2026-01-02T03:04:05.000000006Z"
RECORD = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z) (stdout|stderr) ([FP]) ([^\n]*)\n", re.DOTALL)

# Mixed so that short lines, lines around the limit and many newlines all come up.
PIECES = st.one_of(
    st.binary(max_size=60),
    st.just(b"\n"),
    st.text(max_size=20).map(str.encode),
    st.builds(
        lambda length, end: b"y" * length + end,
        st.sampled_from([100, MAX_LINE - 1, MAX_LINE, MAX_LINE + 1, 3 * MAX_LINE]),
        st.sampled_from([b"", b"\n", b"\n\n"]),
    ),
)


def _parse(log: bytes) -> dict[bytes, bytes]:
    """The bytes of each stream, by the rules by which the kubelet reads the format."""
    streams = {b"stdout": b"", b"stderr": b""}
    end = 0
    for match in RECORD.finditer(log):
        assert match.start() == end, log[end : end + 100]
        end = match.end()
        datetime.strptime(match[1][:-4].decode(), "%Y-%m-%dT%H:%M:%S.%f")
        assert len(match[4]) <= MAX_LINE
        streams[match[2]] += match[4] + (b"\n" if match[3] == b"F" else b"")
    assert end == len(log)
    return streams


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), PIECES), max_size=12))
def test_any_bytes_in_any_chunks_come_back(blocks: list[tuple[str, bytes]]) -> None:
    framers = {name: Framer(name) for name in ("stdout", "stderr")}
    log = b"".join(framers[name].feed(block, STAMP) for name, block in blocks)
    log += b"".join(framer.end(STAMP) for framer in framers.values())
    assert _parse(log) == {
        name.encode(): b"".join(block for stream, block in blocks if stream == name) for name in framers
    }


@settings(max_examples=100)
@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=8))
def test_records_do_not_depend_on_the_chunking(data: bytes, cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    framer, whole = Framer("stdout"), Framer("stdout")
    log = b"".join(framer.feed(data[a:b], STAMP) for a, b in pairwise(places))
    assert log + framer.end(STAMP) == whole.feed(data, STAMP) + whole.end(STAMP)


def test_the_records_themselves() -> None:
    framer = Framer("stderr")
    prefix = STAMP + b" stderr "
    assert framer.feed(b"one\n\ntw", STAMP) == prefix + b"F one\n" + prefix + b"F \n"
    assert framer.feed(b"o", STAMP) == b""
    assert framer.feed(b"\r\n", STAMP) == prefix + b"F two\r\n"
    assert framer.end(STAMP) == b""
    assert framer.feed(b"tail", STAMP) == b""
    assert framer.end(STAMP) == prefix + b"P tail\n"


def test_a_long_line_is_cut_into_partial_records_and_a_full_one() -> None:
    framer = Framer("stdout")
    log = framer.feed(b"a\n" + b"x" * (2 * MAX_LINE + 5) + b"\nb\n", STAMP)
    assert [(m[3], len(m[4])) for m in RECORD.finditer(log)] == [
        (b"F", 1), (b"P", MAX_LINE), (b"P", MAX_LINE), (b"F", 5), (b"F", 1)
    ]  # fmt: skip
    shorter = Framer("stdout", 3).feed(b"a\nbcde\nfgh\n", STAMP)
    assert [(m[3], m[4]) for m in RECORD.finditer(shorter)] == [
        (b"F", b"a"), (b"P", b"bcd"), (b"F", b"e"), (b"F", b"fgh")
    ]  # fmt: skip
    exact = Framer("stdout").feed(b"x" * MAX_LINE + b"\n", STAMP)
    assert [(m[3], len(m[4])) for m in RECORD.finditer(exact)] == [(b"F", MAX_LINE)]


@given(st.integers(0, 4_000_000_000), st.integers(0, 999_999_999))
def test_timestamps_are_utc_with_nanoseconds(second: int, fraction: int) -> None:
    stamp = Clock().stamp(second * 1_000_000_000 + fraction).decode()
    moment = datetime.strptime(stamp[:19] + "+0000", "%Y-%m-%dT%H:%M:%S%z")
    assert moment == datetime.fromtimestamp(second, UTC)
    assert stamp[19:] == f".{fraction:09d}Z"


def test_the_clock_moves_on_and_back() -> None:
    clock = Clock()
    seconds = (1, 1, 2, 61, 1)
    assert [clock.stamp(second * 10**9)[17:19] for second in seconds] == [b"01", b"01", b"02", b"01", b"01"]


def test_reopen_goes_on_in_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    log = LogWriter(str(path))
    log.write("stdout", b"before\nhalf")
    path.rename(tmp_path / "0.log.1")
    log.write("stderr", b"still the old\n")
    log.reopen()
    log.write("stdout", b" line\n")
    log.close()
    assert _parse((tmp_path / "0.log.1").read_bytes()) == {b"stdout": b"before\n", b"stderr": b"still the old\n"}
    assert _parse(path.read_bytes()) == {b"stdout": b"half line\n", b"stderr": b""}
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_reopen_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "pod").mkdir()
    log = LogWriter(str(tmp_path / "pod" / "0.log"))
    (tmp_path / "pod").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        log.reopen()
    log.write("stdout", b"kept\n")
    log.close()
    assert _parse((tmp_path / "moved" / "0.log").read_bytes())[b"stdout"] == b"kept\n"


def test_an_existing_log_is_appended_to(tmp_path: Path) -> None:
    for word in (b"one\n", b"two\n"):
        log = LogWriter(str(tmp_path / "0.log"))
        log.write("stdout", word)
        log.close()
    assert _parse((tmp_path / "0.log").read_bytes())[b"stdout"] == b"one\ntwo\n"


def test_only_a_regular_file_of_one_name_is_opened(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "fifo")
    os.mkfifo(tmp_path / "read")
    reader = os.open(tmp_path / "read", os.O_RDONLY | os.O_NONBLOCK)  # with whom opening it would go well
    (tmp_path / "directory").mkdir()
    (tmp_path / "other").write_text("another's\n")
    (tmp_path / "hard").hardlink_to(tmp_path / "other")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    try:
        for name in ("link", "fifo", "read", "directory", "hard", "socket"):
            with pytest.raises(OSError, match=f"{tmp_path}/{name}"):
                LogWriter(str(tmp_path / name))
    finally:
        os.close(reader)
    assert not (tmp_path / "target").exists()
    assert (tmp_path / "other").read_text() == "another's\n"


def test_no_link_is_followed_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "outside" / "pod").mkdir(parents=True)
    (tmp_path / "way").symlink_to(tmp_path / "outside")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in ("way/0.log", "way/pod/0.log", "loop/0.log"):
        with pytest.raises(NotADirectoryError, match="must be a directory, and no link"):
            LogWriter(str(tmp_path / path))
    assert list((tmp_path / "outside").iterdir()) == [tmp_path / "outside" / "pod"]
    assert list((tmp_path / "outside" / "pod").iterdir()) == []


def test_a_link_in_the_place_of_the_directory_is_not_followed_by_a_reopen(tmp_path: Path) -> None:
    (tmp_path / "pod").mkdir()
    (tmp_path / "outside").mkdir()
    log = LogWriter(str(tmp_path / "pod" / "0.log"))
    (tmp_path / "pod").rename(tmp_path / "moved")
    (tmp_path / "pod").symlink_to(tmp_path / "outside")
    with pytest.raises(NotADirectoryError):
        log.reopen()
    log.write("stdout", b"kept\n")
    log.close()
    assert list((tmp_path / "outside").iterdir()) == []
    assert _parse((tmp_path / "moved" / "0.log").read_bytes())[b"stdout"] == b"kept\n"


def test_room_for_a_log_is_made_below_a_directory_that_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "pods").symlink_to(tmp_path / "disk")
    pods = str(tmp_path / "pods")
    for _ in range(2):
        make_room(f"{pods}/a/b/0.log", pods, 0o755)
    assert (tmp_path / "disk" / "a" / "b").is_dir()
    (tmp_path / "disk" / "a" / "link").symlink_to(tmp_path)
    with pytest.raises(NotADirectoryError):
        make_room(f"{pods}/a/link/c/0.log", pods, 0o755)
    assert not (tmp_path / "c").exists()
    os.mkfifo(tmp_path / "disk" / "a" / "0.log")
    with pytest.raises(OSError, match="must be a regular file"):
        make_room(f"{pods}/a/0.log", pods, 0o755)


def test_no_descriptor_is_lost(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    gc.collect()  # what earlier tests' rubbish has open is not to be closed meanwhile
    before = os.listdir("/proc/self/fd")
    for name in ("link/0.log", "none/0.log", "fifo", "n" * 300):
        with pytest.raises(OSError):
            LogWriter(str(tmp_path / name))
        with pytest.raises(OSError):
            make_room(str(tmp_path / name / "x"), str(tmp_path), 0)
    assert os.listdir("/proc/self/fd") == before


def test_no_path_means_no_log() -> None:
    log = LogWriter("")
    log.write("stdout", b"nowhere\n")
    log.end("stdout")
    log.reopen()
    log.close()
    assert log.dropped == 0


def test_a_full_disk_loses_records_and_tears_none_of_those_that_follow(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    log = LogWriter(str(path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        log.write("stdout", b"x" * 80 + b"\n")  # a short write: 100 of 121 bytes or so
        log.write("stdout", b"lost\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    lost = log.dropped
    log.write("stdout", b"after\n")
    log.close()
    lines = path.read_bytes().splitlines(keepends=True)
    assert lost > 0
    assert len(lines) == 2
    assert _parse(lines[1])[b"stdout"] == b"after\n"
