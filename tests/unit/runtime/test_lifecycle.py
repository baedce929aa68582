"""The life of pods and containers: the table of steps, what enforces it, its events, and its drawing."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criserver.api import views
from criserver.errors import CriError, NotFoundError, ResourceExhaustedError
from criserver.runtime.events import Event, Events
from criserver.runtime.lifecycle import (
    CONTAINER_STEPS,
    SANDBOX_STEPS,
    ContainerState,
    EventType,
    SandboxState,
    State,
    Step,
    events_of,
    is_allowed,
    is_visible,
)
from criserver.runtime.record_store import RecordStore
from criserver.runtime.records import Container, Record, Sandbox, dump
from tests.support.records import container, sandbox
from tests.support.samples import FakeStore, brought_to, in_state

ROOT = Path(__file__).parents[3]

# Written down once more, by hand: a step that comes into the table by mistake is in one of the two only.
SANDBOX = """
    - creating
    creating ready  creating -  creating not-ready  creating removing
    ready not-ready  ready removing
    not-ready removing
    removing -
"""
CONTAINER = """
    - creating
    creating created  creating -  creating exited  creating removing
    created starting  created exited  created removing
    starting running  starting exited  starting removing
    running exited  running removing
    exited removing
    removing -
"""


def pairs(text: str) -> set[tuple[str, str]]:
    words = text.split()
    return set(zip(words[::2], words[1::2], strict=True))


def word(state: State | None) -> str:
    return "-" if state is None else state.value


@pytest.mark.parametrize(
    ("kind", "steps", "text"), [(SandboxState, SANDBOX_STEPS, SANDBOX), (ContainerState, CONTAINER_STEPS, CONTAINER)]
)
def test_a_step_is_allowed_where_it_is_in_the_table_and_nowhere_else(
    kind: Any, steps: tuple[Step, ...], text: str
) -> None:
    assert len(steps) == len(pairs(text))
    for old, new in itertools.product((None, *kind), repeat=2):
        expected = (word(old), word(new)) in pairs(text) or (old is new and old is not None)
        assert is_allowed(old, new) == expected, (old, new)
    other: Any = ContainerState if kind is SandboxState else SandboxState
    assert not any(is_allowed(old, new) for old, new in itertools.product(kind, other))


@pytest.mark.parametrize("state", [*SandboxState, *ContainerState])
def test_every_state_is_reached_and_left(state: State) -> None:
    steps = (*SANDBOX_STEPS, *CONTAINER_STEPS)
    assert any(step.new is state for step in steps)
    assert any(step.old is state for step in steps)


@pytest.mark.parametrize("state", [*SandboxState, *ContainerState])
def test_what_callers_see_has_a_state_of_cri(state: State) -> None:
    assert is_visible(state) == (state in views.SANDBOX_STATES or state in views.CONTAINER_STATES)


@pytest.mark.parametrize("step", [*SANDBOX_STEPS, *CONTAINER_STEPS], ids=lambda s: f"{word(s.old)} {word(s.new)}")
def test_a_record_is_told_of_from_when_it_is_seen_until_it_is_not(step: Step) -> None:
    before, after = (state is not None and is_visible(state) for state in (step.old, step.new))
    assert (EventType.CREATED in step.events) == (after and not before)
    assert (EventType.DELETED in step.events) == (before and not after)
    assert events_of(step.old, step.new) == step.events


def _note(changes: list[tuple[Record | None, Record | None]], before: Record | None, after: Record | None) -> None:
    changes.append((before, after))


@pytest.mark.parametrize("write", ["save", "observe"])
@pytest.mark.parametrize("old", [*SandboxState, *ContainerState])
async def test_the_record_store_takes_the_steps_of_the_table_only(old: State, write: str) -> None:
    for new in (*type(old), None):
        records = RecordStore(store := FakeStore())
        if isinstance(old, SandboxState):
            record: Record = sandbox("a", old)
        else:
            brought_to(records, pod := sandbox("p", SandboxState.READY))
            record = container("a", pod, old)
        brought_to(records, record)
        stored = {table: dict(rows) for table, rows in store.tables.items()}
        changes: list[tuple[Record | None, Record | None]] = []
        records.watch(partial(_note, changes))
        there = records.sandboxes if isinstance(record, Sandbox) else records.containers

        async def step(
            records: RecordStore = records,
            record: Container | Sandbox = record,
            new: ContainerState | SandboxState | None = new,
        ) -> None:
            if new is None:
                await records.forget(record)
            else:
                await getattr(records, write)(in_state(record, new))

        if is_allowed(old, new):
            await step()
            assert len(changes) == 1
            assert (there["a"].state if "a" in there else None) is new
        else:
            what = "pod sandbox" if isinstance(record, Sandbox) else "container"
            words = f"^{what} a cannot go from {old.value} to {'nothing' if new is None else new.value};"
            with pytest.raises(CriError, match=words) as refused:
                await step()
            assert type(refused.value) is CriError  # INTERNAL: a fault of ours
            assert changes == []
            assert there["a"] == record
            assert store.tables == stored


async def test_a_record_that_is_gone_does_not_come_back() -> None:
    records = RecordStore(FakeStore())
    brought_to(records, gone := sandbox("a", SandboxState.REMOVING))
    await records.forget(gone)
    for write in (records.save, records.observe, records.forget):
        with pytest.raises(CriError, match="cannot go from nothing"):
            await write(gone)
    with pytest.raises(CriError, match="cannot go from nothing to ready"):
        await records.add(sandbox("b", SandboxState.READY))
    assert records.sandboxes == {}
    # Its name is nobody's.
    await records.add(sandbox("b"))


async def test_what_is_observed_while_a_record_is_written_is_kept() -> None:
    """A container ends while its new limits are written."""
    records = RecordStore(store := FakeStore())
    brought_to(records, pod := sandbox("p", SandboxState.READY))
    brought_to(records, running := container("c", pod, ContainerState.RUNNING))
    saving = asyncio.create_task(records.save(dataclasses.replace(running, sent=b"new")))
    await asyncio.sleep(0)
    await records.observe(running.ended(3, "Error"))
    saved = await saving
    assert (saved.sent, saved.state, saved.exit_code) == (b"new", ContainerState.EXITED, 3)
    assert records.container("c") == saved
    await asyncio.sleep(0)
    assert store.tables["containers"]["c"] == dump(saved)


async def test_the_changes_of_one_record_are_waited_for() -> None:
    records = RecordStore(store := FakeStore())
    brought_to(records, pod := sandbox("p", SandboxState.READY))
    brought_to(records, running := container("c", pod, ContainerState.RUNNING))
    await records.written("c")
    records.observe(dataclasses.replace(running, sent=b"new"))
    records.observe(ended := running.ended(3, "Error"))
    assert store.tables["containers"]["c"] == dump(running)
    await records.written("c")
    assert store.tables["containers"]["c"] == dump(ended)


async def test_a_record_that_is_removed_while_it_is_written_does_not_come_back() -> None:
    records = RecordStore(store := FakeStore())
    brought_to(records, gone := sandbox("p", SandboxState.REMOVING))
    saving = asyncio.create_task(records.save(dataclasses.replace(gone, sent=b"new")))
    await asyncio.sleep(0)
    await records.forget(gone)
    await saving
    assert not records.sandboxes
    assert not store.tables["sandboxes"]


def test_what_is_being_made_is_not_seen() -> None:
    records = RecordStore(FakeStore())
    brought_to(records, pod := sandbox("aa", SandboxState.READY))
    brought_to(records, made := container("ca", pod, ContainerState.CREATED))
    brought_to(records, sandbox("ab"))
    brought_to(records, container("cb", pod))
    assert (records.visible_sandboxes(), records.visible_containers()) == ([pod], [made])
    assert (records.visible_sandbox("aa"), records.visible_container("ca")) == (pod, made)
    with pytest.raises(NotFoundError, match=r"^pod sandbox ab is still being made$"):
        records.visible_sandbox("ab")
    with pytest.raises(NotFoundError, match=r"^container cb is still being made$"):
        records.visible_container("cb")


async def test_an_event_shows_the_pod_without_what_is_being_made() -> None:
    records = RecordStore(FakeStore())
    brought_to(records, pod := sandbox("p", SandboxState.READY))
    brought_to(records, container("hidden", pod))
    heard, listening = _listen(Events(records))
    await asyncio.sleep(0)
    brought_to(records, made := container("made", pod, ContainerState.CREATED))
    await asyncio.sleep(0)
    listening.cancel()
    assert [(event.id, event.type, event.containers) for event in heard] == [("made", EventType.CREATED, (made,))]


def test_an_end_is_now_unless_it_is_known_when() -> None:
    begun = dataclasses.replace(container("c", sandbox("p"), ContainerState.RUNNING), pid=7, started_at=5)
    ended = begun.ended(3, "Error", finished_at=6)
    assert (ended.state, ended.exit_code, ended.reason, ended.message) == (ContainerState.EXITED, 3, "Error", "")
    assert (ended.pid, ended.started_at, ended.finished_at) == (7, 5, 6)
    late = begun.ended(255, "Unknown", "why")
    assert (late.reason, late.message) == ("Unknown", "why")
    assert late.finished_at > 1e18


# Whose next state, which, how it is written down, and whether the disk is full then.
MOVES = st.lists(
    st.one_of(
        st.tuples(
            st.just("pod"), st.sampled_from([*SandboxState, None]), st.sampled_from(["save", "observe"]), st.booleans()
        ),
        st.tuples(
            st.sampled_from(["one", "two"]),
            st.sampled_from([*ContainerState, None]),
            st.sampled_from(["save", "observe"]),
            st.booleans(),
        ),
    ),
    max_size=80,
)


@given(MOVES)
def test_whatever_is_tried_records_and_events_are_as_the_table_says(
    moves: list[tuple[str, State | None, str, bool]],
) -> None:
    asyncio.run(_walk(moves))


async def _walk(moves: list[tuple[str, State | None, str, bool]]) -> None:
    store = FakeStore()
    records = RecordStore(store)
    heard, listening = _listen(Events(records))
    await asyncio.sleep(0)
    ids: dict[str, str] = {}
    lives: dict[str, list[State | None]] = {}
    for number, (who, new, write, store.full) in enumerate(moves):
        pod = records.sandboxes.get(ids.get("pod", ""))
        there = pod if who == "pod" else records.containers.get(ids.get(who, ""))
        if who != "pod" and (pod is None or not is_visible(pod.state)):
            continue  # nobody makes a container of a pod that is not there yet
        if who == "pod" and new is None and records.containers:
            continue  # nor lets go of a pod before them
        old = None if there is None else there.state
        key = f"{who}{number}" if there is None else there.id
        if new is None:
            if there is None:
                continue
            record: Record = there
        elif isinstance(new, SandboxState):
            record = sandbox(key, new)
        else:
            assert pod is not None
            record = container(key, pod, new)
        change = records.forget if new is None else records.add if there is None else getattr(records, write)
        try:
            await change(record)
        except ResourceExhaustedError:
            assert store.full
            assert change != records.observe
            assert is_allowed(old, new)
        except CriError:
            assert not is_allowed(old, new)
        else:
            assert is_allowed(old, new)
            assert change == records.observe or not store.full
            ids[who] = key
            lives.setdefault(key, [None]).append(new)
    store.full = False
    await asyncio.sleep(0)
    listening.cancel()

    left: dict[str, Record] = {**records.sandboxes, **records.containers}
    for key, life in lives.items():
        assert (left[key].state if key in left else None) is life[-1]
        events = [event for event in heard if event.id == key]
        kinds = [event.type for event in events]
        assert kinds == [kind for step in itertools.pairwise(life) for kind in events_of(*step)]
        # Once each, and in the order of EventType.
        assert kinds == [kind for kind in EventType if kind in kinds]
        assert (EventType.CREATED in kinds) == any(state is not None and is_visible(state) for state in life)
    assert left.keys() <= lives.keys()
    for event in heard:
        assert all(is_visible(c.state) for c in event.containers)
        views.event(event)


def _listen(events: Events) -> tuple[list[Event], asyncio.Task[None]]:
    heard: list[Event] = []

    async def run() -> None:
        async for event in events.listen():
            heard.append(event)

    return heard, asyncio.create_task(run())


def drawing(steps: tuple[Step, ...]) -> str:
    """The table of docs/architecture.md: each step with its states, reason and events."""
    lines = ["| from | to | reason | events |", "| --- | --- | --- | --- |"]
    for step in steps:
        old, new = ("none" if state is None else f"`{state.name}`" for state in (step.old, step.new))
        lines.append(f"| {old} | {new} | {step.reason} | {', '.join(kind.name for kind in step.events)} |")
    return "\n".join(lines) + "\n"


def test_the_drawing_in_the_documentation_is_the_table() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    (section,) = re.findall(r"\n## The life of a pod and of a container\n(.*?)\n## ", page, re.DOTALL)
    drawn = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert drawn == [drawing(SANDBOX_STEPS), drawing(CONTAINER_STEPS)]
