"""All sandboxes and containers of the node, in memory and in the database as one.

The only place that writes their records. Nothing here waits: a change is in memory and in the database, or in
neither, before the next step of the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

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
from criserver.store import Store
from criserver.text import shown

log = structlog.get_logger(__name__)

_Kind = TypeVar("_Kind", Sandbox, Container)


class Registry:
    """Records by ID, and the names they hold."""

    def __init__(self, store: Store, *, pass_over: bool = False) -> None:
        """Read all records of ``store``.

        Raises UnreadableError for one that cannot be read; with ``pass_over`` it is named in ``passed_over`` instead.
        """
        self._store = store
        self._sandboxes: dict[str, Sandbox] = {}
        self._containers: dict[str, Container] = {}
        self._names: dict[str, str] = {}
        self._watchers: list[Callable[[Record | None, Record | None], None]] = []
        self.passed_over: dict[tuple[str, str], str] = {}
        for table, load in (("sandboxes", self._load_sandbox), ("containers", self._load_container)):
            for key, stored in store.items(table):
                try:
                    load(stored)
                except UnreadableError as e:
                    self.passed_over[table, key] = f"database: the record {key} of {table} {e}"
        if self.passed_over and not pass_over:
            # What no record owns is cleared at start-up, and the containers of these may be running.
            raise UnreadableError(
                f"{next(iter(self.passed_over.values()))}, or take all pods of the node down with `criserver reset`. "
                f"{len(self.passed_over)} of the records cannot be read; all containers go on meanwhile"
            )
        self._containers = dict(sorted(self._containers.items(), key=lambda item: item[1].created_at))

    def forget_passed_over(self) -> None:
        """Delete the records that cannot be read: what they were of has been cleared."""
        for table, key in self.passed_over:
            self._store.delete(table, key)
        self.passed_over.clear()

    def watch(self, watcher: Callable[[Record | None, Record | None], None]) -> None:
        """Call ``watcher`` with the old and the new record at each change; None is one that is not there."""
        self._watchers.append(watcher)

    def _load_sandbox(self, stored: bytes) -> None:
        sandbox = load_sandbox(stored)
        self._sandboxes[sandbox.id] = sandbox
        self._names[sandbox.config.full_name] = sandbox.id

    def _load_container(self, stored: bytes) -> None:
        container = load_container(stored, self._sandboxes)
        self._containers[container.id] = container
        self._names[self.container_name(container)] = container.id

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
        """The containers that callers see, in the order of their making."""
        return [c for c in self._containers.values() if is_visible(c.state)]

    def containers_of(self, sandbox_id: str) -> Iterator[Container]:
        """The containers of one sandbox, in the order of their making."""
        return (c for c in list(self._containers.values()) if c.sandbox_id == sandbox_id)

    def sandbox(self, given: str) -> Sandbox:
        """The sandbox by its ID or a prefix that only it has. Raises NotFoundError, InvalidArgumentError."""
        return _find("pod sandbox", self._sandboxes, given)

    def container(self, given: str) -> Container:
        """The container by its ID or a prefix that only it has. Raises NotFoundError, InvalidArgumentError."""
        return _find("container", self._containers, given)

    def visible_sandbox(self, given: str) -> Sandbox:
        """As :meth:`sandbox`, and NotFoundError for one that callers do not see yet."""
        return _visible("pod sandbox", self.sandbox(given), given)

    def visible_container(self, given: str) -> Container:
        """As :meth:`container`, and NotFoundError for one that callers do not see yet."""
        return _visible("container", self.container(given), given)

    def container_name(self, container: Container) -> str:
        """The name that no two containers share."""
        config, pod = container.config, self._sandboxes[container.sandbox_id].config
        return f"{config.name}_{pod.full_name}_{config.attempt}"

    def add(self, record: Record) -> None:
        """Take a new record in, and its name with it. Raises AlreadyExistsError where the name is taken."""
        if isinstance(record, Sandbox):
            name, what = record.config.full_name, "pod sandbox"
        else:
            name, what = self.container_name(record), "container"
        if (holder := self._names.get(name)) is not None:
            raise AlreadyExistsError(f"{what} name {name} is taken by {holder}; remove that one or raise the attempt")
        self.save(record)
        self._names[name] = record.id

    def save(self, record: Record) -> None:
        """Replace a record by its next state. Raises ResourceExhaustedError, and nothing has changed then.

        So it is with CriError, for a step that is not in the table of :mod:`criserver.runtime.lifecycle`.
        """
        self._check(record, record.state)
        self._store.put(_table(record), record.id, dump(record))
        self._replace(record)

    def observe(self, record: Record) -> None:
        """Replace a record by a state that has come about by itself: it is so even where it cannot be written.

        What is lost with the memory then is found again at the next start: in the shim's own record, or in the kernel.
        A step that is not in the table is refused as by :meth:`save`: it has not come about, somebody is mistaken.
        """
        self._check(record, record.state)
        try:
            self._store.put(_table(record), record.id, dump(record))
        except ResourceExhaustedError as e:
            log.warning("a state cannot be written down", id=record.id, state=record.state.value, error=str(e))
        self._replace(record)

    def _check(self, record: Record, state: State | None) -> None:
        there = (self._sandboxes if isinstance(record, Sandbox) else self._containers).get(record.id)
        old = None if there is None else there.state
        if not is_allowed(old, state):
            what = "pod sandbox" if isinstance(record, Sandbox) else "container"
            raise CriError(
                f"{what} {record.id} cannot go from {_word(old)} to {_word(state)}; this is a fault of criserver: "
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

    def forget(self, record: Record) -> None:
        """Let go of a record and its name: the last step of its removal. Raises as :meth:`save` does."""
        self._check(record, None)
        self._store.delete(_table(record), record.id)
        if isinstance(record, Sandbox):
            self._names.pop(record.config.full_name, None)
            self._sandboxes.pop(record.id, None)
        else:
            self._names.pop(self.container_name(record), None)
            self._containers.pop(record.id, None)
        for watcher in self._watchers:
            watcher(record, None)


def _table(record: Record) -> str:
    return "sandboxes" if isinstance(record, Sandbox) else "containers"


def _word(state: State | None) -> str:
    return "nothing" if state is None else state.value


def _visible(what: str, record: _Kind, given: str) -> _Kind:
    if not is_visible(record.state):
        raise NotFoundError(f"{what} {given} is still being made")
    return record


def _find(what: str, records: Mapping[str, _Kind], given: str) -> _Kind:
    """By exact ID first, as the kubelet asks; a prefix is for people."""
    if (record := records.get(given)) is not None:
        return record
    if not given:
        raise InvalidArgumentError(f"the {what}'s ID is empty; it must be given")
    matches = [key for key in records if key.startswith(given)]
    if len(matches) > 1:
        raise InvalidArgumentError(
            f"{what} ID {shown(given)} is the beginning of {len(matches)} IDs; give more characters"
        )
    if not matches:
        raise NotFoundError(f"{what} {shown(given)} does not exist")
    return records[matches[0]]
