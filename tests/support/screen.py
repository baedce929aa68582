"""``criserver`` at a terminal, and the text on its screen."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable

from tests.support.terminal import PATIENCE, Terminal

_SEQUENCE = re.compile(r"\x1b\[(\d*)([A-Z])|\r|\n|[^\x1b\r\n]+")


class Screen(Terminal):
    """``criserver`` with these arguments at a terminal of so many columns and rows."""

    def __init__(self, *arguments: str, columns: int = 80, rows: int = 24) -> None:
        command = [sys.executable, "-m", "criserver", *arguments]
        super().__init__(command, {**os.environ, "TERM": "xterm"}, columns=columns, rows=rows)

    @property
    def printed(self) -> str:
        """All that was printed so far."""
        return self.seen.decode()

    def shows(self, condition: Callable[[list[str]], bool]) -> list[str]:
        """The screen's lines once they fulfil ``condition``."""
        deadline = time.monotonic() + PATIENCE
        while not condition(screen(self.printed)):
            assert time.monotonic() < deadline, self.printed
            if not self.read(deadline):
                assert condition(screen(self.printed)), self.printed
        return screen(self.printed)


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
