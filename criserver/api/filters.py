"""The filters of lists, and batches of streamed lists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.records import Container, Sandbox

# Entries in one message of a streamed list. Such a message is far below gRPC's limit.
BATCH = 100

_Listed = TypeVar("_Listed")


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


def batches(records: Sequence[_Listed]) -> Iterator[Sequence[_Listed]]:
    """The batches of a list for a streamed answer."""
    for start in range(0, len(records), BATCH):
        yield records[start : start + BATCH]
