"""Rules of imports that the import linter cannot check. Its contracts are in pyproject.toml."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]
# What may import gRPC messages: the services and their caller, the plugins' protocol, and what puts the rooms together.
USERS_OF_MESSAGES = {"__init__", "__main__", "api", "cli", "daemon", "nri", "pb"}


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


def test_the_contract_on_messages_names_every_other_room() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = [found for found in contracts if "criserver.pb" in found.get("forbidden_modules", ())]
    paths = [path for path in (ROOT / "criserver").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    rooms = {f"criserver.{path.stem}" for path in paths if path.stem not in USERS_OF_MESSAGES}
    assert set(contract["source_modules"]) == rooms | {"shims", "snapshotter"}
