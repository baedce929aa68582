"""Rules of imports that the import linter cannot check. Its contracts are in pyproject.toml."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def imported(path: Path) -> set[str]:
    """The first parts of all names that a module imports, wherever it does."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0] if node.level == 0 else path.parent.name)
    return found


def test_shims_import_the_standard_library_alone() -> None:
    """Each import costs memory in every pod of a node."""
    modules = list((ROOT / "shims").rglob("*.py"))
    assert len(modules) > 5
    names = set().union(*map(imported, modules))
    assert names - sys.stdlib_module_names == {"shims"}
