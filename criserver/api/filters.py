"""Label selectors of lists, and batches of streamed lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

# Entries in one message of a streamed list. Such a message is far below gRPC's limit.
BATCH = 100

_Listed = TypeVar("_Listed")


def has_labels(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether ``labels`` have all labels of ``selector``."""
    return all(labels.get(key) == value for key, value in selector.items())


def batches(records: Sequence[_Listed]) -> Iterator[Sequence[_Listed]]:
    """The batches of a list for a streamed answer."""
    for start in range(0, len(records), BATCH):
        yield records[start : start + BATCH]
