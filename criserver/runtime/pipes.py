"""Pipes between a command and its caller."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from typing import Self

# Seconds to wait for the last output of a command that has ended. A process that it left in the background may keep the
# pipes open.
DRAIN_TIMEOUT = 2.0
_SIZE = 1 << 20


class Pipe:
    """A pipe with one end for another process. When that end is closed here, the other becomes non-blocking."""

    def __enter__(self) -> Self:
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC)
        with suppress(OSError):  # the user's limit of pipe buffers is reached: the default size works too
            fcntl.fcntl(self.reader, fcntl.F_SETPIPE_SZ, _SIZE)
        return self

    def __exit__(self, *_: object) -> None:
        self.close_reader()
        self.close_writer()

    def close_reader(self) -> None:
        """Close the reading end: another process has it now, or nobody needs it any more."""
        self.reader = _closed(self.reader)
        if self.writer >= 0:
            os.set_blocking(self.writer, False)

    def close_writer(self) -> None:
        """Close the writing end: another process has it now, or nobody needs it any more."""
        self.writer = _closed(self.writer)
        if self.reader >= 0:
            os.set_blocking(self.reader, False)


def _closed(fd: int) -> int:
    if fd >= 0:
        os.close(fd)
    return -1
