"""Programs that work on a sandbox or container and outlive who started them: a killed daemon does not take them along.

They are found by a variable of their environment that names what they work on, as is what they start in turn.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time

import structlog

log = structlog.get_logger(__name__)

# Seconds. Plugins take milliseconds; one that takes longer than this at a daemon's start is stuck.
_PATIENCE = 5.0
_INTERVAL = 0.02
# What the kernel may take to end a killed process.
_END = 10.0


async def wait(variable: str, value: str) -> None:
    """Wait until nothing with ``variable=value`` works any more; what does not end in time is killed.

    Undoing before that would leave behind what they do afterwards.
    """
    deadline = time.monotonic() + _PATIENCE
    while _working(variable, value) and time.monotonic() < deadline:
        await asyncio.sleep(_INTERVAL)
    await asyncio.to_thread(kill, variable, value)


def kill(variable: str, value: str) -> None:
    """Kill all that has ``variable=value``, and return when it has ended; blocks."""
    deadline = time.monotonic() + _END
    killed: set[int] = set()
    while pids := _working(variable, value):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        killed.update(pids)
        if time.monotonic() > deadline:
            log.error("killed processes do not end", pids=pids, **{variable: value})
            return
        time.sleep(_INTERVAL)
    if killed:
        log.warning("killed what was still at work", pids=sorted(killed), **{variable: value})


def _working(variable: str, value: str) -> list[int]:
    """The processes that were started with this variable; one that has ended has no environment.

    Raises OSError where they cannot be looked at: that is not to be taken for their end.
    """
    wanted = f"{variable}={value}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/environ", "rb") as f:
                    environment = f.read()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it has ended, or is none of ours
            if wanted in environment.split(b"\0"):
                found.append(int(name))
    return found
