"""Numbers in foreign text."""

from __future__ import annotations

import pytest

from criserver.numbers import decimal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        (b"0", 0),
        ("255", 255),
        ("000255", 255),
        ("256", None),
        ("9" * 5000, None),
        ("0" * 5000, 0),
        ("", None),
        *((text, None) for text in ("-1", "+1", " 1", "1 ", "1\n", "1_0", "0x1", "1.0", "²", "１", "\ud800")),
        (b"\xb2", None),
    ],
)
def test_ascii_digits_and_nothing_else(text: bytes | str, expected: int | None) -> None:
    assert decimal(text, 255) == expected
