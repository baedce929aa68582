"""What happens to sandboxes and containers, told to everyone who listens as it happens (CRI GetContainerEvents).

Events are read off the registry: a record that goes from one state to the next is an event, wherever the change
comes from, and none can be forgotten. Which step tells what is in :mod:`criserver.runtime.lifecycle`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from criserver.errors import ResourceExhaustedError
from criserver.runtime.lifecycle import EventType, is_visible, told
from criserver.runtime.records import Container, Record, Sandbox
from criserver.runtime.registry import Registry

# A listener that is this far behind is cut off: it has to list anew in any case.
MAX_BEHIND = 4096


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to ``id``, a container or a sandbox, and its whole pod, as callers saw it just then.

    ``at`` is in Unix nanoseconds. A deleted sandbox is in ``sandbox`` as it was last.
    """

    id: str
    type: EventType
    at: int
    sandbox: Sandbox
    containers: tuple[Container, ...]


class Events:
    """The events of a registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._listeners: set[asyncio.Queue[Event | None]] = set()
        registry.watch(self._changed)

    async def listen(self) -> AsyncIterator[Event]:
        """All events from now on. Raises ResourceExhaustedError where the listener does not keep up."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            while (event := await queue.get()) is not None:
                yield event
            raise ResourceExhaustedError(f"the listener is {MAX_BEHIND} events behind; list anew and listen again")
        finally:
            self._listeners.discard(queue)

    def _changed(self, old: Record | None, new: Record | None) -> None:
        if not self._listeners:
            return
        record = new or old
        assert record is not None
        sandbox = record if isinstance(record, Sandbox) else self._registry.sandbox(record.sandbox_id)
        for kind in told(None if old is None else old.state, None if new is None else new.state):
            containers = tuple(c for c in self._registry.containers_of(sandbox.id) if is_visible(c.state))
            event = Event(record.id, kind, time.time_ns(), sandbox, containers)
            for queue in list(self._listeners):
                if queue.qsize() < MAX_BEHIND:
                    queue.put_nowait(event)
                else:
                    self._listeners.discard(queue)
                    queue.put_nowait(None)
