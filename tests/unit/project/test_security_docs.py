"""docs/security.md names only tests that exist, and each fault once, in order, with all that tests name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.pages import ROOT, functions_in, rows

PAGE = (ROOT / "docs/security.md").read_text()
PROMISES, _, HISTORY = PAGE.partition("\n## What other runtimes have had\n")
FAULTS = rows(HISTORY)
TEST = re.compile(r"`([\w/]+\.py)(?:::(\w+))?`")
ID = re.compile(r"CVE-(?:19|20)\d\d-\d{4,}|GHSA(?:-[23456789cfghjmpqrvwx]{4}){3}")
OTHERS = ("Not here: ", "The runtime's: ", "The plugins': ", "The kubelet's", "The kernel's")


def order(name: str) -> tuple[bool, list[int | str]]:
    """CVEs by year and number, then advisories without one."""
    kind, *parts = name.split("-")
    return kind != "CVE", [int(part) if kind == "CVE" else part for part in parts]


def named_by_tests() -> dict[str, str]:
    """The faults in the docstrings below tests/security, with a test that names each."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "tests/security").glob("test_*.py")):
        tree = ast.parse(path.read_text())
        for node in (tree, *ast.walk(tree)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                found |= dict.fromkeys(ID.findall(text), f"{path.name}::{getattr(node, 'name', '')}")
    return found


@pytest.mark.parametrize(("path", "function"), sorted(set(TEST.findall(PAGE))))
def test_every_test_that_is_referred_to_is_there(path: str, function: str) -> None:
    assert (ROOT / "tests" / path).is_file(), f"there is no tests/{path}"
    if function:
        assert function.startswith("test_")
        assert function in functions_in(path), f"there is no {path}::{function}"


def test_every_reference_to_a_test_is_understood() -> None:
    mentioned = set(re.findall(r"`([^`\s]*(?:\.py|::)[^`\s]*)`", PAGE))
    assert mentioned == {path + (f"::{function}" if function else "") for path, function in TEST.findall(PAGE)}


def test_every_promise_names_a_test() -> None:
    tables = [body for body in PROMISES.split("\n## ") if "| shown by |" in body]
    assert len(tables) > 5
    for body in tables:
        lines = body[body.index("|---|---|\n") + 10 :].splitlines()
        for line in filter(lambda line: line.startswith("|"), lines):
            promise, shown = [cell.strip() for cell in line.strip("|").split("|")]
            assert promise.endswith("."), promise
            assert TEST.search(shown), f"no test shows it: {promise}"


def test_every_fault_is_well_formed() -> None:
    for name, cells in FAULTS.items():
        assert ID.fullmatch(name), name
        assert len(cells) == 3, name
        project, what, here = cells
        assert project, name
        assert what, name
        assert here.startswith(OTHERS) or TEST.search(here), f"{name}: neither a test nor a reason"
        assert all(other in FAULTS for other in ID.findall(here)), name


def test_the_faults_are_in_order() -> None:
    assert list(FAULTS) == sorted(FAULTS, key=order)
    assert len(FAULTS) == HISTORY.count("\n| `")


def test_every_fault_that_a_test_names_is_in_the_table() -> None:
    assert {name: test for name, test in named_by_tests().items() if name not in FAULTS} == {}


def test_a_fault_that_a_test_names_refers_to_its_suite() -> None:
    """A reader of the table finds the tests that are about the fault."""
    for name, test in named_by_tests().items():
        assert f"security/{test.partition('::')[0]}" in FAULTS[name][2], f"{name}: {test} is not named"


def test_links_lead_somewhere() -> None:
    for page in ("docs/security.md", "SECURITY.md"):
        for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
            if not target.startswith("http"):
                assert Path(ROOT, page).parent.joinpath(target).exists(), f"{page}: {target}"
