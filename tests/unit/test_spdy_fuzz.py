"""The fuzzer's corpus, and some inputs more: see tests/fuzz/spdy.py for what holds for each."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.spdy import run

CORPUS = sorted((Path(__file__).parents[1] / "fuzz" / "corpus" / "spdy").iterdir())


def test_there_is_a_corpus() -> None:
    assert CORPUS


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_an_input_of_the_corpus_breaks_nothing(path: Path) -> None:
    run(path.read_bytes())


@given(st.binary(max_size=300))
def test_no_input_breaks_anything(content: bytes) -> None:
    run(content)
