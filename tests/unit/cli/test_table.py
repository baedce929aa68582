"""Tables and durations for people."""

from __future__ import annotations

import pytest

from criserver.cli.table import Cell, duration_words, lines

ROWS = [("NAME", "ID", "IMAGE"), ("web", "0123456789ab", "mirror.example/a/very/very/long/name:latest")]


def test_columns_are_in_line_and_nothing_ends_with_spaces() -> None:
    assert lines(ROWS, width=None) == [
        "NAME  ID            IMAGE",
        "web   0123456789ab  mirror.example/a/very/very/long/name:latest",
    ]


@pytest.mark.parametrize("width", [30, 40, 50])
def test_a_narrow_terminal_cuts_the_widest_cells_and_keeps_the_others(width: int) -> None:
    _, line = lines(ROWS, width=width, keep=(1,))
    assert len(line) == width
    assert line.startswith("web   0123456789ab  mirror")
    assert line.endswith("…")


def test_a_terminal_that_is_too_narrow_for_anything_gets_whole_rows() -> None:
    _, line = lines(ROWS, width=5, keep=(1,))
    assert line == "web   0123456789ab  mirror.…"


def test_colours_take_no_room_and_foreign_escapes_do_nothing() -> None:
    rows: list[tuple[str | Cell, str]] = [("STATE", "NAME"), (Cell("ready", "green"), "a\x1b[31mb")]
    assert lines(rows, width=None, coloured=True)[1] == "\x1b[32mready\x1b[0m  a\\x1b[31mb"
    assert lines(rows, width=None)[1] == "ready  a\\x1b[31mb"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0s"), (0.4, "0s"), (59, "59s"), (60, "1m"), (125, "2m5s"), (3600, "1h"), (3605, "1h"), (90_000, "1d1h")],
)
def test_a_duration_has_its_two_largest_units(seconds: float, words: str) -> None:
    assert duration_words(seconds) == words
