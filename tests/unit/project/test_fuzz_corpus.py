"""The bytes that fuzzing has found are replayed. No fuzzer is needed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

CORPUS = Path(__file__).parents[2] / "fuzz" / "corpus"
FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_replay(path: Path) -> None:
    importlib.import_module(f"tests.fuzz.{path.parent.name}").check(path.read_bytes())


def test_there_is_a_corpus_for_every_protocol() -> None:
    modules = {path.stem for path in CORPUS.parent.glob("*.py")} - {"__init__", "__main__"}
    assert {path.parent.name for path in FILES} == modules
    assert sum(path.stat().st_size for path in FILES) < 100_000
