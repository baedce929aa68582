"""Finds and ends programs that work on a sandbox or container, and may still run after their daemon was killed.

They are found by a variable in their environment, whose value is for this sandbox or container alone. Their children
inherit the variable, so they are found too.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable

import structlog

from criserver.numbers import decimal
from criserver.runtime import command, pidfd

log = structlog.get_logger(__name__)

# Seconds. A plugin takes milliseconds. One that still runs this long after the start of the daemon is stuck.
_PATIENCE = 5.0
_INTERVAL = 0.02
# The same for programs that a killed daemon was running. They have no more work that is of use.
_ORPHANS_PATIENCE, _ORPHANS_INTERVAL = 1.0, 0.25
# Seconds that the kernel may need to end a killed process.
_END = 10.0
# Bytes. The programs have some hundred. Any process can show gigabytes of its memory as its environment (prctl(2),
# PR_SET_MM_MAP).
_MAX_ENVIRONMENT = 256 << 10
_MAX_PID = 1 << 22  # of the kernel


async def wait(variable: str, value: str) -> None:
    """Wait until all programs with ``variable=value`` have ended. Those that do not end in time are killed.

    Call this before the work of these programs is undone: otherwise they could do more of it afterwards.
    """
    is_meant = _has(variable, value)
    deadline = time.monotonic() + _PATIENCE
    while await asyncio.to_thread(_found, is_meant) and time.monotonic() < deadline:
        await asyncio.sleep(_INTERVAL)
    await asyncio.to_thread(kill, variable, value)


def kill(variable: str, value: str) -> None:
    """Kill all processes with ``variable=value`` and wait for their end. Blocks."""
    is_meant = _has(variable, value)
    deadline = time.monotonic() + _END
    killed: set[int] = set()
    while pids := _found(is_meant):
        killed.update(pid for pid in pids if _kill(pid, is_meant))
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
    while (pids := await asyncio.to_thread(_found, _is_orphan)) and time.monotonic() < deadline:
        await asyncio.sleep(_ORPHANS_INTERVAL)
    killed = [pid for pid in pids if _kill(pid, _is_orphan)]
    if killed:
        log.warning("killed programs that an earlier daemon was running", pids=killed)


def _has(variable: str, value: str) -> Callable[[bytes], bool]:
    """Whether an environment has this variable with this value."""
    assignment = f"\0{variable}={value}\0".encode()
    return lambda environment: assignment in environment


def _is_orphan(environment: bytes) -> bool:
    """Whether the environment is that of a program whose daemon has ended.

    A container can have the variable too, with any value.
    """
    _, _, rest = environment.partition(f"\0{command.OWNER}=".encode())
    pid, _, ticks = rest.partition(b"\0")[0].partition(b".")
    owner = decimal(pid, _MAX_PID)
    return owner is not None and ticks.isdigit() and str(pidfd.start_ticks(owner)).encode() != ticks


def _found(is_meant: Callable[[bytes], bool]) -> list[int]:
    """The processes that were started with an environment of which ``is_meant`` is true. Blocks."""
    return [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if is_meant(_environment(pid))]


def _kill(pid: int, is_meant: Callable[[bytes], bool]) -> bool:
    """Kill a process if it still is the one that was found: the PID may be another's by now."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if not is_meant(_environment(pid)):
            return False
        signal.pidfd_send_signal(process, signal.SIGKILL)
    except ProcessLookupError:
        return False
    finally:
        os.close(process)
    return True


def _environment(pid: int) -> bytes:
    """The environment that a process was started with, with a zero byte before each variable and at the end.

    It is empty for a process that has ended, or that the daemon did not start. Raises OSError if it cannot be read: the
    caller must not take this for the end of the process.
    """
    try:
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as f:
            return b"\0" + (f.read(_MAX_ENVIRONMENT) or b"") + b"\0"
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
