"""Messages of the shim API: what protobuf's own library writes is read, and what is written here it reads."""

from __future__ import annotations

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from criserver.pb.runtime.v1 import api_pb2 as cri
from shims import task_wire
from shims.shim_config import RequestError


@given(st.integers(0, 2**63 - 1), st.integers(0, 999_999_999))
def test_numbers_are_those_of_protobuf(seconds: int, nanos: int) -> None:
    theirs = Timestamp(seconds=seconds, nanos=nanos).SerializeToString()
    assert task_wire.number(1, seconds) + task_wire.number(2, nanos) == theirs
    found = task_wire.fields(theirs)
    assert (task_wire.integer(found, 1), task_wire.integer(found, 2)) == (seconds, nanos)


@given(st.text(), st.binary())
def test_texts_and_messages_are_those_of_protobuf(text: str, value: bytes) -> None:
    theirs = AnyMessage(type_url=text or "t", value=value)
    ours = task_wire.any_of(7, text or "t", value)
    found = task_wire.content(task_wire.fields(ours), 7)
    assert found == theirs.SerializeToString()
    assert task_wire.content(task_wire.fields(found), 2) == value


def test_fields_of_every_type_are_passed_over() -> None:
    message = cri.ContainerStats(
        attributes=cri.ContainerAttributes(id="i", labels={"a": "b"}),
        cpu=cri.CpuUsage(timestamp=-1, usage_core_nano_seconds=cri.UInt64Value(value=5)),
    )
    assert task_wire.content(task_wire.fields(message.attributes.SerializeToString()), 1) == b"i"
    fixed = b"\x09" + bytes(8) + b"\x15" + bytes(4) + task_wire.number(3, 7)
    assert task_wire.integer(task_wire.fields(fixed), 3) == 7
    assert task_wire.integer(task_wire.fields(message.cpu.SerializeToString()), 1) == 2**64 - 1


@given(st.binary(max_size=64))
def test_any_bytes_are_a_message_or_an_error(message: bytes) -> None:
    try:
        found = task_wire.fields(message)
    except RequestError:
        return
    for field in found:
        task_wire.integer(found, field)
        task_wire.content(found, field)


@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 255), st.binary(max_size=40)), max_size=5), st.data()
)
def test_frames_may_come_in_any_pieces(frames: list[tuple[int, int, bytes]], data: st.DataObject) -> None:
    stream = b"".join(task_wire.frame(*frame) for frame in frames)
    decoder, found = task_wire.TaskFrames(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += decoder.feed(stream[:size])
        stream = stream[size:]
    assert found == frames


def test_a_frame_that_is_too_large_is_refused_before_it_is_read() -> None:
    size = (task_wire.MAX_MESSAGE + 1).to_bytes(4, "big")
    with pytest.raises(RequestError, match="4194305 bytes"):
        task_wire.TaskFrames().feed(size + bytes(6))


def test_the_end_of_a_task() -> None:
    at = task_wire.data(2, task_wire.number(1, 3) + task_wire.number(2, 5))
    assert task_wire.exit_of(task_wire.number(1, 137) + at) == (137, 3_000_000_005)
    assert task_wire.exit_of(b"") == (0, 0)
    late = task_wire.data(2, task_wire.number(1, 1 << 60))
    assert task_wire.exit_of(task_wire.number(1, 1) + late) == (1, 0)
    for wrong in (b"\xff", task_wire.number(1, 1 << 31), at + task_wire.data(2, b"\xff")):
        with pytest.raises(RequestError):
            task_wire.exit_of(wrong)
