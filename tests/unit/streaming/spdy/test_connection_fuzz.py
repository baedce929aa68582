"""What holds of SPDY for each input of the fuzzer (tests/fuzz/spdy.py) holds for any: without one, some more inputs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.spdy import check


@given(st.binary(max_size=300))
def test_no_input_breaks_anything(content: bytes) -> None:
    check(content)
