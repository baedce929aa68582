"""The progress of a pull for the operator: bars that are redrawn on a terminal, else a line for each step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol, TextIO

from criserver.pb.criserver.v1 import admin_pb2 as admin

_DIGEST = 12
_WORDS = {
    admin.WAITING: "waiting",
    admin.DOWNLOADING: "downloading",
    admin.UNPACKING: "unpacking",
    admin.DONE: "done",
}
_UNITS = ("B", "kB", "MB", "GB", "TB")
# The columns beside a bar: the digest, the sizes, and the spaces between.
_BESIDE = 40
_MAX_BAR = 50


class Display(Protocol):
    """Shows the progress of layers each time that it changes."""

    def show(self, layers: Sequence[admin.LayerProgress]) -> None:
        """The layers as they are now, the lowest first."""


def display(stream: TextIO) -> Display:
    """Bars if ``stream`` is a terminal that can move its cursor, else lines."""
    return Bars(stream) if stream.isatty() and os.environ.get("TERM") != "dumb" else Lines(stream)


def size_words(size: int) -> str:
    """A size in bytes with three digits and a decimal unit."""
    value = float(size)
    for unit in _UNITS[:-1]:
        if value < 999.5:
            return f"{size} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} {_UNITS[-1]}"


class Lines:
    """Prints a line when a layer comes to its next stage."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stages: dict[int, int] = {}

    def show(self, layers: Sequence[admin.LayerProgress]) -> None:
        """See Display."""
        for number, layer in enumerate(layers):
            if layer.stage != self._stages.get(number, admin.WAITING):
                self._stages[number] = layer.stage
                size = f" {size_words(layer.size)}" if layer.stage == admin.DOWNLOADING else ""
                print(f"{short(layer.digest)} {_WORDS[layer.stage]}{size}", file=self._stream, flush=True)


class Bars:
    """Prints a line for each layer, and draws it again over the last one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._drawn = 0

    def show(self, layers: Sequence[admin.LayerProgress]) -> None:
        """See Display."""
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except OSError:
            columns, rows = 80, 24
        # Lines are cut and bounded: the cursor cannot go back above the screen, and a wrapped line takes several rows.
        lines = [line[: max(columns - 1, 1)] for line in self._lines(layers, columns, max(rows - 1, 1))]
        text = f"\x1b[{self._drawn}A" if self._drawn else ""
        text += "".join(f"\x1b[2K{line}\n" for line in lines)
        # The last drawing may have had more lines; the escape sequence deletes what is below.
        self._stream.write(f"{text}\x1b[J")
        self._stream.flush()
        self._drawn = len(lines)

    def _lines(self, layers: Sequence[admin.LayerProgress], columns: int, rows: int) -> list[str]:
        if len(layers) <= rows:
            return [_line(layer, columns) for layer in layers]
        # Layers that are being downloaded or unpacked come first. Those that do not fit on the screen are counted.
        first = sorted(layers, key=lambda layer: layer.stage not in (admin.DOWNLOADING, admin.UNPACKING))[: rows - 1]
        chosen = {id(layer) for layer in first}
        rest = [layer for layer in layers if id(layer) not in chosen]
        done = sum(layer.stage == admin.DONE for layer in rest)
        shown = [_line(layer, columns) for layer in layers if id(layer) in chosen]
        return [*shown, f"and {len(rest)} more, of which {done} are done"]


def _line(layer: admin.LayerProgress, columns: int) -> str:
    start = short(layer.digest)
    if layer.stage != admin.DOWNLOADING:
        return f"{start} {_WORDS[layer.stage]}"
    sizes = f"{size_words(layer.received)} / {size_words(layer.size)}"
    width = min(columns - _BESIDE, _MAX_BAR)
    if width < 5:
        return f"{start} {sizes}"
    full = width * layer.received // max(layer.size, 1)
    return f"{start} [{'=' * full}{' ' * (width - full)}] {sizes}"


def short(digest: str) -> str:
    """The beginning of a digest or an ID, without its algorithm."""
    return digest.rpartition(":")[2][:_DIGEST]
