"""``criserver logs``: what a container has written, from the file in which its shim keeps it (CRI's log format)."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import BinaryIO

import grpc

from criserver.cli.client import ADMIN, RUNTIME, connected, method
from criserver.cli.options import address
from criserver.errors import FailedPreconditionError, NotFoundError
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.pb.runtime.v1 import api_pb2 as cri

# Seconds between two looks for new lines, and between two questions whether the container still runs.
_LOOK = 0.2
_ASK = 1.0


def logs(options: argparse.Namespace) -> int:
    """Print a container's output: its standard output on ours, its standard error on ours.

    Raises CriError with the daemon's error, FailedPreconditionError for a container without a log or with something
    else in its place, and NotFoundError if the file is missing.
    """
    with connected(address(options)) as channel:
        path, container_id = _log_of(channel, options.id)
        try:
            with open_to_read(path) as file:
                _show(file, options)
                if options.follow:
                    _follow(file, path, options, lambda: _runs(channel, container_id))
        except FileNotFoundError as e:
            raise NotFoundError(
                f"the log {path} does not exist: the container has not started, or it was deleted"
            ) from e
    return 0


def open_to_read(path: str) -> BinaryIO:
    """The log file. A pod that mounts the node's logs can put anything in its place.

    Raises OSError, FailedPreconditionError for what is no regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise
        raise FailedPreconditionError(f"the log {path} is a symbolic link, and not the container's log") from e
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FailedPreconditionError(f"the log {path} is no regular file, and not the container's log")
    return open(fd, "rb")


def _log_of(channel: grpc.Channel, text: str) -> tuple[str, str]:
    """The log file and the ID of a container, which is named by an ID, the beginning of one, or NAMESPACE/POD/NAME."""
    if text.count("/") == 2:
        text = _named(channel, text)
    status = method(channel, RUNTIME, "ContainerStatus")(cri.ContainerStatusRequest(container_id=text)).status
    if not status.log_path:
        raise FailedPreconditionError(f"container {status.id} has no log: its pod has no log directory")
    return status.log_path, status.id


def _named(channel: grpc.Channel, name: str) -> str:
    """The ID of the newest container with this NAMESPACE/POD/NAME."""
    containers = method(channel, ADMIN, "DiskUse")(admin.DiskUseRequest()).containers
    found = [c.id for c in containers if c.name == name]
    if not found:
        raise NotFoundError(f"there is no container {name}; `criserver ps --all` lists the containers")
    return str(found[-1])


def _runs(channel: grpc.Channel, container_id: str) -> bool:
    try:
        answer = method(channel, RUNTIME, "ContainerStatus")(cri.ContainerStatusRequest(container_id=container_id))
    except grpc.RpcError as e:
        if isinstance(e, grpc.Call) and e.code() is grpc.StatusCode.NOT_FOUND:
            return False
        raise
    return bool(answer.status.state in (cri.CONTAINER_CREATED, cri.CONTAINER_RUNNING))


def _show(file: BinaryIO, options: argparse.Namespace) -> None:
    lines: Iterator[bytes] = _whole_lines(file)
    if options.tail is not None:
        lines = iter(deque(lines, maxlen=options.tail))
    for line in lines:
        write_line(line, timestamps=options.timestamps)
    _flush()


def _follow(file: BinaryIO, path: str, options: argparse.Namespace, runs: Callable[[], bool]) -> None:
    """Print new lines until the container has exited. A log that was rotated is read to its end, then the new one."""
    asked = 0.0
    alive = True
    with contextlib.ExitStack() as opened:
        while True:
            if time.monotonic() - asked >= _ASK:
                alive, asked = runs(), time.monotonic()
            rotated = _is_rotated(file, path)
            for line in _whole_lines(file):
                write_line(line, timestamps=options.timestamps)
            _flush()
            if rotated:
                file = opened.enter_context(open_to_read(path))
            elif not alive:
                return
            else:
                time.sleep(_LOOK)


def _is_rotated(file: BinaryIO, path: str) -> bool:
    """Whether the path has another file by now. The kubelet renames a log, and the shim makes a new one."""
    try:
        return not os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False  # between the two steps


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines up to the end of the file. A line that is still being written is read at the next call."""
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith(b"\n"):
            file.seek(start)
            return
        yield line


def write_line(line: bytes, *, timestamps: bool) -> None:
    """Print one line of the log: TIME STREAM TAG TEXT. The tag P says that the text goes on in the next line.

    A line of another form is printed as it is.
    """
    parts = line.split(b" ", 3)
    if len(parts) < 4 or parts[1] not in (b"stdout", b"stderr"):
        sys.stdout.buffer.write(line)
        return
    moment, stream, tag, text = parts
    out = sys.stderr.buffer if stream == b"stderr" else sys.stdout.buffer
    if timestamps:
        out.write(moment + b" ")
    out.write(text[:-1] if tag.split(b":")[0] == b"P" else text)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
