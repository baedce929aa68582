"""Lists: entries are made one by one, and serialised entries are joined.

An entry that cannot be made is logged and left out: one bad record never fails the answer for all.

A repeated field is a concatenation on the wire (protobuf encoding, "Message structure"). So the answer to
ListContainers is the join of its serialised entries, the fragments. Records are frozen: a fragment stays valid while
the record is the same object.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

import structlog

log = structlog.get_logger(__name__)

# Seconds. Statistics of a container take a tenth of it.
_SLICE = 0.002


class _Identified(Protocol):
    @property
    def id(self) -> str: ...


Record = TypeVar("Record", bound=_Identified)
Entry = TypeVar("Entry")


def make_each(records: Iterable[Record], make: Callable[[Record], Entry]) -> Iterator[Entry]:
    """The entry of ``make`` for each record. A record for which it raises is logged and left out."""
    for record in records:
        try:
            entry = make(record)
        except Exception:
            log.exception("a record is left out of a list: its entry cannot be made", id=record.id)
        else:
            yield entry


class Slices:
    """A long answer in slices of time: other tasks of the event loop run after each slice.

    A turn of the loop after every entry would cost more than some entries do.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()

    async def end(self) -> None:
        """Call this after each entry."""
        if self._clock() - self._began >= _SLICE:
            await asyncio.sleep(0)
            self._began = self._clock()


class Fragments(Generic[Record]):
    """Serialised entries of one kind of list. ``make`` returns a list answer with one entry."""

    def __init__(self, make: Callable[[Record], bytes]) -> None:
        self._make = make
        self._kept: dict[str, tuple[Record, bytes]] = {}

    def join(self, records: Iterable[Record], total: int) -> bytes:
        """The answer that lists ``records``. ``total`` is the number of all records on the node."""
        if len(self._kept) > 2 * total + 64:
            self._kept.clear()  # most are fragments of removed records
        kept, parts = self._kept, []
        for record in records:
            entry = kept.get(record.id)
            if entry is None or entry[0] is not record:
                # b"" where it cannot be made. That is kept too, so it is logged once.
                entry = kept[record.id] = (record, next(make_each((record,), self._make), b""))
            parts.append(entry[1])
        return b"".join(parts)
