"""What the benchmark makes of its samples: statistics, goals, tables, drawings, pages. It is not run here."""

from __future__ import annotations

import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from bench import drawing, loop, modules, pages, processes, table
from bench.__main__ import parse
from bench.measures.load import Beside
from tests.support.pages import ROOT

DOCUMENT: dict[str, Any] = {
    "machine": {
        "date": "2026-01-02",
        "rounds": 5,
        "seconds": dict.fromkeys(table.GROUPS, 60),
        "cores": 2,
        "kernel": "6.1.0-cloud",
        "python": "3.11.2",
        "runc": "1.1.5",
        "runtimes": ["criserver 1", "containerd 2"],
        "load before": 0.1,
    },
    "samples": {
        "pod-up": {"floor": [10.0], "criserver": [40.0, 50.0, 60.0], "containerd": [99.0, 100.0, 300.0]},
        "pods-a-second": {"criserver": [22.0], "containerd": [11.0]},
        "restart": {"criserver": [0.35], "containerd": [1.0]},
        "version": {"criserver": [0.5], "containerd": [0.25]},
    },
    "growth": {
        "pod up, ms": {"criserver": [[10, 40.0], [60, 41.0]], "containerd": [[10, 90.0], [60, 91.0]]},
        "PSS for each pod, MiB": {"criserver": [[10, 1.0], [60, 1.5]], "containerd": [[10, 5.0], [60, 5.0]]},
    },
}


def row(name: str) -> table.Row:
    (found,) = [row for row in table.ROWS if row.name == name]
    return found


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([5.0], 0.99, 5.0),
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        (range(1, 101), 0.99, 99),
        (range(1, 101), 0.9, 90),
        ([1, 2], 0, 1),
    ],
)
def test_a_percentile_is_a_sample_by_nearest_rank(values: list[float], share: float, expected: float) -> None:
    assert table.percentile(values, share) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (1.0, "1.00"),
        (15.551, "15.6"),
        (173.2, "173"),
        (12345.6, "12,346"),
        (-0.25, "-0.250"),
    ],
)
def test_a_figure_has_three_digits_that_mean_something(value: float, expected: str) -> None:
    assert table.number(value) == expected


def test_a_ratio_is_of_medians_and_needs_both() -> None:
    assert row("pod-up").ratio(DOCUMENT["samples"]["pod-up"]) == 0.5
    assert row("pod-up").ratio({"criserver": [1.0]}) is None
    assert row("pod-up").ratio({"criserver": [1.0], "containerd": [0.0]}) is None


@pytest.mark.parametrize(
    ("name", "ours", "theirs", "expected"),
    [
        ("pod-up", 50.0, 100.0, True),
        ("pod-up", 50.4, 100.0, True),  # shown as 0.50
        ("pod-up", 51.0, 100.0, False),
        ("pods-a-second", 22.0, 10.0, True),
        ("pods-a-second", 21.0, 10.0, False),
        ("restart", 0.4, 9.0, True),
        ("restart", 0.5, 9.0, False),
        ("version", 1.0, 1.0, None),
    ],
)
def test_a_goal_is_reached_or_not(name: str, ours: float, theirs: float, expected: bool | None) -> None:
    assert row(name).reached({"criserver": [ours], "containerd": [theirs]}) is expected


def test_a_row_that_was_not_measured_is_not_in_the_table() -> None:
    head, up, *others = table.lines(DOCUMENT["samples"], table.ROWS)
    assert up == (row("pod-up").title, "ms", "10.0", "50.0 (40.0-60.0)", "100 (99.0-300)", "0.50", "0.50", "yes")
    assert len(head) == len(up)
    assert [line[0] for line in others] == [row(name).title for name in ("pods-a-second", "restart", "version")]
    assert len({len(line) for line in table.text(DOCUMENT["samples"]).splitlines()}) == 1


def test_drawings_are_xml_with_every_row_and_measure() -> None:
    bars = ElementTree.fromstring(drawing.ratios(DOCUMENT["samples"]))
    words = [element.text or "" for element in bars.iter() if element.text]
    assert {row(name).title for name in ("pod-up", "pods-a-second", "restart")} <= set(words)
    # Twice as many a second is half of the time.
    assert "0.50   (22.0 : 11.0 1/s)" in words
    lines = ElementTree.fromstring(drawing.growth(DOCUMENT["growth"]))
    assert len([element for element in lines.iter() if element.tag.endswith("polyline")]) == 4


def test_the_pages_get_all_blocks_and_writing_twice_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/performance.md", "docs/operating.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    pages.write_pages(DOCUMENT, tmp_path)
    written = {path: path.read_text() for path in tmp_path.rglob("*.*")}
    assert "Linux 6.1.0, Python 3.11.2" in (tmp_path / "README.md").read_text()
    assert "| PSS for each pod, MiB | criserver | 1.00 | 1.50 |" in (tmp_path / "docs/operating.md").read_text()
    assert "| 50.0 (40.0-60.0) |" in (tmp_path / "docs/performance.md").read_text()
    pages.write_pages(DOCUMENT, tmp_path)
    assert {path: path.read_text() for path in tmp_path.rglob("*.*")} == written


def test_a_run_of_the_growth_alone_replaces_the_growth_alone(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/performance.md", "docs/operating.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    before = {name: (tmp_path / name).read_text() for name in ("README.md", "docs/performance.md")}
    pages.write_pages({**DOCUMENT, "machine": {**DOCUMENT["machine"], "seconds": {"standing": 60}}}, tmp_path)
    assert (tmp_path / "README.md").read_text() == before["README.md"]
    head, mark, _ = before["docs/performance.md"].partition("<!-- bench: growth -->")
    assert (tmp_path / "docs/performance.md").read_text().startswith(head + mark)
    assert "| pod up, ms | containerd | 90.0 | 91.0 |" in (tmp_path / "docs/performance.md").read_text()
    assert (tmp_path / "docs/growth.svg").exists()
    assert not (tmp_path / "docs/performance.svg").exists()


def test_the_cpu_time_of_a_process_has_that_of_its_ended_threads() -> None:
    """Programs in Go end threads that were in another namespace, and their time would be missing."""
    script = "import threading, time\n"
    script += "def work():\n while time.thread_time() < 0.1: pass\n"
    script += "t = threading.Thread(target=work); t.start(); t.join(); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"\n"
        assert processes.on_cpu([process.pid]) >= 0.1
        process.stdin.close()
    assert processes.on_cpu([process.pid]) == 0


def test_memory_by_module_is_of_packages_with_the_median_of_runs_and_one_row_for_small_ones() -> None:
    own = {"criserver": 120.0, "criserver.oci": 50.0, "criserver.oci.spec": 250.0, "wsproto.events": 150.0, "h11": 60.0}
    found = [
        {"started": 3000.0, "own": {**own, "json": 7.0, "asyncio.events": grown}} for grown in (400.0, 900.0, 500.0)
    ]
    assert modules.rows(found) == {
        "the interpreter": 3000.0,
        "asyncio": 500.0,
        "criserver.oci": 250.0,
        "h11, wsproto": 210.0,
        "criserver": 170.0,
        "other modules": 7.0,
    }


def test_a_mark_of_an_unknown_block_is_an_error() -> None:
    with pytest.raises(KeyError, match="nothing"):
        pages.filled("<!-- bench: nothing -->\n<!-- bench: end -->", {})


def test_only_a_run_of_all_rows_writes_pages(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["--pages", "--quick"],
        ["--pages", "--rows", "pods"],
        ["--pages", "--rows", "standing,pods"],
        ["--rows", "no-such"],
    ):
        with pytest.raises(SystemExit):
            parse(arguments)
        assert "error" in capsys.readouterr().err
    assert parse(["--pages", "--rows", "standing", "--growth"]).growth
    assert parse(["--pages"]).groups == list(table.GROUPS)
    assert parse(["--pages", "--from", "run.json"]).source == "run.json"


def test_the_report_on_the_loop_has_the_calls_and_the_longest_delay_first() -> None:
    late = [
        {"ms": 31, "cpu_ms": 30, "turn_ms": 0, "stack": ["a.py:1 f"]},
        {"ms": 64, "cpu_ms": 3, "turn_ms": 60, "stack": ["b.py:2 g", *["c.py:3 h"] * 9]},
    ]
    lines = loop.report(Beside({"status": [1.0, 2.0, 9.0]}, 42, 7), late).splitlines()
    assert lines == [
        "42 pods made and removed, 7 pulls",
        "status: median 2.0, p99 9.0, longest 9.0 ms",
        "the loop was late 2 times",
        "64 ms: 3 ms of work, 60 ms until it had a processor",
        "    b.py:2 g",
        *["    c.py:3 h"] * 4,
        "31 ms: 30 ms of work, 0 ms until it had a processor",
        "    a.py:1 f",
    ]
