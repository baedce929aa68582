"""A drawing of lines over time, as SVG: one panel above the other, each with an axis of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_WIDTH, _PANEL, _GAP, _LEFT = 720, 110, 40, 60


class Panel(NamedTuple):
    """One line: its title with the unit, and a value for each of ``Plot.times``."""

    title: str
    values: Sequence[float]


def plot(times: Sequence[float], panels: Sequence[Panel], marks: Sequence[float] = ()) -> str:
    """The SVG. ``times`` are seconds from the beginning; each of ``marks`` is a time that gets a vertical line."""
    end = max((*times, 1.0))
    height = len(panels) * (_PANEL + _GAP) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        parts += _panel(times, panel, marks, end, 24 + number * (_PANEL + _GAP))
    return "\n".join((*parts, "</svg>\n"))


def _panel(times: Sequence[float], panel: Panel, marks: Sequence[float], end: float, top: int) -> list[str]:
    most = max((*panel.values, 1.0)) * 1.05
    bottom, right = top + _PANEL, _WIDTH - 10

    def x(seconds: float) -> float:
        return _LEFT + seconds / end * (right - _LEFT)

    points = " ".join(
        f"{x(time):.1f},{bottom - value / most * _PANEL:.1f}" for time, value in zip(times, panel.values, strict=True)
    )
    lines = [f'<path d="M{x(mark):.1f} {top}V{bottom}" stroke="#ddd"/>' for mark in marks]
    return [
        *lines,
        f'<path d="M{_LEFT} {top}V{bottom}H{right}" stroke="black" fill="none"/>',
        f'<polyline points="{points}" fill="none" stroke="#06c"/>',
        f'<text x="{_LEFT}" y="{top - 6}">{panel.title}</text>',
        f'<text x="{_LEFT - 6}" y="{top + 8}" text-anchor="end">{most:.0f}</text>',
        f'<text x="{_LEFT - 6}" y="{bottom}" text-anchor="end">0</text>',
        f'<text x="{right}" y="{bottom + 14}" text-anchor="end">{end / 60:.1f} min</text>',
    ]
