"""Lists as joins of serialised entries."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criserver.api.lists import Fragments, Slices, make_each
from criserver.pb.runtime.v1 import api_pb2 as cri


@dataclasses.dataclass(frozen=True)
class Record:
    id: str
    name: str


def make(record: Record) -> bytes:
    entry = cri.Container(id=record.id, metadata=cri.ContainerMetadata(name=record.name))
    return cri.ListContainersResponse(containers=[entry]).SerializeToString()


async def test_other_tasks_run_after_each_slice_of_a_long_answer() -> None:
    times = iter([0.0, 0.001, 0.0015, 0.003, 0.003, 0.0035])  # of the creation, the entries, and after the turn
    turns: list[int] = []
    slices = Slices(lambda: next(times))
    after = []
    for entry in range(4):
        asyncio.get_running_loop().call_soon(turns.append, entry)
        await slices.end()
        after.append(list(turns))
    assert after == [[], [], [0, 1, 2], [0, 1, 2]]


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=50), max_size=20))
def test_the_join_is_the_list(names: dict[str, str]) -> None:
    records = [Record(key, name) for key, name in names.items()]
    joined = cri.ListContainersResponse.FromString(Fragments(make).join(records, len(records)))
    assert [(c.id, c.metadata.name) for c in joined.containers] == list(names.items())


def test_an_entry_is_made_again_only_when_its_record_changes() -> None:
    made: list[str] = []

    def counting(record: Record) -> bytes:
        made.append(record.id)
        return make(record)

    fragments = Fragments(counting)
    records = [Record("a", "1"), Record("b", "1")]
    fragments.join(records, 2)
    fragments.join(records, 2)
    assert made == ["a", "b"]
    records[1] = dataclasses.replace(records[1], name="2")
    assert b"2" in fragments.join(records, 2)
    assert made == ["a", "b", "b"]


def test_a_record_whose_entry_cannot_be_made_is_left_out_and_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    tried: list[str] = []

    def choosy(record: Record) -> bytes:
        tried.append(record.id)
        if record.name == "bad":
            raise ValueError("no entry")
        return make(record)

    fragments = Fragments(choosy)
    records = [Record("a", "1"), Record("b", "bad"), Record("c", "1")]
    for _ in range(2):
        joined = cri.ListContainersResponse.FromString(fragments.join(records, 3))
        assert [c.id for c in joined.containers] == ["a", "c"]
    assert tried == ["a", "b", "c"]
    assert "left out of a list" in capsys.readouterr().out
    assert list(make_each(records, choosy)) == [make(records[0]), make(records[2])]


def test_fragments_of_removed_records_are_let_go() -> None:
    fragments = Fragments(make)
    for number in range(1000):
        fragments.join([Record(str(number), "x")], 1)
    assert len(fragments._kept) <= 67
