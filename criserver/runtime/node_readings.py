"""What a scrape of the metrics reads from the node. Each reading takes values that are in memory already."""

from __future__ import annotations

import asyncio
import platform
import threading
from collections import Counter
from collections.abc import Iterable

from criserver import __version__
from criserver.runtime.lifecycle import ContainerState, SandboxState, State
from criserver.runtime.node import Node
from criserver.telemetry import families
from criserver.telemetry.instruments import Labels


def read_from(node: Node) -> None:
    """Let the table's readings come from this node."""
    records, images = node.records, node.images
    families.BUILD_INFO.read(lambda: {(__version__, platform.python_version()): 1})
    families.SANDBOXES.read(lambda: _by_state(SandboxState, (s.state for s in records.sandboxes.values())))
    families.CONTAINERS.read(lambda: _by_state(ContainerState, (c.state for c in records.containers.values())))
    families.SHIMS.read(lambda: {(): sum(process.shim.connected for process in node.processes.values())})
    families.SHIMS_LOST.read(lambda: {(): sum(process.has_lost_shim for process in node.processes.values())})
    families.STREAMS.read(lambda: {(): node.streaming.clients})
    families.IMAGES.read(lambda: {(): len(images.list())})
    families.IMAGE_BYTES.read(lambda: {(): images.fs_usage().bytes})
    families.WRITABLE_BYTES.read(lambda: {(): node.stats.disk.total().bytes})
    families.TASKS.read(lambda: {(): len(asyncio.all_tasks())})
    families.THREADS.read(lambda: {(): threading.active_count()})


def _by_state(states: Iterable[State], records: Iterable[State]) -> dict[Labels, float]:
    """The number of records in each state, also 0."""
    numbers = Counter(records)
    return {(state.value.replace("-", "_"),): numbers[state] for state in states}
