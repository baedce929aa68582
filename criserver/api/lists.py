"""Lists: entries are made one by one, and serialised entries are joined.

An entry that cannot be made is logged and left out: one bad record never fails the answer for all.

A repeated field is a concatenation on the wire (protobuf encoding, "Message structure"). So the answer to
ListContainers is the join of its serialised entries, the fragments. Records are frozen: a fragment stays valid while
the record is the same object.

A list may be larger than a message may be, as pods have large annotations and any number of labels. Then the largest
entries are replaced by short ones, which have what a kubelet looks for in lists (:mod:`criserver.api.views`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import structlog

log = structlog.get_logger(__name__)

# Seconds. Statistics of a container take a tenth of it.
_SLICE = 0.002
# The part of the largest message that a list does not use.
_MARGIN = 16
# IDs of pods and containers.
_MAX_TOLD = 10_000


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


async def make_in_slices(records: Iterable[Record], make: Callable[[Record], Entry]) -> AsyncIterator[Entry]:
    """As :func:`make_each`, in slices of time."""
    slices = Slices()
    for entry in make_each(records, make):
        yield entry
        await slices.end()


class ListLimit:
    """The most bytes that a list of pods or containers has. ``max_message`` is the most bytes of a message."""

    def __init__(self, max_message: int) -> None:
        self.size = max_message - max_message // _MARGIN
        self._told: set[str] = set()

    def shorten(self, ids: Sequence[str], sizes: Sequence[int], shorter: Callable[[int], int]) -> None:
        """Have the largest entries replaced by short ones, until the list is small enough.

        ``ids`` and ``sizes`` are the IDs and the bytes of the entries. ``shorter`` replaces the entry at a place, and
        returns its new size. Each ID is logged once.
        """
        total, told = sum(sizes), []
        for place in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
            if total <= self.size:
                break
            spared = sizes[place] - shorter(place)
            total -= spared
            if spared and ids[place] not in self._told:
                told.append(ids[place])
        if told:
            if len(self._told) > _MAX_TOLD:
                self._told.clear()
            self._told.update(told)
            log.warning(
                "large annotations and labels are left out of lists, which would be too large for a message",
                entries=len(told),
                first=told[0],
                limit=self.size,
            )


class Fragments(Generic[Record]):
    """Serialised entries of one kind of list. ``make`` returns a list answer with one entry.

    ``make_shorter`` returns one with a short entry, for a list that would be larger than ``limit``.
    """

    def __init__(
        self,
        make: Callable[[Record], bytes],
        make_shorter: Callable[[Record], bytes] | None = None,
        limit: ListLimit | None = None,
    ) -> None:
        self._make = make
        self._make_shorter = make_shorter
        self._limit = limit
        self._kept: dict[str, tuple[Record, bytes]] = {}

    def join(self, records: Sequence[Record], total: int) -> bytes:
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
        if self._limit is not None and self._make_shorter is not None and sum(map(len, parts)) > self._limit.size:
            self._shorten(records, parts, self._make_shorter, self._limit)
        return b"".join(parts)

    def _shorten(
        self, records: Sequence[Record], parts: list[bytes], make: Callable[[Record], bytes], limit: ListLimit
    ) -> None:
        def shorter(place: int) -> int:
            parts[place] = next(make_each((records[place],), make), b"")
            return len(parts[place])

        limit.shorten([record.id for record in records], [len(part) for part in parts], shorter)
