"""The filters of lists, and batches of streamed lists."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from typing import TypeVar

from google.protobuf.message import Message

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.records import Container, Sandbox

# Entries, and bytes, in one message of a streamed list. Such a message is far below gRPC's limit. Only a message of one
# entry may have more bytes.
BATCH = 100
BATCH_SIZE = 1 << 20

_Entry = TypeVar("_Entry", bound=Message)


def select_containers(
    containers: Iterable[Container], selector: cri.ContainerFilter | cri.ContainerStatsFilter
) -> list[Container]:
    """The containers that match the selector's prefixes of IDs, and its labels."""
    prefix, sandbox_prefix, labels = selector.id, selector.pod_sandbox_id, dict(selector.label_selector)
    return [
        c
        for c in containers
        if c.id.startswith(prefix)
        and c.sandbox_id.startswith(sandbox_prefix)
        and (not labels or _has_labels(c.config.labels, labels))
    ]


def select_sandboxes(
    sandboxes: Iterable[Sandbox], selector: cri.PodSandboxFilter | cri.PodSandboxStatsFilter
) -> list[Sandbox]:
    """The sandboxes that match the selector's prefix of an ID, and its labels."""
    prefix, labels = selector.id, dict(selector.label_selector)
    return [s for s in sandboxes if s.id.startswith(prefix) and (not labels or _has_labels(s.config.labels, labels))]


def _has_labels(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.items())


async def batches(entries: AsyncIterator[_Entry]) -> AsyncIterator[list[_Entry]]:
    """The batches of a list for a streamed answer."""
    batch: list[_Entry] = []
    size = 0
    async for entry in entries:
        more = entry.ByteSize()
        if batch and (len(batch) == BATCH or size + more > BATCH_SIZE):
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += more
    if batch:
        yield batch
