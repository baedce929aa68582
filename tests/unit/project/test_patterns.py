"""No regular expression of the project has a ``$``, because it also matches before a last newline."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

import pytest

import criserver
import shims
import snapshotter

ROOT = Path(criserver.__file__).parent.parent
_FUNCTIONS = {"compile", "match", "fullmatch", "search", "sub", "subn", "split", "findall", "finditer"}


def sources() -> Iterator[Path]:
    for package in (criserver, shims, snapshotter):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            if "pb" not in path.parts:
                yield path


def literals() -> Iterator[tuple[str, str | bytes]]:
    """The patterns that are written as they are."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "re"
                and node.func.attr in _FUNCTIONS
                and isinstance(node.args[0], ast.Constant)
                and isinstance(node.args[0].value, str | bytes)
            ):
                yield f"{path}:{node.lineno}", node.args[0].value


def compiled() -> Iterator[tuple[str, str | bytes]]:
    """Those that are put together, as attributes of their modules."""
    for package in (criserver, snapshotter):
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if ".pb" in info.name or info.name.endswith("__main__"):
                continue
            for name, value in vars(importlib.import_module(info.name)).items():
                if isinstance(value, re.Pattern) and not value.flags & re.MULTILINE:
                    yield f"{info.name}.{name}", value.pattern


def in_schemas() -> Iterator[tuple[str, str | bytes]]:
    for path in sorted(ROOT.glob("criserver/**/*.json")):
        yield from ((str(path), pattern) for pattern in patterns_of(json.loads(path.read_text())))


def patterns_of(document: Any) -> Iterator[str]:
    if isinstance(document, dict):
        if isinstance(document.get("pattern"), str):
            yield document["pattern"]
        yield from document.get("patternProperties", {})
        for value in document.values():
            yield from patterns_of(value)
    elif isinstance(document, list):
        for value in document:
            yield from patterns_of(value)


def has_dollar(parsed: Any) -> bool:
    """Whether ``$`` is anywhere in a parsed pattern."""
    for operation, argument in parsed:
        if operation is _constants.AT and argument is _constants.AT_END:
            return True
        for part in argument if isinstance(argument, (tuple, list)) else (argument,):
            parts = part if isinstance(part, list) else [part]
            if any(isinstance(p, _parser.SubPattern) and has_dollar(p) for p in parts):
                return True
    return False


@pytest.mark.parametrize("found", [literals, compiled, in_schemas])
def test_no_pattern_matches_before_a_last_newline(found: Any) -> None:
    patterns = list(found())
    assert len(patterns) > 5, "nothing was looked at"
    wrong = [(where, pattern) for where, pattern in patterns if has_dollar(_parser.parse(pattern))]
    assert wrong == []


@pytest.mark.parametrize("pattern", ["^a$", "(a$|b)", "(?!b$)a", "a(?:b|(c$))?", "(?=x*$)"])
def test_the_look_for_it_finds_it(pattern: str) -> None:
    assert has_dollar(_parser.parse(pattern))
    assert not has_dollar(_parser.parse(pattern.replace("$", r"\Z")))


def test_a_schema_takes_no_last_newline() -> None:
    from criserver.errors import CriError
    from criserver.images import manifests

    digest = "sha256:" + "0" * 64
    layer = {"mediaType": manifests.OCI_LAYER, "digest": digest, "size": 1}
    document = {
        "schemaVersion": 2,
        "config": {"mediaType": manifests.OCI_CONFIG, "digest": digest, "size": 1},
        "layers": [layer],
    }
    manifests.parse_manifest(json.dumps(document).encode(), manifests.OCI_MANIFEST, "m")
    layer["digest"] = "sha256:" + "0" * 63 + "\n"
    with pytest.raises(CriError, match="digest"):
        manifests.parse_manifest(json.dumps(document).encode(), manifests.OCI_MANIFEST, "m")
