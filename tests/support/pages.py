"""What the tests of the documentation read."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


def rows(text: str) -> dict[str, list[str]]:
    """The cells of each row of the tables in a text, by the name in its first cell; none comes twice."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert found.setdefault(name.strip("`"), cells) is cells, f"{name} has two rows"
    return found


@cache
def functions_in(path: str) -> set[str]:
    """The names of the test functions in a file below tests/."""
    file = ROOT / "tests" / path
    tree = ast.parse(file.read_text()) if file.exists() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
