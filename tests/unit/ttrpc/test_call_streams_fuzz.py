"""The rules of the ttrpc fuzzer (tests/fuzz/ttrpc.py), with random inputs and without a fuzzer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.ttrpc import check


@given(st.binary(max_size=300))
def test_no_input_breaks_anything(content: bytes) -> None:
    check(content)
