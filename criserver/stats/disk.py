"""What writable layers occupy, measured in the background: a statistics call never waits for a tree to be walked.

Each snapshot is measured when it is new, then once a period for as long as its container may write. One that takes
long to measure is measured less often, so that no container can make the node walk its files all day.
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
# The share of the time that measuring one snapshot may take.
_SHARE = 0.02
# After each measurement there is a rest of so many times what it took, up to a second.
_REST = 3
_MAX_REST = 1.0
# A tree of ten million files; beyond it the file system does not answer.
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
        wanted: Callable[[], Mapping[str, bool]],
        *,
        period: float = PERIOD,
    ) -> None:
        """``measure`` gives a snapshot's bytes and inodes; ``wanted`` all snapshots, and whether each may change."""
        self._measure = measure
        self._wanted = wanted
        self._period = period
        self._latest: dict[str, DiskUsage] = {}
        # When each is to be measured next, on the monotonic clock, and those that never need it again.
        self._due: dict[str, float] = {}
        self._settled: set[str] = set()
        self._unmeasured: set[str] = set()  # that the log was told of
        self._nudged = asyncio.Event()

    def latest(self, key: str) -> DiskUsage | None:
        """The latest measurement of a snapshot; None before the first."""
        return self._latest.get(key)

    def total(self) -> DiskUsage:
        """What all snapshots that there are occupied when each was last measured, and when the oldest of these was."""
        wanted = self._wanted()
        found = [usage for key, usage in self._latest.items() if key in wanted]
        timestamp = min((usage.timestamp for usage in found), default=time.time_ns())
        return DiskUsage(timestamp, sum(usage.bytes for usage in found), sum(usage.inodes for usage in found))

    def nudge(self) -> None:
        """There is a new snapshot: measure it now and not at the end of the period."""
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
        """Measure what is due, or until nudged; how long nothing is due then, in seconds."""
        wanted = self._wanted()
        for key in self._due.keys() - wanted:
            self._due.pop(key)
            self._latest.pop(key, None)
            self._settled.discard(key)
            self._unmeasured.discard(key)
        self._settled = {key for key in self._settled if not wanted[key]}
        waiting = [key for key in wanted if key not in self._settled]
        for key in sorted(waiting, key=lambda key: self._due.get(key, 0.0)):
            if self._due.get(key, 0.0) > time.monotonic() or self._nudged.is_set():
                break
            await self._take(key, may_change=wanted[key])
        next_due = min((self._due.get(key, 0.0) for key in waiting if key not in self._settled), default=float("inf"))
        return min(max(next_due - time.monotonic(), 0.0), self._period)

    async def _take(self, key: str, *, may_change: bool) -> None:
        begun = time.monotonic()
        # Set first: one that fails is not tried again before its time.
        self._due[key] = begun + self._period
        timestamp = time.time_ns()
        try:
            async with asyncio.timeout(_DEADLINE):
                size, inodes = await self._measure(key)
        except Exception as e:  # noqa: BLE001 - the others are measured all the same
            # It may have gone while it was measured.
            if key in self._wanted() and key not in self._unmeasured:
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
