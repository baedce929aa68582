"""Lists: entries that are made one by one, and joins of bytes already serialised.

An entry that cannot be made is left out and told to the log: one bad record never fails the answer for all.

A repeated field is a concatenation on the wire (protobuf encoding, "Message structure"), so the answer to
ListContainers is its entries' fragments one after the other. Records are frozen: a fragment is good for as
long as the record is the same object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

import structlog

log = structlog.get_logger(__name__)


class _Identified(Protocol):
    @property
    def id(self) -> str: ...


Record = TypeVar("Record", bound=_Identified)
Entry = TypeVar("Entry")


def made(records: Iterable[Record], make: Callable[[Record], Entry]) -> Iterator[Entry]:
    """The entry that ``make`` gives for each record, without those that it raises for."""
    for record in records:
        try:
            entry = make(record)
        except Exception:
            log.exception("left out of a list: its entry cannot be made", id=record.id)
        else:
            yield entry


class Fragments(Generic[Record]):
    """Serialised entries of one kind of list; ``make`` gives a list answer with one entry in it."""

    def __init__(self, make: Callable[[Record], bytes]) -> None:
        self._make = make
        self._kept: dict[str, tuple[Record, bytes]] = {}

    def join(self, records: Iterable[Record], total: int) -> bytes:
        """The answer that lists ``records``; ``total`` is how many there are on the node."""
        if len(self._kept) > 2 * total + 64:
            self._kept.clear()  # mostly fragments of what has been removed
        kept, parts = self._kept, []
        for record in records:
            entry = kept.get(record.id)
            if entry is None or entry[0] is not record:
                # Nothing where it cannot be made; that is kept, too, and told once.
                entry = kept[record.id] = (record, next(made((record,), self._make), b""))
            parts.append(entry[1])
        return b"".join(parts)
