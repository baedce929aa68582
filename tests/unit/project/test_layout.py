"""Where tests lie, and that one name means one thing.

A unit test lies as its module does, an integration test with its room, and helpers are in tests/support.
"""

from __future__ import annotations

import ast
import collections
import re
from pathlib import Path

import pytest

from tests.support.pages import ROOT

# Directory below tests/unit -> the package that it mirrors. Tests in project/ are of no module: docs, package, layout.
ROOMS = {"snapshotter": ROOT / "snapshotter", "shims": ROOT / "shims", "": ROOT / "criserver"}
UNIT, INTEGRATION = ROOT / "tests/unit", ROOT / "tests/integration"
# The errors of each package, and the command of which the other file of this name does the work.
SHARED_NAMES = {"__init__.py", "errors.py", "reset.py"}
SOURCES = [
    path
    for room in ("snapshotter", "shims", "criserver")
    for path in sorted((ROOT / room).rglob("*.py"))
    if ROOT / "criserver/pb" not in path.parents
]
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


def test_no_two_modules_have_one_name() -> None:
    counted = collections.Counter(path.name for path in SOURCES)
    assert len(counted) > 200
    assert {name for name, count in counted.items() if count > 1} == SHARED_NAMES


def test_no_two_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert len(places) > 300
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
