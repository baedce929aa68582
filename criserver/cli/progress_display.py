"""How far a pull is, for who waits for it: bars that are redrawn on a terminal, a line for each step elsewhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol, TextIO

from criserver.pb.criserver.v1 import admin_pb2 as admin

_DIGEST = len("sha256:") + 12
_WORDS = {
    admin.WAITING: "waiting",
    admin.DOWNLOADING: "downloading",
    admin.UNPACKING: "unpacking",
    admin.DONE: "done",
}
_UNITS = ("B", "kB", "MB", "GB", "TB")
# What stands beside a bar: the digest, the sizes, and what is between them.
_BESIDE = 40
_MAX_BAR = 50


class Display(Protocol):
    """Shows layers, again and again."""

    def show(self, layers: Sequence[admin.LayerProgress]) -> None:
        """The layers as they are now, the lowest first."""


def display(stream: TextIO) -> Display:
    """What suits ``stream``."""
    return Bars(stream) if stream.isatty() and os.environ.get("TERM") != "dumb" else Lines(stream)


def size_words(size: int) -> str:
    """A size in bytes with three digits and a decimal unit, as registries and disks have them."""
    value = float(size)
    for unit in _UNITS[:-1]:
        if value < 999.5:
            return f"{size} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} {_UNITS[-1]}"


class Lines:
    """A line whenever a layer comes to its next stage."""

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
    """A line for each layer, drawn over the ones before."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._drawn = 0

    def show(self, layers: Sequence[admin.LayerProgress]) -> None:
        """See Display."""
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except OSError:
            columns, rows = 80, 24
        # The cursor cannot go back to what has left the screen, nor know how many rows a wrapped line has.
        lines = [line[: max(columns - 1, 1)] for line in self._lines(layers, columns, max(rows - 1, 1))]
        text = f"\x1b[{self._drawn}A" if self._drawn else ""
        text += "".join(f"\x1b[2K{line}\n" for line in lines)
        # Of what was drawn before, lines may be left below.
        self._stream.write(f"{text}\x1b[J")
        self._stream.flush()
        self._drawn = len(lines)

    def _lines(self, layers: Sequence[admin.LayerProgress], columns: int, rows: int) -> list[str]:
        if len(layers) <= rows:
            return [_line(layer, columns) for layer in layers]
        # Those that are being worked on before the others; what finds no room is counted.
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
    """A digest's beginning, which is enough to name it."""
    return digest[:_DIGEST].removeprefix("sha256:")
