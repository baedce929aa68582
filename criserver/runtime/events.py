"""What happens to sandboxes and containers, told to everyone who listens as it happens (CRI GetContainerEvents).

Events are read off the registry: a record that goes from one state to the next is an event, wherever the change
comes from, and none can be forgotten.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from criserver.errors import ResourceExhaustedError
from criserver.runtime.records import Container, ContainerState, Record, Sandbox, SandboxState
from criserver.runtime.registry import Registry

# A listener that is this far behind is cut off: it has to list anew in any case.
MAX_BEHIND = 4096


class EventType(enum.Enum):
    """CRI ContainerEventType."""

    CREATED = "created"
    STARTED = "started"
    STOPPED = "stopped"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to ``id``, a container or a sandbox, and its whole pod as it was just then.

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
        if isinstance(record, Sandbox):
            types, sandbox = _sandbox_events(old, new), record
        else:
            types, sandbox = _container_events(old, new), self._registry.sandbox(record.sandbox_id)
        for kind in types:
            containers = tuple(self._registry.containers_of(sandbox.id))
            event = Event(record.id, kind, time.time_ns(), sandbox, containers)
            for queue in list(self._listeners):
                if queue.qsize() < MAX_BEHIND:
                    queue.put_nowait(event)
                else:
                    self._listeners.discard(queue)
                    queue.put_nowait(None)


def _sandbox_events(old: Record | None, new: Record | None) -> list[EventType]:
    before, after = old and old.state, new and new.state
    if after is SandboxState.READY and before is SandboxState.CREATING:
        return [EventType.CREATED, EventType.STARTED]
    if before is SandboxState.READY and after is not SandboxState.READY:
        return [EventType.STOPPED]
    if after is None and before is not SandboxState.CREATING:
        return [EventType.DELETED]
    return []


def _container_events(old: Record | None, new: Record | None) -> list[EventType]:
    before, after = old and old.state, new and new.state
    if after is ContainerState.CREATED and before is ContainerState.CREATING:
        return [EventType.CREATED]
    if after is ContainerState.RUNNING and before is ContainerState.STARTING:
        return [EventType.STARTED]
    if after is ContainerState.EXITED and before in (ContainerState.STARTING, ContainerState.RUNNING):
        return [EventType.STOPPED]
    if after is None and before is not ContainerState.CREATING:
        return [EventType.DELETED]
    return []
