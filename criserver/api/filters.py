"""What lists have in common: label selectors, and the pieces of a streamed one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

# Entries in one message of a streamed list: none comes near the size that gRPC allows for a message.
BATCH = 100

_Listed = TypeVar("_Listed")


def selected(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether ``labels`` have all that ``selector`` names."""
    return all(labels.get(key) == value for key, value in selector.items())


def batches(records: Sequence[_Listed]) -> Iterator[Sequence[_Listed]]:
    """The pieces of a list for a streamed answer."""
    for start in range(0, len(records), BATCH):
        yield records[start : start + BATCH]
