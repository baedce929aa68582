"""Runs a program of the node, with a time limit."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import shlex
import time
from collections.abc import Awaitable, Sequence
from typing import Any, NamedTuple

import structlog

from criserver.errors import UnavailableError, exhaustion, os_words
from criserver.runtime import pidfd
from shims import tree

log = structlog.get_logger(__name__)

# In the environment of each program: the PID and the start of the daemon that runs it, as :func:`owner` tells them. By
# it the next daemon finds what a killed one has left.
OWNER = "CRISERVER_DAEMON"

# A line of logrus, the logging library of runc: time="2026-11-27T04:33:44Z" level=error msg="container does not exist"
_LOG_LINE = re.compile(r'time="[^"]*" level=\w+ msg=("(?:[^"\\]|\\.)*"|\S+)')


class Done(NamedTuple):
    """The exit code of a program, and its output."""

    code: int
    stdout: bytes
    stderr: bytes

    @property
    def message(self) -> str:
        """Its standard error, as text for people: of a line of runc's log only the message."""
        lines = self.stderr.decode(errors="replace").strip().splitlines()
        return "\n".join(_without_log_fields(line) for line in lines)


def _without_log_fields(line: str) -> str:
    match = _LOG_LINE.fullmatch(line)
    if match is None:
        return line
    try:
        return str(json.loads(match[1]))
    except ValueError:  # Go has escapes that JSON has not
        return match[1].strip('"')


@functools.cache
def owner() -> str:
    """Which process this is: its PID, and its start in clock ticks since boot."""
    return f"{os.getpid()}.{pidfd.start_ticks(os.getpid())}"


async def report(running: Awaitable[Done], name: str) -> dict[str, Any] | None:
    """The JSON object that a program prints which is ``running``; None if it fails, or prints none or an empty one.

    Raises UnavailableError, with the ``name`` of the program, if it may answer later: it hangs, was killed, or cannot
    be started now.
    """
    try:
        done = await running
    except TimeoutError as e:
        raise UnavailableError(f"{name} does not end in time") from e
    except OSError as e:
        if reason := exhaustion(e):
            raise UnavailableError(f"{name} cannot be started: {reason}") from e
        log.warning("a program cannot be started", program=name, error=os_words(e))
        return None
    if done.code < 0:
        raise UnavailableError(f"{name} was ended by signal {-done.code}")
    try:
        told = json.loads(done.stdout) if done.code == 0 else None
    except ValueError:
        return None
    return told if isinstance(told, dict) and told else None


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
