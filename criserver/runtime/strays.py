"""Finds and ends programs that work on a sandbox or container, and may still run after their daemon was killed.

They are found by a variable in their environment, whose value is for this sandbox or container alone. Their children
inherit the variable, so they are found too.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress

import structlog

from criserver.runtime import command, pidfd

log = structlog.get_logger(__name__)

# Seconds. A plugin takes milliseconds. One that still runs this long after the start of the daemon is stuck.
_PATIENCE = 5.0
_INTERVAL = 0.02
# The same for programs that a killed daemon was running. They have no more work that is of use.
_ORPHANS_PATIENCE, _ORPHANS_INTERVAL = 1.0, 0.25
# Seconds that the kernel may need to end a killed process.
_END = 10.0


async def wait(variable: str, value: str) -> None:
    """Wait until all programs with ``variable=value`` have ended. Those that do not end in time are killed.

    Call this before the work of these programs is undone: otherwise they could do more of it afterwards.
    """
    deadline = time.monotonic() + _PATIENCE
    while _processes(variable, value) and time.monotonic() < deadline:
        await asyncio.sleep(_INTERVAL)
    await asyncio.to_thread(kill, variable, value)


def kill(variable: str, value: str) -> None:
    """Kill all processes with ``variable=value`` and wait for their end. Blocks."""
    deadline = time.monotonic() + _END
    killed: set[int] = set()
    while pids := _processes(variable, value):
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
        log.warning("killed programs that still worked on a pod or container", pids=sorted(killed), **{variable: value})


async def end_orphans() -> None:
    """End the programs that a daemon was running when it was killed: its :mod:`command`, such as a runtime's delete.

    Those that do not end in time are killed. Their work is done again by the recovery of their pod.
    """
    deadline = time.monotonic() + _ORPHANS_PATIENCE
    while (pids := await asyncio.to_thread(_orphans)) and time.monotonic() < deadline:
        await asyncio.sleep(_ORPHANS_INTERVAL)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if pids:
        log.warning("killed programs that an earlier daemon was running", pids=pids)


def _orphans() -> list[int]:
    prefix = f"{command.OWNER}=".encode()
    pids = []
    for pid, environment in _environments():
        owners = [line.removeprefix(prefix).decode(errors="replace") for line in environment if line.startswith(prefix)]
        if any(not _is_alive(owner) for owner in owners):
            pids.append(pid)
    return pids


def _is_alive(owner: str) -> bool:
    pid, _, ticks = owner.partition(".")
    return pid.isdecimal() and str(pidfd.start_ticks(int(pid))) == ticks


def _processes(variable: str, value: str) -> list[int]:
    """The processes that were started with this variable."""
    assignment = f"{variable}={value}".encode()
    return [pid for pid, environment in _environments() if assignment in environment]


def _environments() -> Iterator[tuple[int, list[bytes]]]:
    """Each process with the environment that it was started with. A process that has ended has none.

    Raises OSError if an environment cannot be read: the caller must not take this for the end of the process.
    """
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/environ", "rb") as f:
                    environment = f.read()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it has ended, or the daemon did not start it
            yield int(name), environment.split(b"\0")
