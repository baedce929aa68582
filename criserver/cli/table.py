"""Tables for people: they fit the terminal, and are plain text without colours where the output is no terminal."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from criserver.text import printable

_GAP = "  "
_CUT = "…"
# Columns of the terminal below which no cell is cut.
_MIN_WIDTH = 8
_COLOURS = {"green": "32", "yellow": "33", "red": "31", "bold": "1"}
_UNITS = ((86_400, "d"), (3600, "h"), (60, "m"), (1, "s"))


@dataclass(frozen=True, slots=True)
class Cell:
    """A text with a colour: "green", "yellow", "red", "bold", or "" for none."""

    text: str
    colour: str = ""


def print_table(rows: Sequence[Sequence[str | Cell]], *, keep: Sequence[int] = (), indent: str = "") -> None:
    """Print rows with their columns in line; the first row is the header.

    If the terminal is too narrow, the widest cells are cut, except in the columns of the numbers ``keep``. Characters
    that a terminal does not print are escaped, as names come from others.
    """
    for line in lines(rows, width=_terminal_width(sys.stdout), keep=keep, indent=indent, coloured=coloured(sys.stdout)):
        print(line)


def lines(
    rows: Sequence[Sequence[str | Cell]],
    *,
    width: int | None,
    keep: Sequence[int] = (),
    indent: str = "",
    coloured: bool = False,
) -> list[str]:
    """The lines of a table that is at most ``width`` wide; None for no limit."""
    cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    texts = [[printable(cell.text) for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    if width is not None:
        _shrink(widths, width - len(indent) - len(_GAP) * (len(widths) - 1), keep)
    found = []
    for row, words in zip(cells, texts, strict=True):
        line = []
        for cell, text, room in zip(row, words, widths, strict=True):
            fitting = text if len(text) <= room else text[: room - 1] + _CUT
            padding = " " * (room - len(fitting))
            line.append((paint(fitting, cell.colour) if coloured else fitting) + padding)
        found.append((indent + _GAP.join(line)).rstrip())
    return found


def _shrink(widths: list[int], room: int, keep: Sequence[int]) -> None:
    """Make the widest columns narrower until all fit into ``room``, or until none can be narrower."""
    while sum(widths) > room:
        widest = max((n for n in range(len(widths)) if n not in keep), key=lambda n: widths[n], default=None)
        if widest is None or widths[widest] <= _MIN_WIDTH:
            return
        widths[widest] -= 1


def coloured(stream: TextIO) -> bool:
    """Whether a stream takes colours: a terminal, unless NO_COLOR (no-color.org) or TERM=dumb says otherwise."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str) -> str:
    """The text with the escape sequence of a colour around it; "" is no colour."""
    return f"\033[{_COLOURS[colour]}m{text}\033[0m" if colour else text


def _terminal_width(stream: TextIO) -> int | None:
    return shutil.get_terminal_size().columns if stream.isatty() else None


def duration_words(seconds: float) -> str:
    """A duration with its two largest units: "3d4h", "5m2s", "7s"."""
    rest = max(int(seconds), 0)
    parts = []
    for size, unit in _UNITS:
        number, rest = divmod(rest, size)
        parts.append((number, unit))
    first = next((n for n, (number, _) in enumerate(parts) if number), len(parts) - 1)
    return "".join(f"{number}{unit}" for number, unit in parts[first : first + 2] if number) or "0s"


def count_words(number: int, what: str) -> str:
    """A number with its noun: "1 pod", "2 pods"."""
    return f"{number} {what}{'' if number == 1 else 's'}"
