"""Container logs in the CRI's format: `RFC3339Nano-time stdout|stderr F|P content`, one record a line.

Output is framed by the block, not by the line: one timestamp for each block read, and its newlines are
replaced in one pass of C code. `Framer` does the framing, without I/O; `LogWriter` owns the file.
"""

from __future__ import annotations

import os
import stat
import time
from errno import EAGAIN, EINVAL, ENOENT, ENOTDIR

MAX_LINE = 16 * 1024
"""Longest content of one record. Readers assume it: log shippers and the conformance suite stop at lines of
32 or 64 KiB, the other runtimes cut at this length."""

_STEP_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOK_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_WRITE_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
_MODE = 0o640
_ATTEMPTS = 10


class Clock:
    """Timestamps in UTC with nine digits of fraction; the part above a second is formatted once a second."""

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

    A tail without a newline is held back until its newline, the stream's end or MAX_LINE. Records of a line
    longer than MAX_LINE are P, P, … F; a last line without a newline is P too, so that the records give back
    the stream's bytes exactly: content, and a newline after each F.
    """

    __slots__ = ("_stream", "_tail")

    def __init__(self, stream: str) -> None:
        self._stream = stream.encode()
        self._tail = b""

    def feed(self, block: bytes, stamp: bytes) -> bytes:
        """The records that `block` completes, all with the time `stamp`."""
        data = self._tail + block if self._tail else block
        full = stamp + b" " + self._stream + b" F "
        records: list[bytes] = []
        lines = 0  # where the whole lines not yet framed begin
        at = 0  # all before is known to have no line longer than MAX_LINE
        while len(data) - at > MAX_LINE:
            newline = data.rfind(b"\n", at, at + MAX_LINE + 1)
            if newline >= 0:
                at = newline + 1
                continue
            _frame_lines(records, full, data, lines, at)
            lines = at + MAX_LINE
            records += (stamp, b" ", self._stream, b" P ", data[at:lines], b"\n")
            at = lines
        end = data.rfind(b"\n", at) + 1 or at
        _frame_lines(records, full, data, lines, end)
        self._tail = data[end:]
        return b"".join(records)

    def end(self, stamp: bytes) -> bytes:
        """The record of what is held back, if anything is: the stream has ended."""
        tail, self._tail = self._tail, b""
        return b"".join((stamp, b" ", self._stream, b" P ", tail, b"\n")) if tail else b""


def _frame_lines(records: list[bytes], prefix: bytes, data: bytes, start: int, end: int) -> None:
    """Append records for data[start:end], which is whole lines, or nothing."""
    if start < end:
        records += (prefix, data[start : end - 1].replace(b"\n", b"\n" + prefix), b"\n")


def open_log(path: str) -> int:
    """Open the file at an absolute path to append to it, or create it. Raises OSError.

    A pod that mounts the host's log directory writes there as it likes. So no link is followed on the whole way, and
    the file is a regular one of a single name: neither a FIFO or a device, which an open alone may wake up or hang
    on, nor another file of the host by a hard link.
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
                # By way of the descriptor: it is the very file that was looked at.
                return os.open(f"/proc/self/fd/{found}", _WRITE_FLAGS)
            finally:
                os.close(found)
        raise OSError(EAGAIN, "the log file comes and goes", path)
    finally:
        os.close(parent)


def make_room(path: str, below: str, mode: int) -> None:
    """Make the directories for a log below an existing one, and look whether its file can be opened. Raises OSError."""
    name = os.path.basename(path)
    parent = _open_parent(path, below, mode)
    try:
        os.close(_look(name, parent, path))
    except FileNotFoundError:
        pass  # it will be made
    finally:
        os.close(parent)


def _look(name: str, parent: int, path: str) -> int:
    """A path descriptor of an existing log file. Raises OSError, FileNotFoundError where nothing is there."""
    fd = os.open(name, _LOOK_FLAGS, dir_fd=parent)
    try:
        _check(os.fstat(fd), path)
    except OSError:
        os.close(fd)
        raise
    return fd


def _check(found: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(EINVAL, "not a regular file, which a log must be", path)
    if found.st_nlink > 1:
        raise OSError(EINVAL, "a file of more than one name, which a log must not be", path)


def _open_parent(path: str, below: str = "/", make: int = 0) -> int:
    """A path descriptor of the directory that `path` is in. No link is followed below `below`, where the path begins.

    With `make`, a mode, directories that are not there are made. The caller closes the descriptor. Raises OSError.
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
        raise OSError(ENOTDIR, f"{name!r} is a link or no directory, which a log's path must not have", path) from None
    except FileNotFoundError:
        raise FileNotFoundError(ENOENT, "there is no such directory", path) from None


class LogWriter:
    """A container's log file. No failure to write holds up the container: what cannot be written is counted
    in `dropped` (bytes of the file) and forgotten.
    """

    __slots__ = ("_clock", "_fd", "_framers", "_path", "_torn", "dropped")

    def __init__(self, path: str) -> None:
        """Open or create the file, mode 0640; an empty path means that nothing is kept. Raises OSError."""
        self._path = path
        self._fd = open_log(path) if path else -1
        self._clock = Clock()
        self._framers = {name: Framer(name) for name in ("stdout", "stderr")}
        self._torn = False
        self.dropped = 0

    def write(self, stream: str, block: bytes) -> None:
        """Log a block that was read from `stream` ("stdout" or "stderr")."""
        if self._fd >= 0:
            self._write(self._framers[stream].feed(block, self._clock.stamp(time.time_ns())))

    def end(self, stream: str) -> None:
        """The stream has ended: log its last line if that has no newline."""
        if self._fd >= 0:
            self._write(self._framers[stream].end(self._clock.stamp(time.time_ns())))

    def reopen(self) -> None:
        """Go on in a new file at the same path: the old one was renamed. Raises OSError and keeps the old."""
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
        if self._torn:  # the last write stopped inside a record; these begin on a line of their own
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
