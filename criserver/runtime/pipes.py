"""Pipes between a command and whoever asked for it."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from typing import Self

# Seconds. A process that ran away into the background keeps a command's pipes open; what it may write yet is not waited
# for longer than this.
DRAIN_TIMEOUT = 2.0
_SIZE = 1 << 20


class Pipe:
    """A pipe whose one end is given away: closing it here leaves the other, which then does not block, to us."""

    def __enter__(self) -> Self:
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC)
        with suppress(OSError):  # the user's pipe budget is used up: the default size works too
            fcntl.fcntl(self.reader, fcntl.F_SETPIPE_SZ, _SIZE)
        return self

    def __exit__(self, *_: object) -> None:
        self.close_reader()
        self.close_writer()

    def close_reader(self) -> None:
        """The reading end has been given away, or is of no use any more."""
        self.reader = _closed(self.reader)
        if self.writer >= 0:
            os.set_blocking(self.writer, False)

    def close_writer(self) -> None:
        """The writing end has been given away, or is of no use any more."""
        self.writer = _closed(self.writer)
        if self.reader >= 0:
            os.set_blocking(self.reader, False)


def _closed(fd: int) -> int:
    if fd >= 0:
        os.close(fd)
    return -1
