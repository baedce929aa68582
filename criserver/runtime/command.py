"""Runs a program of the node, with a time limit."""

from __future__ import annotations

import asyncio
import errno
import functools
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Awaitable, Sequence
from typing import Any, NamedTuple

import structlog

from criserver.errors import UnavailableError, exhaustion, os_words
from criserver.runtime import pidfd
from shims import tree
from snapshotter.program import Program, input_file

log = structlog.get_logger(__name__)

# In the environment of each program: the PID and the start of the daemon that runs it, as :func:`owner` tells them. By
# it the next daemon finds what a killed one has left.
OWNER = "CRISERVER_DAEMON"

_MAX_STDOUT, _MAX_STDERR = 16 << 20, 64 << 10  # bytes
# Seconds for a killed program to end. It takes longer only if the kernel is stuck.
_KILL = 1.0

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
    """The JSON object that a program prints. None if the program fails, or prints no object or an empty one.

    ``running`` is the program's run, as :func:`run` begins it.

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
    Raises TimeoutError, and OSError if the program cannot be started or prints more than 16 MiB.
    """
    path = argv[0] if "/" in argv[0] else shutil.which(argv[0])
    if path is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), argv[0])
    began = time.monotonic()
    with input_file(stdin) as file:
        program = Program(
            [path, *argv[1:]],
            env={OWNER: owner()} | {key: value for key, value in os.environ.items() if key != OWNER},
            stdin=file.fileno(),
            directory=cwd or ".",
            most=_MAX_STDOUT,
            most_errors=_MAX_STDERR,
        )
    try:
        done, _ = await asyncio.wait({program.ended}, timeout=timeout)
        if not done:
            raise TimeoutError
        if program.failure is not None:
            raise program.failure
        if len(program.stdout) > _MAX_STDOUT:
            raise OSError(errno.EFBIG, f"it printed more than {_MAX_STDOUT} bytes", path)
    finally:
        try:
            if program.is_running():
                await asyncio.to_thread(tree.end, program.pid, program.is_running)
        finally:
            await program.finish(_KILL)
    assert program.returncode is not None
    seconds = round(time.monotonic() - began, 3)
    log.debug("program done", program=shlex.join(argv), code=program.returncode, seconds=seconds)
    return Done(program.returncode, bytes(program.stdout), bytes(program.stderr))
