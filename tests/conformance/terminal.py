"""A program at a terminal, with a person before it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping


class Terminal:
    """A program at a terminal of its own, 100 columns by 30 lines at first."""

    def __init__(self, words: list[str], environment: Mapping[str, str] | None = None) -> None:
        self.master, other = pty.openpty()
        self._size(100, 30)
        self.process = subprocess.Popen(
            words,
            stdin=other,
            stdout=other,
            stderr=other,
            env=environment,
            # The terminal is its controlling one: Ctrl-C, a resize and a hang-up are signals.
            preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
        )
        os.close(other)
        self.seen = b""

    def resize(self, width: int, height: int) -> None:
        """The kernel tells the program by SIGWINCH."""
        self._size(width, height)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, wanted: bytes) -> bytes:
        """Read until ``wanted`` has been shown; what was shown before it."""
        deadline = time.monotonic() + 20
        while wanted not in self.seen:
            readable, _, _ = select.select([self.master], [], [], deadline - time.monotonic())
            assert readable, self.seen
            self.seen += os.read(self.master, 4096)
        before, _, self.seen = self.seen.partition(wanted)
        return before

    def wait(self) -> int:
        """The program's exit code; what it still shows is kept in ``seen``."""
        with contextlib.suppress(OSError):
            while True:
                self.seen += os.read(self.master, 4096)
        return self.process.wait(20)

    def hang_up(self) -> None:
        """The window is closed, or the connection to it lost."""
        os.close(self.master)
        self.master = -1

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.master >= 0:
            os.close(self.master)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def _size(self, width: int, height: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))


@contextlib.contextmanager
def terminal(words: list[str], environment: Mapping[str, str] | None = None) -> Iterator[Terminal]:
    found = Terminal(words, environment)
    try:
        yield found
    finally:
        found.close()
