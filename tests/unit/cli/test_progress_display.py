"""How a pull's progress is shown."""

from __future__ import annotations

import io

import pytest

from criserver.cli.progress_display import Bars, Lines, size_words
from criserver.pb.criserver.v1 import admin_pb2 as admin


def layer(number: int, stage: admin.Stage, received: int = 0, size: int = 1000) -> admin.LayerProgress:
    return admin.LayerProgress(digest=f"sha256:{number:064x}"[:71], size=size, received=received, stage=stage)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (123_456_789, "123 MB"),
        (5 * 10**12, "5 TB"),
    ],
)
def test_sizes_have_three_digits(size: int, words: str) -> None:
    assert size_words(size) == words


def test_a_line_for_each_step_and_none_twice() -> None:
    stream = io.StringIO()
    lines = Lines(stream)
    same = "sha256:" + "a" * 64
    for stages in ((0, 0), (1, 0), (1, 1), (1, 1), (2, 1), (3, 3)):
        # Two layers of one image may be the same.
        lines.show([admin.LayerProgress(digest=same, size=5, stage=admin.Stage.Name(stage)) for stage in stages])
    words = ["downloading 5 B", "downloading 5 B", "unpacking", "done", "done"]
    assert stream.getvalue().splitlines() == [f"{'a' * 12} {step}" for step in words]


@pytest.mark.parametrize("size", [0, 1000])
def test_a_bar_has_its_width_whatever_is_said_of_the_layer(size: int) -> None:
    stream = io.StringIO()  # no terminal: 80 columns
    bars = Bars(stream)
    for received in (0, size // 2, size):
        bars.show([layer(1, admin.DOWNLOADING, received, size)])
    first, *others = stream.getvalue().split("\x1b[2K")[1:]
    for line in (first, *others):
        assert line.index("]") - line.index("[") == 41
    assert ("=" * 40 in others[-1]) == (size > 0)
    assert stream.getvalue().count("\x1b[1A") == 2


def test_what_is_being_worked_on_is_shown_before_the_rest() -> None:
    stream = io.StringIO()  # no terminal: 24 rows
    layers = [layer(n, admin.DONE if n < 30 else admin.DOWNLOADING, 1) for n in range(40)]
    Bars(stream).show(layers)
    lines = stream.getvalue().splitlines()
    assert sum("1 B / 1 kB" in line for line in lines) == 10
    assert "and 18 more, of which 18 are done" in lines[22]
