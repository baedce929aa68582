"""Container logs in the CRI's format: `RFC3339Nano-time stdout|stderr F|P content`, one record a line.

Output is framed in blocks and not in lines, which is faster: each block that was read has one timestamp, and C code
replaces all its newlines at once. `Framer` does the framing, without I/O. `LogWriter` owns the file.
"""

from __future__ import annotations

import os
import stat
import time
from errno import EAGAIN, EINVAL, ENOENT, ENOTDIR

MAX_LINE = 16 * 1024
"""Longest content of one record, in bytes, unless the configuration says another length. The other CRI runtimes cut at
this length. Readers rely on it: log shippers and the conformance suite read lines of at most 32 or 64 KiB."""

_STEP_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOK_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_WRITE_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
_MODE = 0o640
_ATTEMPTS = 10


class Clock:
    """Timestamps in UTC with nine digits of fraction. All but the fraction is formatted once a second."""

    __slots__ = ("_prefix", "_second")

    def __init__(self) -> None:
        self._second = -1
        self._prefix = ""

    def stamp(self, now_ns: int) -> bytes:
        """`now_ns` (nanoseconds of the epoch) as RFC 3339."""
        second, fraction = divmod(now_ns, 1_000_000_000)
        if second != self._second:
            self._second = second
            self._prefix = "%04d-%02d-%02dT%02d:%02d:%02d" % time.gmtime(second)[:6]  # noqa: UP031 - a tuple
        return f"{self._prefix}.{fraction:09d}Z".encode()


class Framer:
    """Turns the blocks of one stream into records.

    1. A line up to `max_line` bytes is one record with the tag F.
    2. A longer line is several records: P, P, … F.
    3. The last line of a stream, if it has no newline, is a record with the tag P.

    So a reader gets the stream's exact bytes: the content of each record, and a newline after each F. An unfinished
    line is held back until its newline comes, until it has `max_line` bytes, or until the stream ends.
    """

    __slots__ = ("_max_line", "_stream", "_tail")

    def __init__(self, stream: str, max_line: int = MAX_LINE) -> None:
        self._stream = stream.encode()
        self._max_line = max_line
        self._tail = b""

    def feed(self, block: bytes, stamp: bytes) -> bytes:
        """The records that `block` completes, all with the time `stamp`."""
        data = self._tail + block if self._tail else block
        full = stamp + b" " + self._stream + b" F "
        max_line = self._max_line
        records: list[bytes] = []
        lines = 0  # where the whole lines not yet framed begin
        at = 0  # no line before this place is longer than max_line
        while len(data) - at > max_line:
            newline = data.rfind(b"\n", at, at + max_line + 1)
            if newline >= 0:
                at = newline + 1
                continue
            _frame_lines(records, full, data, lines, at)
            lines = at + max_line
            records += (stamp, b" ", self._stream, b" P ", data[at:lines], b"\n")
            at = lines
        end = data.rfind(b"\n", at) + 1 or at
        _frame_lines(records, full, data, lines, end)
        self._tail = data[end:]
        return b"".join(records)

    def end(self, stamp: bytes) -> bytes:
        """The stream has ended: the record of the unfinished line, if there is one."""
        tail, self._tail = self._tail, b""
        return b"".join((stamp, b" ", self._stream, b" P ", tail, b"\n")) if tail else b""


def _frame_lines(records: list[bytes], prefix: bytes, data: bytes, start: int, end: int) -> None:
    """Append records for data[start:end], which is whole lines, or nothing."""
    if start < end:
        records += (prefix, data[start : end - 1].replace(b"\n", b"\n" + prefix), b"\n")


def open_log(path: str) -> int:
    """Open the file at an absolute path to append to it, or create it. Raises OSError.

    A pod that mounts the host's log directory can put anything there. So no symbolic link is followed anywhere in the
    path, and the file must be a regular file with one name:

    1. Opening a FIFO may block, and opening a device may start something.
    2. A hard link may be another file of the host.
    """
    name = os.path.basename(path)
    parent = _open_parent(path)
    try:
        for _ in range(_ATTEMPTS):
            try:
                return os.open(name, _WRITE_FLAGS | os.O_CREAT | os.O_EXCL, _MODE, dir_fd=parent)
            except FileExistsError:
                pass
            try:
                found = _look(name, parent, path)
            except FileNotFoundError:
                continue  # it was moved away just now
            try:
                # By its descriptor: this is the file that was checked.
                return os.open(f"/proc/self/fd/{found}", _WRITE_FLAGS)
            finally:
                os.close(found)
        raise OSError(EAGAIN, "the log file is replaced again and again", path)
    finally:
        os.close(parent)


def make_room(path: str, below: str, mode: int) -> None:
    """Make a log's directories below an existing one, and check that its file can be opened. Raises OSError."""
    name = os.path.basename(path)
    parent = _open_parent(path, below, mode)
    try:
        os.close(_look(name, parent, path))
    except FileNotFoundError:
        pass  # open_log makes it
    finally:
        os.close(parent)


def _look(name: str, parent: int, path: str) -> int:
    """A path descriptor of an existing log file. Raises OSError; FileNotFoundError if there is no file."""
    fd = os.open(name, _LOOK_FLAGS, dir_fd=parent)
    try:
        _check(os.fstat(fd), path)
    except OSError:
        os.close(fd)
        raise
    return fd


def _check(status: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(EINVAL, "a log must be a regular file", path)
    if status.st_nlink > 1:
        raise OSError(EINVAL, "a log must have no other name (hard link)", path)


def _open_parent(path: str, below: str = "/", make: int = 0) -> int:
    """A path descriptor of the directory of `path`, which begins with `below`. No link is followed after `below`.

    `make` is a mode: with it, missing directories are made. The caller closes the descriptor. Raises OSError.
    """
    fd = os.open(below, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in os.path.dirname(path)[len(below) :].split("/"):
            if name:
                inner = _enter(fd, name, path, make)
                os.close(fd)
                fd = inner
    except OSError:
        os.close(fd)
        raise
    return fd


def _enter(fd: int, name: str, path: str, make: int) -> int:
    if make:
        try:
            os.mkdir(name, make, dir_fd=fd)
        except FileExistsError:
            pass
    try:
        return os.open(name, _STEP_FLAGS, dir_fd=fd)
    except NotADirectoryError:
        raise OSError(ENOTDIR, f"{name!r} in a log's path must be a directory, and no link", path) from None
    except FileNotFoundError:
        raise FileNotFoundError(ENOENT, "the directory does not exist", path) from None


class LogWriter:
    """A container's log file.

    A write that fails does not stop the container: the bytes are lost, and `dropped` counts them.
    """

    __slots__ = ("_clock", "_fd", "_framers", "_path", "_torn", "dropped")

    def __init__(self, path: str, max_line: int = MAX_LINE) -> None:
        """Open or create the file, mode 0640. With an empty path nothing is logged. Raises OSError.

        `max_line` is the longest content of one record, in bytes.
        """
        self._path = path
        self._fd = open_log(path) if path else -1
        self._clock = Clock()
        self._framers = {name: Framer(name, max_line) for name in ("stdout", "stderr")}
        self._torn = False
        self.dropped = 0

    def write(self, stream: str, block: bytes) -> None:
        """Log a block that was read from `stream`, "stdout" or "stderr"."""
        if self._fd >= 0:
            self._write(self._framers[stream].feed(block, self._clock.stamp(time.time_ns())))

    def end(self, stream: str) -> None:
        """The stream has ended: log its last line if that has no newline."""
        if self._fd >= 0:
            self._write(self._framers[stream].end(self._clock.stamp(time.time_ns())))

    def reopen(self) -> None:
        """Go on in a new file at the same path: the old file was renamed. On OSError the old file stays in use."""
        if self._fd < 0:
            return
        fd = open_log(self._path)
        os.close(self._fd)
        self._fd = fd
        self._torn = False

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, records: bytes) -> None:
        if not records:
            return
        if self._torn:  # the last write stopped inside a record: begin a new line
            records = b"\n" + records
        rest = memoryview(records)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            self.dropped += len(rest)
        written = len(records) - len(rest)
        if written:
            self._torn = records[written - 1] != 0x0A
