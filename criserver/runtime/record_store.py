"""The records of all sandboxes and containers of the node, in memory and in the database.

Only this module writes records. A change in memory is one step of the event loop. Its row is written by a thread:

1. :meth:`RecordStore.save` and :meth:`RecordStore.forget` wait for it, and change the memory afterwards.
2. :meth:`RecordStore.observe` changes the memory at once, as its step has happened already.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import structlog

from criserver.errors import (
    AlreadyExistsError,
    CriError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from criserver.runtime.lifecycle import State, is_allowed, is_visible
from criserver.runtime.records import (
    Container,
    Record,
    Sandbox,
    UnreadableError,
    dump,
    load_container,
    load_sandbox,
)
from criserver.store import Change, Store
from criserver.telemetry import operations
from criserver.text import shown

log = structlog.get_logger(__name__)

_Kind = TypeVar("_Kind", Sandbox, Container)


class RecordStore:
    """The records by ID, and the names that they reserve."""

    def __init__(self, store: Store, *, skip_unreadable: bool = False) -> None:
        """Read all records of ``store``.

        Raises UnreadableError if a record cannot be read. With ``skip_unreadable`` the attribute ``unreadable`` has the
        error of each such record instead, by table and key.
        """
        self._store = store
        self._sandboxes: dict[str, Sandbox] = {}
        self._containers: dict[str, Container] = {}
        # The IDs by the names that are reserved, and the other way round.
        self._names: dict[str, str] = {}
        self._name_of: dict[str, str] = {}
        self._watchers: list[Callable[[Record | None, Record | None], None]] = []
        # The last write behind of each record that has one under way, by ID. One thread makes them in their order.
        self._writes: dict[str, asyncio.Task[None]] = {}
        self.unreadable: dict[tuple[str, str], str] = {}
        for table, load in (("sandboxes", self._load_sandbox), ("containers", self._load_container)):
            for key, stored in store.items(table):
                try:
                    load(stored)
                except UnreadableError as e:
                    self.unreadable[table, key] = f"database: the record {key} of {table} {e}"
        if self.unreadable and not skip_unreadable:
            # The daemon's start would clear the containers of these records, as it clears all that has no record.
            raise UnreadableError(
                f"{next(iter(self.unreadable.values()))}. "
                f"{len(self.unreadable)} of the records cannot be read; all containers keep running meanwhile"
            )
        self._containers = dict(sorted(self._containers.items(), key=lambda item: item[1].created_at))

    async def delete_unreadable(self) -> None:
        """Delete the records that cannot be read, after their sandboxes and containers were cleared."""
        await self._store.write(*(Change(table, key, None) for table, key in self.unreadable))
        self.unreadable.clear()

    def watch(self, watcher: Callable[[Record | None, Record | None], None]) -> None:
        """Call ``watcher`` with the old and the new record at each change; None stands for no record."""
        self._watchers.append(watcher)

    def _load_sandbox(self, stored: bytes) -> None:
        sandbox = load_sandbox(stored)
        self._sandboxes[sandbox.id] = sandbox
        self._reserve(self._name(sandbox), sandbox.id)

    def _load_container(self, stored: bytes) -> None:
        container = load_container(stored, self._sandboxes)
        self._containers[container.id] = container
        self._reserve(self._name(container), container.id)

    def _name(self, record: Record) -> str:
        return record.config.full_name if isinstance(record, Sandbox) else self.container_name(record)

    def _reserve(self, name: str, record_id: str) -> None:
        self._names[name], self._name_of[record_id] = record_id, name

    def _release(self, record_id: str) -> None:
        name = self._name_of.pop(record_id)
        if self._names.get(name) == record_id:
            del self._names[name]

    @property
    def sandboxes(self) -> Mapping[str, Sandbox]:
        """All sandboxes, by ID."""
        return self._sandboxes

    @property
    def containers(self) -> Mapping[str, Container]:
        """All containers, by ID."""
        return self._containers

    def visible_sandboxes(self) -> list[Sandbox]:
        """The sandboxes that callers see."""
        return [s for s in self._sandboxes.values() if is_visible(s.state)]

    def visible_containers(self) -> list[Container]:
        """The containers that callers see, in the order in which they were created."""
        return [c for c in self._containers.values() if is_visible(c.state)]

    def containers_of(self, sandbox_id: str) -> Iterator[Container]:
        """The containers of one sandbox, in the order in which they were created."""
        return (c for c in list(self._containers.values()) if c.sandbox_id == sandbox_id)

    def sandbox(self, id_or_prefix: str) -> Sandbox:
        """The sandbox with this ID, or the only one whose ID begins so. Raises NotFoundError, InvalidArgumentError."""
        return _find("pod sandbox", self._sandboxes, id_or_prefix)

    def container(self, id_or_prefix: str) -> Container:
        """The container with this ID, or the only one whose ID begins so. Raises as :meth:`sandbox` does."""
        return _find("container", self._containers, id_or_prefix)

    def visible_sandbox(self, id_or_prefix: str) -> Sandbox:
        """As :meth:`sandbox`; also raises NotFoundError for a sandbox that callers do not see yet."""
        return _visible("pod sandbox", self.sandbox(id_or_prefix), id_or_prefix)

    def visible_container(self, id_or_prefix: str) -> Container:
        """As :meth:`container`; also raises NotFoundError for a container that callers do not see yet."""
        return _visible("container", self.container(id_or_prefix), id_or_prefix)

    def holder(self, name: str) -> str:
        """The ID that has this name, or ""."""
        return self._names.get(name, "")

    def container_name(self, container: Container) -> str:
        """The name that no two containers share."""
        config, pod = container.config, self._sandboxes[container.sandbox_id].config
        return f"{config.name}_{pod.full_name}_{config.attempt}"

    async def add(self, record: Record) -> None:
        """Add a new record and reserve its name. Raises AlreadyExistsError if the name is taken."""
        name = self._name(record)
        if (holder := self._names.get(name)) is not None:
            what = "pod sandbox" if isinstance(record, Sandbox) else "container"
            raise AlreadyExistsError(f"{what} name {name} is taken by {holder}; remove that one or raise the attempt")
        self._check(record, record.state)
        self._reserve(name, record.id)
        try:
            await self._store.write(_row(record))
        except BaseException:
            self._release(record.id)
            raise
        self._replace(record)

    async def save(self, record: _Kind) -> _Kind:
        """Replace the record of the same ID by this one. If an error is raised, nothing has changed.

        Returns the new record: it has what was observed while it was being written, besides what this one changes.
        Raises ResourceExhaustedError if the disk is full, NotFoundError if the record is removed meanwhile, CriError
        for a step that is not in the table of :mod:`criserver.runtime.lifecycle`.
        """
        self._check(record, record.state)
        old = self._current(record)
        await self._store.write(_row(record))
        current = self._current(record)
        if current is None:
            raise NotFoundError(f"{record.id} was removed meanwhile")
        if current is not old:
            changed = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
            changed = {name: value for name, value in changed.items() if value != getattr(old, name)}
            record = dataclasses.replace(current, **changed)
            self._check(record, record.state)
            self._write_behind(record)
        self._replace(record)
        return record

    def observe(self, record: Record) -> asyncio.Future[None]:
        """Replace a record after a step that has happened already, such as the end of a process.

        The step counts at once, also if a full disk keeps the record from the database. A later daemon then learns the
        state again, from the shim's own record or from the kernel. Raises CriError for a step that is not in the table:
        such a step cannot have happened. The result is done when the record is written, or a warning that it cannot be.
        """
        self._check(record, record.state)
        self._replace(record)
        return self._write_behind(record)

    def _write_behind(self, record: Record) -> asyncio.Future[None]:
        async def write(row: asyncio.Future[None]) -> None:
            try:
                with operations.WRITE.timed():
                    await row
            except (ResourceExhaustedError, OSError) as e:
                log.warning("a state cannot be stored", id=record.id, state=record.state.value, error=str(e))

        # Submitted now, so that rows are written in the order of the changes.
        task = asyncio.ensure_future(write(self._store.submit(_row(record))))
        self._writes[record.id] = task
        task.add_done_callback(partial(self._written, record.id))
        return task

    def _written(self, record_id: str, task: asyncio.Task[None]) -> None:
        if self._writes.get(record_id) is task:
            del self._writes[record_id]

    async def written(self, record_id: str) -> None:
        """Wait until all changes of a record are on disk. A change that cannot be written was logged and is no error.

        A call that has started something waits for this before its answer. A daemon that is killed after its answer
        must not forget what the caller was told.
        """
        if (task := self._writes.get(record_id)) is not None:
            await asyncio.wait([task])

    def _current(self, record: Record) -> Any:
        return (self._sandboxes if isinstance(record, Sandbox) else self._containers).get(record.id)

    def _check(self, record: Record, state: State | None) -> None:
        current = self._current(record)
        old = None if current is None else current.state
        if not is_allowed(old, state):
            what = "pod sandbox" if isinstance(record, Sandbox) else "container"
            raise CriError(
                f"{what} {record.id} cannot go from {_word(old)} to {_word(state)}; this is a bug in criserver: "
                "report it with the log"
            )

    def _replace(self, record: Record) -> None:
        old: Record | None
        if isinstance(record, Sandbox):
            old, self._sandboxes[record.id] = self._sandboxes.get(record.id), record
        else:
            old, self._containers[record.id] = self._containers.get(record.id), record
        for watcher in self._watchers:
            watcher(old, record)

    async def forget(self, record: Record) -> None:
        """Delete a record and free its name: the last step of a removal. Raises as :meth:`save` does."""
        self._check(record, None)
        await self._store.write(Change(_table(record), record.id, None))
        self._release(record.id)
        if isinstance(record, Sandbox):
            del self._sandboxes[record.id]
        else:
            del self._containers[record.id]
        for watcher in self._watchers:
            watcher(record, None)


def _row(record: Record) -> Change:
    return Change(_table(record), record.id, dump(record))


def _table(record: Record) -> str:
    return "sandboxes" if isinstance(record, Sandbox) else "containers"


def _word(state: State | None) -> str:
    return "nothing" if state is None else state.value


def _visible(what: str, record: _Kind, id_or_prefix: str) -> _Kind:
    if not is_visible(record.state):
        raise NotFoundError(f"{what} {id_or_prefix} is still being made")
    return record


def _find(what: str, records: Mapping[str, _Kind], id_or_prefix: str) -> _Kind:
    """The record with this ID, as the kubelet sends it, or the only one whose ID begins so, as people type it."""
    if (record := records.get(id_or_prefix)) is not None:
        return record
    if not id_or_prefix:
        raise InvalidArgumentError(f"the {what}'s ID is empty; it must be given")
    matches = [key for key in records if key.startswith(id_or_prefix)]
    if len(matches) > 1:
        raise InvalidArgumentError(
            f"{what} ID {shown(id_or_prefix)} is the beginning of {len(matches)} IDs; give more characters"
        )
    if not matches:
        raise NotFoundError(f"{what} {shown(id_or_prefix)} does not exist")
    return records[matches[0]]
