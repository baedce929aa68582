"""Frames on the wire: their bytes, and a reader that is given them in any pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criserver.ttrpc.message_frames import (
    HEAD,
    MAX_PAYLOAD,
    MessageFault,
    MessageFrame,
    MessageReader,
    MessageType,
    message_frame,
)


def test_the_bytes_are_the_specifications() -> None:
    assert message_frame(MessageType.REQUEST, 3, b"abc", 2) == b"\0\0\0\x03\0\0\0\x03\x01\x02abc"


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2**32 - 1), st.integers(0, 255), st.binary(max_size=40))))
def test_pieces_of_any_size_are_the_same_frames(sent: list[tuple[int, int, int, bytes]]) -> None:
    wire = b"".join(message_frame(MessageType(kind), stream, data, flags) for kind, stream, flags, data in sent)
    expected = [MessageFrame(kind, stream, flags, len(data), data) for kind, stream, flags, data in sent]
    for size in (1, 7, 4096):
        reader = MessageReader()
        pieces = [memoryview(wire[at : at + size]) for at in range(0, len(wire), size)]
        assert [frame for piece in pieces for frame in reader.read(piece)] == expected


def test_a_large_frame_is_skipped_and_the_next_one_read() -> None:
    size = MAX_PAYLOAD + 1
    wire = HEAD.pack(size, 5, 1, 0) + b"x" * size + message_frame(MessageType.RESPONSE, 7, b"y")
    assert list(MessageReader().read(memoryview(wire))) == [
        MessageFrame(1, 5, 0, size, None),
        MessageFrame(2, 7, 0, 1, b"y"),
    ]


def test_the_largest_frame_is_read() -> None:
    wire = message_frame(MessageType.DATA, 1, b"x" * MAX_PAYLOAD)
    (frame,) = MessageReader().read(memoryview(wire))
    assert frame.data == b"x" * MAX_PAYLOAD


def test_a_frame_of_an_unknown_type_is_ignored() -> None:
    wire = HEAD.pack(3, 1, 9, 0) + b"abc" + message_frame(MessageType.DATA, 1, b"y")
    assert [frame.data for frame in MessageReader().read(memoryview(wire))] == [b"y"]


def test_a_first_byte_that_is_not_zero_is_a_fault() -> None:
    with pytest.raises(MessageFault, match="first byte"):
        list(MessageReader().read(memoryview(HEAD.pack(1 << 24, 1, 1, 0))))
