"""ExecSync: a command in a running container, its output and its exit code."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass

from criserver.errors import DeadlineExceededError, InvalidArgumentError
from criserver.runtime.exec_process import exec_process, running_container
from criserver.runtime.node import Node

# A gRPC answer of the kubelet's limit holds 16 MiB in all; more output than this is read and dropped.
MAX_OUTPUT = (8 << 20) - 1024
# A process that ran away into the background keeps the pipes open; its output is not waited for longer than this.
DRAIN_TIMEOUT = 2.0
_PIPE_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What a command printed and how it ended (128 + the signal's number where one killed it)."""

    stdout: bytes
    stderr: bytes
    code: int


async def exec_sync(node: Node, given: str, command: Sequence[str], timeout: float) -> ExecResult:
    """Run a command to its end; ``timeout`` in seconds, 0 for none.

    Raises FailedPreconditionError where the container does not run or the command does not exist in it,
    DeadlineExceededError at the timeout, when the command's process group has been killed.
    """
    if timeout < 0:
        raise InvalidArgumentError(f"timeout = {timeout:g} is negative; 0 means none")
    container = running_container(node, given)
    out, err = _Output(), _Output()
    try:
        with open("/dev/null", "rb") as null:
            stdio = [null.fileno(), out.writer, err.writer]
            try:
                async with (
                    asyncio.timeout(timeout or None) as limit,
                    exec_process(node, container, command, stdio=stdio) as ended,
                ):
                    out.handed_over()
                    err.handed_over()
                    code = await ended
                    limit.reschedule(None)
                    await asyncio.wait([out.finished, err.finished], timeout=DRAIN_TIMEOUT)
            except TimeoutError:
                words = f"command {' '.join(command)!r} in container {container.id} timed out after {timeout:g} s"
                raise DeadlineExceededError(words) from None
        return ExecResult(bytes(out.data), bytes(err.data), code)
    finally:
        out.close()
        err.close()


class _Output:
    """A pipe whose reading end collects here and whose writing end goes to the command."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._loop = asyncio.get_running_loop()
        self.finished: asyncio.Future[None] = self._loop.create_future()
        self._reader, self.writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._reader, False)
        try:
            fcntl.fcntl(self._reader, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        except OSError:
            pass  # the user's pipe budget is used up: the default size works too
        self._loop.add_reader(self._reader, self._readable)

    def handed_over(self) -> None:
        """Close this side's copy of the writing end, so that the command's exit is the pipe's end."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def close(self) -> None:
        """Stop reading."""
        self.handed_over()
        if self._reader >= 0:
            self._loop.remove_reader(self._reader)
            os.close(self._reader)
            self._reader = -1
        if not self.finished.done():
            self.finished.cancel()

    def _readable(self) -> None:
        try:
            piece = os.read(self._reader, _PIPE_SIZE)
        except BlockingIOError:
            return
        if piece:
            self.data += piece[: MAX_OUTPUT - len(self.data)]
        elif not self.finished.done():
            self._loop.remove_reader(self._reader)
            self.finished.set_result(None)
