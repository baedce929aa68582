"""The timelines of calls: what is below what, bars to scale, and lines that fit the terminal."""

from __future__ import annotations

from typing import Any

import pytest

from criserver.cli.trace import timelines
from criserver.pb.criserver.v1 import admin_pb2 as admin


def part(name: str, began: float, seconds: float, parent: int = -1, **more: Any) -> admin.TracedPart:
    return admin.TracedPart(name=name, began=began, seconds=seconds, parent=parent, **more)


def call(*parts: admin.TracedPart, seconds: float = 0.1, **more: Any) -> admin.TracedCall:
    fields: dict[str, Any] = {"rpc": "RunPodSandbox", "code": "OK", "about": {"pod": "shop/web-1"}, **more}
    return admin.TracedCall(seconds=seconds, parts=parts, at=1_700_000_000_123_000_000, **fields)


def test_each_part_is_a_line_below_what_it_belongs_to_and_its_bar_is_to_scale() -> None:
    parts = (part("CNI bridge ADD", 0, 0.05), part("late", 0.05, 0.05), part("inner", 0.01, 0.02, parent=0))
    heading, first, inner, late = timelines([call(*parts)], 76)
    assert heading.endswith(".123 RunPodSandbox shop/web-1  100.0 ms  OK")
    assert first == "  CNI bridge ADD      0.0 ms     50.0 ms  " + "=" * 17
    assert inner == "    inner            10.0 ms     20.0 ms  " + " " * 3 + "=" * 7
    assert late == "  late               50.0 ms     50.0 ms  " + " " * 17 + "=" * 17
    assert len(late) == 76


def test_a_failure_has_its_reason_and_work_under_way_an_open_end() -> None:
    parts = (
        part("CNI bridge ADD", 0, 0.05, error="no address is left\x1b"),
        part("CNI bridge DEL", 0.05, 0.05, under_way=True),
    )
    lines = list(timelines([call(*parts, error="it failed", code="INTERNAL", under_way=True)], 80, in_colour=True))
    assert lines[0].endswith("INTERNAL, and its work goes on\x1b[0m")
    assert lines[1] == "\x1b[31m  failed: it failed\x1b[0m"
    assert lines[3] == "\x1b[31m    failed: no address is left\\x1b\x1b[0m"
    assert lines[4].endswith("=>")
    (line,) = timelines([call(code="", under_way=True)], 80)
    assert line.endswith("  100.0 ms  under way")


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    blob = f"download sha256:{'a' * 64}"
    parts = [part(blob, 0, 200), part("a name that is much longer than all others " * 3, 0, 0.000001, error="e" * 500)]
    lines = list(timelines([call(*parts, seconds=200, dropped=3), call()], width))
    assert max(map(len, lines)) <= width
    if width >= 60:
        assert "download aaaaaaaaaaaa " in lines[1]
        assert "200.0 s" in lines[1]


def test_a_call_that_took_no_time_has_bars_too() -> None:
    (_, line) = timelines([call(part("lock", 0, 0), seconds=0)], 80)
    assert line.endswith("=")
