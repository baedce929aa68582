"""The events of sandboxes and containers, sent to all listeners as they happen (CRI GetContainerEvents).

The record store is the source of events: each change of a record's state there makes them, whatever code changed it, so
none can be forgotten. :mod:`criserver.runtime.lifecycle` says which change makes which events.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from criserver.errors import ResourceExhaustedError
from criserver.runtime.lifecycle import EventType, events_of, is_visible
from criserver.runtime.record_store import RecordStore
from criserver.runtime.records import Container, Record, Sandbox

# Events. A listener that is this far behind is disconnected: it has to list everything again in any case.
MAX_BEHIND = 4096


@dataclass(frozen=True, slots=True)
class Event:
    """An event of ``id``, a container or a sandbox, and its whole pod as callers saw it at that moment.

    ``at`` is in Unix nanoseconds. ``sandbox`` of a deleted sandbox is its last record.
    """

    id: str
    type: EventType
    at: int
    sandbox: Sandbox
    containers: tuple[Container, ...]


class Events:
    """The events of a record store."""

    def __init__(self, records: RecordStore) -> None:
        self._records = records
        self._listeners: set[asyncio.Queue[Event | None]] = set()
        records.watch(self._changed)

    async def listen(self) -> AsyncIterator[Event]:
        """All events from now on. Raises ResourceExhaustedError if the listener is too slow."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            while (event := await queue.get()) is not None:
                yield event
            raise ResourceExhaustedError(
                f"the listener is {MAX_BEHIND} events behind; list all pods and containers, then listen again"
            )
        finally:
            self._listeners.discard(queue)

    def _changed(self, old: Record | None, new: Record | None) -> None:
        if not self._listeners:
            return
        record = new or old
        assert record is not None
        sandbox = record if isinstance(record, Sandbox) else self._records.sandbox(record.sandbox_id)
        for kind in events_of(None if old is None else old.state, None if new is None else new.state):
            containers = tuple(c for c in self._records.containers_of(sandbox.id) if is_visible(c.state))
            event = Event(record.id, kind, time.time_ns(), sandbox, containers)
            for queue in list(self._listeners):
                if queue.qsize() < MAX_BEHIND:
                    queue.put_nowait(event)
                else:
                    self._listeners.discard(queue)
                    queue.put_nowait(None)
