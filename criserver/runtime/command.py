"""Runs a program of the node, with a time limit."""

from __future__ import annotations

import asyncio
import functools
import os
import shlex
import time
from collections.abc import Sequence
from typing import NamedTuple

import structlog

from criserver.runtime import pidfd
from shims import tree

log = structlog.get_logger(__name__)

# In the environment of each program: the PID and the start of the daemon that runs it, as :func:`owner` tells them. By
# it the next daemon finds what a killed one has left.
OWNER = "CRISERVER_DAEMON"


class Done(NamedTuple):
    """The exit code of a program, and its output."""

    code: int
    stdout: bytes
    stderr: bytes

    @property
    def message(self) -> str:
        """Its standard error, as text for people."""
        return self.stderr.decode(errors="replace").strip()


@functools.cache
def owner() -> str:
    """Which process this is: its PID, and its start in clock ticks since boot."""
    return f"{os.getpid()}.{pidfd.start_ticks(os.getpid())}"


async def run(argv: Sequence[str], timeout: float, *, stdin: bytes = b"", cwd: str | None = None) -> Done:
    """Run a program until it ends; ``timeout`` in seconds. It starts in ``cwd``, else where the daemon is.

    The program and all processes that it has started are killed at the timeout, and when the caller is cancelled.
    Raises TimeoutError, and OSError if the program cannot be started.
    """
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *argv,
        cwd=cwd,
        stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, OWNER: owner()},
    )
    try:
        async with asyncio.timeout(timeout):
            stdout, stderr = await process.communicate(stdin or None)
    finally:
        if process.returncode is None:
            tree.end(process.pid)  # asyncio reaps it, also if the kernel ends it only later
    assert process.returncode is not None
    seconds = round(time.monotonic() - began, 3)
    log.debug("program done", program=shlex.join(argv), code=process.returncode, seconds=seconds)
    return Done(process.returncode, stdout, stderr)
