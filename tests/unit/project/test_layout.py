"""Where tests lie: a unit test as its module does, an integration test with its room, helpers in tests/support."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.pages import ROOT

# Directory below tests/unit -> the package that it mirrors. Tests in project/ are of no module: docs, package, layout.
ROOMS = {"snapshotter": ROOT / "snapshotter", "shims": ROOT / "shims", "": ROOT / "criserver"}
UNIT, INTEGRATION = ROOT / "tests/unit", ROOT / "tests/integration"
FILES = [path for path in UNIT.rglob("test_*.py") if UNIT / "project" not in path.parents]


def package(directory: str) -> Path:
    """The package of a room."""
    return ROOMS.get(directory, ROOT / "criserver" / directory)


def modules(directory: Path) -> set[str]:
    """The names of a package's modules, and its own, for what is tested through its public names."""
    return {directory.name, *(path.stem for path in directory.glob("*.py"))}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(UNIT)))
def test_a_unit_test_is_named_after_a_module_of_its_room(path: Path) -> None:
    room = package("" if path.parent == UNIT else str(path.parent.relative_to(UNIT)))
    name = path.stem.removeprefix("test_")
    assert any(name == module or name.startswith(f"{module}_") for module in modules(room)), (
        f"{room} has no such module"
    )


def test_integration_tests_are_of_one_room() -> None:
    directories = [path for path in INTEGRATION.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert directories
    for directory in directories:
        assert (package(directory.name) / "__init__.py").exists(), directory
    assert list(INTEGRATION.glob("test_*.py")) == []


def test_nothing_is_imported_from_a_test() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            for name in names:
                assert not re.search(r"(^|\.)test_\w+$", name), f"{path}: {name} is a test"
