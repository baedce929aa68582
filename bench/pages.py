"""Writes the figures of a run into README.md and docs/, between marks. So nobody types a figure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bench import drawing, table

ROOT = Path(__file__).parent.parent
_PAGES = ("README.md", "docs/performance.md", "docs/operating.md")
_NAMES = ("machine", "medians", "goals", "others", "growth", "sizing")
_BLOCK = re.compile(r"(<!-- bench: ([a-z]+) -->\n).*?(<!-- bench: end -->)", re.DOTALL)


def write_pages(document: dict[str, Any], root: Path = ROOT) -> None:
    """Put a run's figures into all pages, and the drawings beside docs/performance.md.

    A run without all groups of rows replaces the growth alone.
    """
    whole = set(table.GROUPS) <= set(document["machine"]["seconds"])
    blocks = blocks_of(document) if whole else growth_blocks(document)
    for name in _PAGES:
        path = root / name
        path.write_text(filled(path.read_text(), blocks))
    if whole:
        (root / "docs/performance.svg").write_text(drawing.ratios(document["samples"]))
    (root / "docs/growth.svg").write_text(drawing.growth(document["growth"]))


def filled(text: str, blocks: dict[str, str]) -> str:
    """A page with new contents between its marks. A block that is not in ``blocks`` stays as it is.

    A mark of a block that no run has is a KeyError.
    """

    def block(found: re.Match[str]) -> str:
        if found[2] not in _NAMES:
            raise KeyError(found[2])
        return f"{found[1]}\n{blocks[found[2]]}\n\n{found[3]}" if found[2] in blocks else found[0]

    return _BLOCK.sub(block, text)


def blocks_of(document: dict[str, Any]) -> dict[str, str]:
    """The Markdown of each block, by its name."""
    samples = document["samples"]
    with_goal = [row for row in table.ROWS if row.goal_text()]
    return {
        "machine": _machine(document["machine"]),
        "medians": table.short_markdown(samples),
        "goals": table.markdown(samples, with_goal),
        "others": table.markdown(samples, [row for row in table.ROWS if row not in with_goal]),
        **growth_blocks(document),
    }


def growth_blocks(document: dict[str, Any]) -> dict[str, str]:
    """The blocks that a run of the group ``standing`` has."""
    growth = document["growth"]
    return {
        "growth": f"{_machine(document['machine'])}\n\n{_growth(growth, list(growth))}",
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


def _growth(growth: dict[str, Any], measures: list[str], contenders: tuple[str, ...] = table.WHO) -> str:
    """A row for each measure and contender, a column for each number of pods."""
    columns = sorted({pods for measure in measures for points in growth[measure].values() for pods, _ in points})
    made = ["| | | " + " | ".join(f"{pods} pods" for pods in columns) + " |", "|" + "---|" * (len(columns) + 2)]
    for measure in measures:
        for who in contenders:
            if who not in growth[measure]:
                continue
            by = {pods: table.number(value) for pods, value in growth[measure][who]}
            made.append(f"| {measure} | {who} | " + " | ".join(by.get(pods, "") for pods in columns) + " |")
    return "\n".join(made)
