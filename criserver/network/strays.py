"""Plugins that an earlier daemon started and that still run: a killed daemon does not take them along."""

from __future__ import annotations

import asyncio
import os
import signal

import structlog

log = structlog.get_logger(__name__)

# Seconds. Plugins take milliseconds; one that takes longer than this at a daemon's start is stuck.
_PATIENCE = 5.0
_INTERVAL = 0.02


async def wait(sandbox_id: str) -> None:
    """Wait until no plugin works on the sandbox any more; one that does not end in time is killed.

    A DEL before an ADD has ended would leave behind what the ADD does after it.
    """
    deadline = asyncio.get_running_loop().time() + _PATIENCE
    while pids := _working_on(sandbox_id):
        if asyncio.get_running_loop().time() > deadline:
            log.warning("killing CNI plugins of an earlier daemon", sandbox=sandbox_id, pids=pids)
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        await asyncio.sleep(_INTERVAL)


def _working_on(sandbox_id: str) -> list[int]:
    """The processes that were started with this CNI_CONTAINERID, plugins and what they called."""
    wanted = f"CNI_CONTAINERID={sandbox_id}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/environ", "rb") as f:
                    environment = f.read()
            except OSError:
                continue  # it has ended
            if wanted in environment.split(b"\0"):
                found.append(int(name))
    return found
