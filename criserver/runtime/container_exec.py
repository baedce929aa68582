"""ExecSync: a command in a running container, its output and its exit code.

The shim runs it, so that its end is seen; the output comes through pipes that the daemon made, so that no byte
of it passes through the shim.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from criserver.errors import CriError, DeadlineExceededError, FailedPreconditionError, InvalidArgumentError
from criserver.oci import spec
from criserver.runtime.node import Node
from criserver.runtime.records import Container, ContainerState
from criserver.runtime.shims import Link, Message, connect

log = structlog.get_logger(__name__)

# A gRPC answer of the kubelet's limit holds 16 MiB in all; more output than this is read and dropped.
MAX_OUTPUT = (8 << 20) - 1024
# A process that ran away into the background keeps the pipes open; its output is not waited for longer than this.
DRAIN_TIMEOUT = 2.0
_PIPE_SIZE = 1 << 20

_numbers = itertools.count(1)


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
    if not command:
        raise InvalidArgumentError("the command is empty; it must be given")
    if timeout < 0:
        raise InvalidArgumentError(f"timeout = {timeout:g} is negative; 0 means none")
    container = node.registry.container(given)
    if container.state is not ContainerState.RUNNING:
        raise FailedPreconditionError(f"container {container.id} is {container.state.value}, not running")
    exec_id = f"{os.getpid()}-{next(_numbers)}"
    path = os.path.join(node.container_dir(container.id), f"exec-{exec_id}.json")
    _write_process(node, container, command, path)
    try:
        return await _run(node, container, exec_id, path, timeout, command)
    finally:
        os.unlink(path)


def _write_process(node: Node, container: Container, command: Sequence[str], path: str) -> None:
    with open(os.path.join(node.container_dir(container.id), "config.json")) as f:
        document = json.load(f)
    with open(path, "w") as f:
        json.dump(spec.exec_process(document, command, tty=False), f)


async def _run(
    node: Node, container: Container, exec_id: str, path: str, timeout: float, command: Sequence[str]
) -> ExecResult:
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def on_event(message: Message) -> None:
        if message.get("exec") != exec_id or ended.done():
            return
        if message.get("event") == "exec-exited":
            ended.set_result(message["code"])
        elif message.get("event") == "exec-failed":
            ended.set_exception(FailedPreconditionError(f"{command[0]!r} cannot be run: {message['error']}"))

    def on_close() -> None:
        if not ended.done():
            ended.set_exception(CriError(f"the shim of container {container.id} ended during the exec"))

    try:
        # A connection of its own: when it closes, whatever way this call ends, the shim kills the command.
        link = connect(os.path.join(node.container_dir(container.id), "shim.sock"), on_event, on_close)
    except OSError as e:
        raise CriError(f"the shim of container {container.id} cannot be reached: {e.strerror}") from e
    out, err = _Output(), _Output()
    try:
        await _ask(link, exec_id, path, out, err)
        try:
            async with asyncio.timeout(timeout or None):
                code = await ended
        except TimeoutError:
            raise DeadlineExceededError(f"command {' '.join(command)!r} timed out after {timeout:g} s") from None
        await asyncio.wait([out.finished, err.finished], timeout=DRAIN_TIMEOUT)
        return ExecResult(bytes(out.data), bytes(err.data), code)
    finally:
        if ended.done() and not ended.cancelled():
            ended.exception()  # taken, so that asyncio does not complain of one nobody waits for
        link.close()
        out.close()
        err.close()


async def _ask(link: Link, exec_id: str, path: str, out: _Output, err: _Output) -> None:
    with open("/dev/null", "rb") as null:
        try:
            await link.request(
                {"op": "exec", "exec_id": exec_id, "spec": path, "tty": False, "owned": True},
                [null.fileno(), out.writer, err.writer],
            )
        finally:
            out.handed_over()
            err.handed_over()


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
