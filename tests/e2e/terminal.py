"""A command on a terminal of its own, and what its screen shows."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable

_SEQUENCE = re.compile(r"\x1b\[(\d*)([A-Z])|\r|\n|[^\x1b\r\n]+")


class Terminal:
    """``criserver`` with these arguments on a terminal of so many columns and rows."""

    def __init__(self, *arguments: str, columns: int = 80, rows: int = 24) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        # No preexec_fn: it would fork this process, with the threads that gRPC has in it.
        self.process = subprocess.Popen(
            ["setsid", "--ctty", sys.executable, "-m", "criserver", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(slave)
        self.printed = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        """Type ``text``."""
        os.write(self._master, text.encode())

    def until(self, condition: Callable[[list[str]], bool], seconds: float = 20) -> list[str]:
        """The screen's lines once they fulfil ``condition``."""
        deadline = time.monotonic() + seconds
        while not condition(screen(self.printed)):
            assert time.monotonic() < deadline, self.printed
            if not self._read():
                assert condition(screen(self.printed)), self.printed
        return screen(self.printed)

    def end(self) -> int:
        """The exit code, when all that is printed has been read."""
        while self._read():
            pass
        return self.process.wait(20)

    def _read(self) -> bool:
        if not select.select([self._master], [], [], 20)[0]:
            raise AssertionError(f"nothing is printed any more: {self.printed}")
        try:
            data = os.read(self._master, 65536)
        except OSError:  # nobody has the other end any more
            return False
        self.printed += data.decode()
        return bool(data)


def screen(printed: str) -> list[str]:
    """The lines that are seen, by the control sequences that the command uses."""
    lines, row, column = [""], 0, 0
    for found in _SEQUENCE.finditer(printed):
        match found[2], found[0]:
            case "A", _:
                assert int(found[1]) <= row, "the cursor leaves the screen"
                row -= int(found[1])
            case "K", _:
                lines[row] = ""
            case "J", _:
                del lines[row + 1 :]
                lines[row] = lines[row][:column]
            case None, "\r":
                column = 0
            case None, "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            case None, text:
                lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
                column += len(text)
            case sequence:
                raise AssertionError(f"{sequence} is not understood")
    return [line for line in lines if line]
