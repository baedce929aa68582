"""For unit tests of records: a store in memory, and records that are led to their states."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import defaultdict
from typing import Any

from criserver.errors import ResourceExhaustedError
from criserver.model import (
    ContainerConfig,
    NamespaceMode,
    Namespaces,
    Resources,
    Security,
)
from criserver.runtime.lifecycle import (
    CONTAINER_STEPS,
    SANDBOX_STEPS,
    State,
)
from criserver.runtime.record_store import RecordStore, _row
from criserver.runtime.records import Record, Sandbox
from criserver.store import Change, Store


class FakeStore(Store):
    """What RecordStore needs of a store, in memory; ``full`` is a disk that takes no more."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.full = False

    def items(self, table: str) -> list[tuple[str, bytes]]:
        return sorted(self.tables[table].items())

    async def write(self, *changes: Change) -> None:
        self.write_now(*changes)
        await asyncio.sleep(0)  # as a thread lets other tasks run

    def submit(self, *changes: Change) -> asyncio.Future[None]:
        return asyncio.ensure_future(self.write(*changes))

    def write_now(self, *changes: Change) -> None:
        self._look()
        for table, key, value in changes:
            if value is None:
                self.tables[table].pop(key, None)
            else:
                self.tables[table][key] = value

    def _look(self) -> None:
        if self.full:
            raise ResourceExhaustedError("full")


def in_state(record: Any, state: State) -> Any:
    return dataclasses.replace(record, state=state)


def brought_to(records: RecordStore, record: Record) -> None:
    """Take a record in and lead it, by steps that are allowed, to the state that it has."""
    steps = SANDBOX_STEPS if isinstance(record, Sandbox) else CONTAINER_STEPS
    ways: dict[State | None, list[State]] = {None: []}
    while record.state not in ways:
        for step in steps:
            if step.old in ways and step.new is not None and step.new not in ways:
                ways[step.new] = [*ways[step.old], step.new]
    first, *others = ways[record.state]
    records._reserve(records._name(record), record.id)
    for state in (first, *others):
        records._check(record, state)
        records._replace(in_state(record, state))
    records._store.write_now(_row(record))


CONFIG = ContainerConfig(
    name="c",
    attempt=0,
    image="busybox",
    command=("run",),
    args=(),
    working_dir="",
    envs=(),
    mounts=(),
    devices=(),
    cdi_devices=(),
    labels={},
    annotations={},
    log_path="",
    stdin=False,
    stdin_once=False,
    tty=False,
    resources=Resources(),
    security=Security(),
    namespaces=Namespaces(pid=NamespaceMode.CONTAINER),
    stop_signal="",
)
