"""Drawings of a run as SVG, without a library: bars of the ratios, and lines of growth."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from bench.table import FLOOR, OURS, PEER, ROWS, Samples, number

_FONT = 'font-family="sans-serif" font-size="12" fill="#222"'
_COLOURS = {OURS: "#2563a8", PEER: "#c97b1a", FLOOR: "#999"}
_LABELS, _BARS, _VALUES = 300, 300, 220  # widths, in pixels
_LINE = 22
_MOST = 1.5  # the longest bar; a longer one is cut and has its number
_PLOT_WIDTH, _PLOT_HEIGHT, _COLUMNS = 260, 170, 3

# By measure and contender: pairs of pods and value.
Growth = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]


def ratios(samples: Samples) -> str:
    """A bar for each row with a goal: criserver's time or memory as a share of containerd's, so shorter is better."""
    rows = [row for row in ROWS if row.goal_text() and row.ratio(samples.get(row.name, {}))]
    width, height = _LABELS + _BARS + _VALUES, (len(rows) + 2) * _LINE
    unit = _BARS / _MOST
    made = [_text(_LABELS, 14, "criserver divided by containerd (a line: containerd; a tick: the goal)")]
    for place, row in enumerate(rows):
        by, y = samples[row.name], (place + 1) * _LINE
        ratio = row.ratio(by) or 0.0
        share = 1 / ratio if row.more_is_better else ratio
        made.append(_text(_LABELS - 8, y + 15, row.title, end=True))
        made.append(_box(_LABELS, y + 4, min(share, _MOST) * unit, 14, _COLOURS[OURS]))
        if row.goal is not None:
            goal = 1 / row.goal if row.more_is_better else row.goal
            made.append(_box(_LABELS + goal * unit - 1, y + 2, 2, 18, "#222"))
        medians = " : ".join(number(statistics.median(by[who])) for who in (OURS, PEER))
        made.append(_text(_LABELS + _BARS + 8, y + 15, f"{share:.2f}   ({medians} {row.unit})"))
    made.append(_box(_LABELS + unit - 0.5, _LINE, 1, len(rows) * _LINE, _COLOURS[PEER]))
    return _document(width, height, made)


def growth(measures: Growth) -> str:
    """A plot of each measure by the number of pods, with a line for each contender, and for the floor if it has one."""
    made = []
    for place, (title, by) in enumerate(measures.items()):
        line, column = divmod(place, _COLUMNS)
        made += _plot(column * _PLOT_WIDTH, line * _PLOT_HEIGHT + _LINE, title, by)
    lines = -(-len(measures) // _COLUMNS)
    for place, (who, colour) in enumerate(_COLOURS.items()):
        made += [_box(20 + place * 120, 5, 12, 12, colour), _text(38 + place * 120, 16, who)]
    return _document(_COLUMNS * _PLOT_WIDTH, lines * _PLOT_HEIGHT + _LINE, made)


def _plot(left: float, top: float, title: str, by: Mapping[str, Sequence[Sequence[float]]]) -> list[str]:
    right, bottom, x, y = left + _PLOT_WIDTH - 20, top + _PLOT_HEIGHT - 30, left + 50, top + 30
    points = [point for found in by.values() for point in found]
    pods, most = max(point[0] for point in points), max(point[1] for point in points) or 1.0
    made = [_text(left + 10, top + 18, title), _text(x - 6, y + 5, number(most), end=True)]
    made += [_text(x - 6, bottom, "0", end=True), _text(right, bottom + 16, f"{pods:.0f} pods", end=True)]
    made.append(f'<path d="M{x} {y}V{bottom}H{right}" fill="none" stroke="#999"/>')
    for who, found in by.items():
        places = [(x + n / pods * (right - x), bottom - value / most * (bottom - y)) for n, value in found]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        made.append(f'<polyline points="{path}" fill="none" stroke="{_COLOURS[who]}" stroke-width="2"/>')
        made += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{_COLOURS[who]}"/>' for a, b in places]
    return made


def _text(x: float, y: float, words: str, *, end: bool = False) -> str:
    anchor = ' text-anchor="end"' if end else ""
    return f'<text x="{x:.0f}" y="{y:.0f}"{anchor} {_FONT}>{escape(words)}</text>'


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _document(width: int, height: int, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return "\n".join((head, _box(0, 0, width, height, "#fff"), *parts, "</svg>")) + "\n"
