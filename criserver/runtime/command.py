"""One run of a program of the node, in bounded time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from shims import tree


class Done(NamedTuple):
    """How a program ended, and what it printed."""

    code: int
    stdout: bytes
    stderr: bytes

    @property
    def words(self) -> str:
        """Its error output, for a person."""
        return self.stderr.decode(errors="replace").strip()


async def run(argv: Sequence[str], timeout: float, *, stdin: bytes = b"") -> Done:
    """Run a program to its end; ``timeout`` in seconds.

    At the end of its time and with its caller it is killed, with all that it has started. Raises TimeoutError, OSError
    where it cannot be started.
    """
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(timeout):
            stdout, stderr = await process.communicate(stdin or None)
    finally:
        if process.returncode is None:
            tree.end(process.pid)  # asyncio reaps it, also where the kernel does not let go of it now
    assert process.returncode is not None
    return Done(process.returncode, stdout, stderr)
