"""The output of ExecSync: a bound for all calls, a part that each call has, and an answer without copies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criserver.api import views
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.container_exec import ExecResult
from criserver.runtime.output_room import MAX_OUTPUT, OWN, Collected, OutputRoom


async def filled(room: OutputRoom, size: int) -> Collected:
    found = Collected(room)
    for at in range(0, size, 100_000):
        await found.write(b"x" * min(100_000, size - at))
    return found


async def test_one_output_has_all_that_it_may() -> None:
    room = OutputRoom()
    found = await filled(room, MAX_OUTPUT + 1)
    assert (len(found.data), found.cut) == (MAX_OUTPUT, True)
    assert room.left == 64 * (1 << 20) - MAX_OUTPUT + OWN
    found.release()
    found.release()
    assert room.left == 64 << 20


async def test_a_full_room_leaves_each_its_own_part_and_is_free_again() -> None:
    room = OutputRoom(1 << 20)
    first = await filled(room, 5 << 20)
    second = await filled(room, 5 << 20)
    small = await filled(room, OWN)
    assert (len(first.data), first.cut) == ((1 << 20) + OWN, True)
    assert (len(second.data), second.cut) == (OWN, True)
    assert (len(small.data), small.cut) == (OWN, False)
    first.release()
    await second.write(b"y" * 10)
    assert second.data.endswith(b"y" * 10)
    for each in (second, small):
        each.release()
    assert room.left == 1 << 20


@given(st.binary(max_size=300), st.binary(max_size=40_000), st.integers(0, 255))
def test_the_answer_is_the_message(stdout: bytes, stderr: bytes, code: int) -> None:
    answer = views.exec_result(ExecResult(bytearray(stdout), stderr, code))
    assert cri.ExecSyncResponse.FromString(answer) == cri.ExecSyncResponse(stdout=stdout, stderr=stderr, exit_code=code)


@pytest.mark.parametrize("size", [127, 128, 16383, 16384, 1 << 21, MAX_OUTPUT])
def test_an_answer_of_every_length_of_length(size: int) -> None:
    answer = views.exec_result(ExecResult(b"x" * size, b"", 0))
    assert cri.ExecSyncResponse.FromString(answer).stdout == b"x" * size
