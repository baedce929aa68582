"""A program at a pseudoterminal, and a person's input to it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from typing import Self

from tests.support.waiting import SLOWNESS

# Seconds.
PATIENCE = 60.0 * SLOWNESS


class Terminal:
    """A program at a terminal of its own, which is closed with it at the end of the block."""

    def __init__(
        self,
        words: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        columns: int = 100,
        rows: int = 30,
    ) -> None:
        self.master, other = pty.openpty()
        self.resize(columns, rows)
        # The terminal is its controlling one: Ctrl-C, a resize and a hang-up are signals. No preexec_fn for that: it
        # would fork this process, with the threads that gRPC has in it.
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *words], stdin=other, stdout=other, stderr=other, env=environment
        )
        os.close(other)
        self.seen = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        if self.master >= 0:
            os.close(self.master)

    def resize(self, width: int, height: int) -> None:
        """The kernel tells the program by SIGWINCH."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, wanted: bytes) -> bytes:
        """Read until ``wanted`` has been shown; what was shown before it."""
        deadline = time.monotonic() + PATIENCE
        while wanted not in self.seen:
            assert self.read(deadline), self.seen
        before, _, self.seen = self.seen.partition(wanted)
        return before

    def wait(self) -> int:
        """The program's exit code; what it still shows is kept in ``seen``."""
        deadline = time.monotonic() + PATIENCE
        while self.read(deadline):
            pass
        return self.process.wait(PATIENCE)

    def hang_up(self) -> None:
        """The window is closed, or the connection to it lost."""
        os.close(self.master)
        self.master = -1

    def read(self, deadline: float) -> bool:
        """Take what comes next; False where nothing can any more."""
        readable, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
        assert readable, f"nothing comes; so far {self.seen!r}"
        try:
            piece = os.read(self.master, 4096)
        except OSError:  # all others have closed it
            return False
        self.seen += piece
        return bool(piece)
