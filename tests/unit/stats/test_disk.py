"""When the disk meter measures which writable layer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator

from structlog.testing import capture_logs

from criserver.stats import DiskMeter
from tests.support.waiting import until

PERIOD = 0.05


class Trees:
    """Snapshots as the meter sees them: sizes, whether they may change, how long each takes, until when it waits."""

    def __init__(self) -> None:
        self.wanted: dict[str, bool] = {}
        self.sizes: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.measured: Counter[str] = Counter()

    async def measure(self, key: str) -> tuple[int, int]:
        self.measured[key] += 1
        await asyncio.sleep(self.seconds.get(key, 0))
        if key in self.gates:
            await self.gates[key].wait()
        return self.sizes[key], 1


@contextlib.asynccontextmanager
async def running(trees: Trees, period: float = PERIOD) -> AsyncIterator[DiskMeter]:
    meter = DiskMeter(trees.measure, lambda: trees.wanted, period=period)
    task = asyncio.create_task(meter.run())
    try:
        yield meter
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_snapshot_is_measured_again_each_period() -> None:
    trees = Trees()
    trees.wanted, trees.sizes = {"a": True}, {"a": 1}
    async with running(trees) as meter:
        assert meter.latest("a") is None
        await until(lambda: (found := meter.latest("a")) is not None and found.bytes == 1)
        trees.sizes["a"] = 2
        await until(lambda: (found := meter.latest("a")) is not None and found.bytes == 2)


async def test_a_nudge_measures_a_new_one_before_the_period_ends() -> None:
    trees = Trees()
    async with running(trees, period=1000) as meter:
        await asyncio.sleep(0.02)  # the first period has begun
        trees.wanted, trees.sizes = {"a": True}, {"a": 1}
        meter.nudge()
        await until(lambda: meter.latest("a") is not None)
        await asyncio.sleep(0.02)  # a second measurement would show
        assert trees.measured == {"a": 1}


async def test_what_cannot_change_is_measured_once_more_and_then_no_longer() -> None:
    trees = Trees()
    trees.wanted, trees.sizes = {"a": True, "b": True}, {"a": 1, "b": 1}
    async with running(trees) as meter:
        await until(lambda: trees.measured["a"] >= 1)
        trees.sizes["a"] = 7
        trees.wanted["a"] = False
        await until(lambda: (found := meter.latest("a")) is not None and found.bytes == 7)
        count, others = trees.measured["a"], trees.measured["b"]
        await until(lambda: trees.measured["b"] >= others + 3)
        assert trees.measured["a"] == count


async def test_what_is_gone_is_forgotten() -> None:
    trees = Trees()
    trees.wanted, trees.sizes = {"a": True}, {"a": 1}
    async with running(trees) as meter:
        await until(lambda: meter.latest("a") is not None)
        trees.wanted = {}
        await until(lambda: meter.latest("a") is None)


async def test_a_failure_and_a_slow_one_do_not_keep_the_others_waiting() -> None:
    trees = Trees()
    trees.wanted, trees.sizes = {"bad": True, "slow": True, "good": True}, {"slow": 1, "good": 1}
    trees.seconds = {"slow": 0.1}
    begun = time.monotonic()
    async with running(trees) as meter:
        # One of them may take as long as the slow one where the machine is busy.
        await until(lambda: trees.measured["good"] >= 5 and trees.measured["bad"] >= 3)
        assert meter.latest("bad") is None
        # What takes a tenth of a second is due again after five.
        assert 1 <= trees.measured["slow"] <= 1 + (time.monotonic() - begun) / 4.9


async def test_the_total_is_of_those_that_there_are() -> None:
    trees = Trees()
    trees.wanted, trees.sizes = {"a": True, "b": False}, {"a": 1, "b": 2}
    async with running(trees, period=1000) as meter:
        assert (meter.total().bytes, meter.total().inodes) == (0, 0)
        assert meter.total().timestamp > 0
        await until(lambda: meter.total().bytes == 3)
        assert meter.total().inodes == 2
        oldest = min(usage.timestamp for key in "ab" if (usage := meter.latest(key)))
        assert meter.total().timestamp == oldest
        del trees.wanted["a"]
        assert (meter.total().bytes, meter.total().inodes) == (2, 1)


async def test_one_that_cannot_be_measured_is_told_of_once_and_not_where_it_has_gone() -> None:
    trees = Trees()
    trees.wanted, trees.sizes = {"bad": True, "good": True}, {"good": 1}
    with capture_logs() as logs:
        async with running(trees):
            await until(lambda: trees.measured["bad"] >= 3)
            trees.sizes["bad"] = 1
            await until(lambda: trees.measured["bad"] >= 4)
            trees.gates["going"], trees.wanted["going"] = asyncio.Event(), True
            await until(lambda: trees.measured["going"] == 1)
            del trees.wanted["going"]
            trees.gates["going"].set()
            count = trees.measured["good"]
            await until(lambda: trees.measured["good"] >= count + 2)
    assert [(line["log_level"], line["snapshot"]) for line in logs] == [("warning", "bad")]
