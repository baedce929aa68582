"""The disk usage of writable layers, measured in the background: a statistics call never waits for it.

Each snapshot is measured when it is new, and then once a period while its container may write. A snapshot that takes
long is measured less often: no container can keep the node busy with counting its files.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import structlog

log = structlog.get_logger(__name__)

# Seconds from one measurement of a snapshot to the next.
PERIOD = 10.0
# The part of the time in which one snapshot may be measured.
_SHARE = 0.02
# After each measurement there is a pause: so many times its duration, at most a second.
_REST = 3
_MAX_REST = 1.0
# Seconds. A tree of ten million files takes less. After that the file system is stuck.
_DEADLINE = 300.0


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """Allocated bytes and inodes at ``timestamp`` (Unix nanoseconds)."""

    timestamp: int
    bytes: int
    inodes: int


class DiskMeter:
    """Measures snapshots in turn, one at a time, in the task that runs :meth:`run`."""

    def __init__(
        self,
        measure: Callable[[str], Awaitable[tuple[int, int]]],
        list_snapshots: Callable[[], Mapping[str, bool]],
        *,
        period: float = PERIOD,
    ) -> None:
        """``measure`` returns the bytes and inodes of a snapshot.

        ``list_snapshots`` returns all snapshots, each with whether it may change.
        """
        self._measure = measure
        self._list_snapshots = list_snapshots
        self._period = period
        self._latest: dict[str, DiskUsage] = {}
        # The time of the next measurement of each, on the monotonic clock; and those that never need another.
        self._due: dict[str, float] = {}
        self._settled: set[str] = set()
        self._unmeasured: set[str] = set()  # failures that are logged already
        self._nudged = asyncio.Event()

    def latest(self, key: str) -> DiskUsage | None:
        """The latest measurement of a snapshot; None before the first."""
        return self._latest.get(key)

    def total(self) -> DiskUsage:
        """The sum of the latest measurements of all snapshots, with the time of the oldest one."""
        snapshots = self._list_snapshots()
        usages = [usage for key, usage in self._latest.items() if key in snapshots]
        timestamp = min((usage.timestamp for usage in usages), default=time.time_ns())
        return DiskUsage(timestamp, sum(usage.bytes for usage in usages), sum(usage.inodes for usage in usages))

    def nudge(self) -> None:
        """Measure now, and not at the end of the period: there is a new snapshot."""
        self._nudged.set()

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            self._nudged.clear()
            rest = await self._round()
            try:
                async with asyncio.timeout(rest):
                    await self._nudged.wait()
            except TimeoutError:
                continue

    async def _round(self) -> float:
        """Measure the snapshots that are due, until ``nudge``. Returns the seconds until the next one is due."""
        snapshots = self._list_snapshots()
        for key in self._due.keys() - snapshots:
            self._due.pop(key)
            self._latest.pop(key, None)
            self._settled.discard(key)
            self._unmeasured.discard(key)
        self._settled = {key for key in self._settled if not snapshots[key]}
        waiting = [key for key in snapshots if key not in self._settled]
        for key in sorted(waiting, key=lambda key: self._due.get(key, 0.0)):
            if self._due.get(key, 0.0) > time.monotonic() or self._nudged.is_set():
                break
            await self._take(key, may_change=snapshots[key])
        next_due = min((self._due.get(key, 0.0) for key in waiting if key not in self._settled), default=float("inf"))
        return min(max(next_due - time.monotonic(), 0.0), self._period)

    async def _take(self, key: str, *, may_change: bool) -> None:
        begun = time.monotonic()
        # Set first, so that a failure is not tried again at once.
        self._due[key] = begun + self._period
        timestamp = time.time_ns()
        try:
            async with asyncio.timeout(_DEADLINE):
                size, inodes = await self._measure(key)
        except Exception as e:  # noqa: BLE001 - the other snapshots must be measured too
            # The snapshot may have been removed meanwhile.
            if key in self._list_snapshots() and key not in self._unmeasured:
                log.warning("a snapshot cannot be measured", snapshot=key, error=str(e))
                self._unmeasured.add(key)
        else:
            self._unmeasured.discard(key)
            self._latest[key] = DiskUsage(timestamp, size, inodes)
            if not may_change:
                self._settled.add(key)
        took = time.monotonic() - begun
        self._due[key] = begun + max(self._period, took / _SHARE)
        await asyncio.sleep(min(took * _REST, _MAX_REST))
