"""A daemon whose event loop is watched: what blocks it for long is written down.

``python -m bench.watched LOG serve --config FILE`` runs ``criserver serve``. The loop leaves a time stamp every
5 ms. A thread looks at it. Where it is late, the thread takes the main thread's stack every few milliseconds. When the
loop goes on, LOG gets a line of JSON: how long it was late, the CPU time that the main thread took of that, the time
that it waited for a processor (schedstat, Documentation/scheduler/sched-stats.rst), and the stack that was seen most.
In the rest of the time the main thread waited for the kernel, or for another thread.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections import Counter
from types import FrameType
from typing import Any

from criserver.cli import main as criserver

# Seconds.
_BEAT = 0.005
_LATE = 0.03
_FRAMES = 14


class Watch(asyncio.DefaultEventLoopPolicy):
    """Makes event loops that are watched."""

    def __init__(self, log: str) -> None:
        super().__init__()
        self._log = open(log, "a")  # noqa: SIM115 - open until the process ends
        self._beaten = 0.0
        self._main = threading.main_thread().ident or 0

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        loop = super().new_event_loop()
        loop.call_soon(self._beat, loop)
        threading.Thread(target=self._look, args=(loop,), daemon=True, name="watch").start()
        return loop

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        self._beaten = time.monotonic()
        loop.call_later(_BEAT, self._beat, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        clock = time.pthread_getcpuclockid(self._main)
        stacks: Counter[tuple[str, ...]] = Counter()
        last, used, waited = self._beaten, time.clock_gettime(clock), _waited()
        while not loop.is_closed():
            time.sleep(_BEAT)
            beaten = self._beaten
            if beaten != last:
                if stacks:
                    self._tell(last, beaten - last, time.clock_gettime(clock) - used, _waited() - waited, stacks)
                    stacks = Counter()
                last, used, waited = beaten, time.clock_gettime(clock), _waited()
            elif beaten and time.monotonic() - beaten > _LATE:
                stacks[_stack(sys._current_frames().get(self._main))] += 1

    def _tell(self, began: float, late: float, used: float, waited: float, stacks: Counter[tuple[str, ...]]) -> None:
        ((stack, seen),) = stacks.most_common(1)
        line: dict[str, Any] = {
            "at": round(began, 3),
            "ms": round(late * 1000),
            "cpu_ms": round(used * 1000),
            "turn_ms": round(waited * 1000),
            "seen": f"{seen}/{sum(stacks.values())}",
            "stack": stack,
        }
        print(json.dumps(line), file=self._log, flush=True)


def _waited() -> float:
    """Seconds that the main thread has waited for a processor."""
    with open(f"/proc/self/task/{os.getpid()}/schedstat") as f:
        return int(f.read().split()[1]) / 1e9


def _stack(frame: FrameType | None) -> tuple[str, ...]:
    found: list[str] = []
    while frame is not None and len(found) < _FRAMES:
        code = frame.f_code
        found.append(f"{'/'.join(code.co_filename.rsplit('/', 2)[-2:])}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return tuple(found)


if __name__ == "__main__":
    asyncio.set_event_loop_policy(Watch(sys.argv[1]))
    sys.exit(criserver(sys.argv[2:]))
