"""Writes the figures of a run into README.md and docs/, between marks. So nobody types a figure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bench import drawing, table

ROOT = Path(__file__).parent.parent
_PAGES = ("README.md", "docs/performance.md", "docs/operating.md")
_BLOCK = re.compile(r"(<!-- bench: ([a-z]+) -->\n).*?(<!-- bench: end -->)", re.DOTALL)


def write_pages(document: dict[str, Any], root: Path = ROOT) -> None:
    """Put a run's figures into all pages, and the drawings beside docs/performance.md."""
    blocks = blocks_of(document)
    for name in _PAGES:
        path = root / name
        path.write_text(filled(path.read_text(), blocks))
    (root / "docs/performance.svg").write_text(drawing.ratios(document["samples"]))
    (root / "docs/growth.svg").write_text(drawing.growth(document["growth"]))


def filled(text: str, blocks: dict[str, str]) -> str:
    """A page with new contents between its marks. A mark that is not in ``blocks`` is a KeyError."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{blocks[found[2]]}\n\n{found[3]}", text)


def blocks_of(document: dict[str, Any]) -> dict[str, str]:
    """The Markdown of each block, by its name."""
    samples, growth = document["samples"], document["growth"]
    with_goal = [row for row in table.ROWS if row.goal_text()]
    return {
        "machine": _machine(document["machine"]),
        "medians": table.short_markdown(samples),
        "goals": table.markdown(samples, with_goal),
        "others": table.markdown(samples, [row for row in table.ROWS if row not in with_goal]),
        "growth": _growth(growth, list(growth)),
        "sizing": _growth(growth, [measure for measure in growth if measure.startswith("PSS")], (table.OURS,)),
    }


def _machine(facts: dict[str, Any]) -> str:
    minutes = sum(facts["seconds"].values()) / 60
    return (
        f"Measured on {facts['date']} in one run of {facts['rounds']} rounds and {minutes:.0f} minutes: "
        f"{facts['cores']} cores, Linux {facts['kernel'].partition('-')[0]}, Python {facts['python']}, "
        f"runc {facts['runc']}, {' and '.join(facts['runtimes'])}. "
        f"The load was {facts['load before']} before the run."
    )


def _growth(growth: dict[str, Any], measures: list[str], contenders: tuple[str, ...] = table.WHO[1:]) -> str:
    """A row for each measure and contender, a column for each number of pods."""
    columns = sorted({pods for measure in measures for points in growth[measure].values() for pods, _ in points})
    made = ["| | | " + " | ".join(f"{pods} pods" for pods in columns) + " |", "|" + "---|" * (len(columns) + 2)]
    for measure in measures:
        for who in contenders:
            by = {pods: table.number(value) for pods, value in growth[measure].get(who, ())}
            made.append(f"| {measure} | {who} | " + " | ".join(by.get(pods, "") for pods in columns) + " |")
    return "\n".join(made)
