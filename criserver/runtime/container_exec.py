"""ExecSync: a command in a running container, its output and its exit code."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from criserver.errors import DeadlineExceededError, InvalidArgumentError
from criserver.runtime.exec_process import ExecProcess, exec_process, running_container
from criserver.runtime.node import Node
from criserver.runtime.output_room import Collected
from criserver.runtime.pipes import DRAIN_TIMEOUT, Pipe
from criserver.streaming import OutputCopier
from criserver.text import quoted

log = structlog.get_logger(__name__)

# Seconds a command with a shorter timeout may take to start: more than a busy node's, and a container that makes its
# OCI runtime hang (say, by a FIFO for its users) still holds up a kubelet's probes for no longer.
_START_LIMIT = 5.0


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What a command printed and how it ended (128 + the signal's number where one killed it)."""

    stdout: bytes | bytearray
    stderr: bytes | bytearray
    code: int


async def exec_sync(node: Node, id_or_prefix: str, command: Sequence[str], timeout: float) -> ExecResult:
    """Run a command to its end; ``timeout`` in seconds from when it runs, 0 for none.

    A busy node may take longer to start a command than a probe of it may: it has the timeout for this too, or 5 s.

    Raises FailedPreconditionError where the container does not run or the command does not exist in it,
    DeadlineExceededError at the timeout; the command's process group is killed then. Output beyond the room for
    it is dropped.
    """
    if timeout < 0:
        raise InvalidArgumentError(f"timeout = {timeout:g} is negative; 0 means none")
    container = running_container(node, id_or_prefix)
    with Pipe() as out, Pipe() as err, open(os.devnull, "rb") as null:
        stdio = [null.fileno(), out.writer, err.writer]
        sinks = (Collected(node.output), Collected(node.output))
        try:
            async with (
                asyncio.timeout(timeout or None) as limit,
                exec_process(node, container, command, stdio=stdio) as process,
            ):
                for pipe in (out, err):
                    pipe.close_writer()  # the command has the only writer then, and its exit closes the pipe
                reading = [
                    asyncio.create_task(OutputCopier(pipe.reader, sink).run())
                    for pipe, sink in zip((out, err), sinks, strict=True)
                ]
                try:
                    if timeout:
                        limit.reschedule(None)
                        await _until_started(container.id, command, process, max(timeout, _START_LIMIT))
                        limit.reschedule(asyncio.get_running_loop().time() + timeout)
                    code = await process.ended
                    limit.reschedule(None)
                    await asyncio.wait(reading, timeout=DRAIN_TIMEOUT)
                finally:
                    for task in reading:
                        task.cancel()
                    await asyncio.gather(*reading, return_exceptions=True)
        except TimeoutError:
            words = f"command {quoted(' '.join(command))} in container {container.id} timed out after {timeout:g} s"
            raise DeadlineExceededError(words) from None
        finally:
            for sink in sinks:
                sink.release()
    if any(sink.cut for sink in sinks):
        kept = [len(sink.data) for sink in sinks]
        log.info("output of a command was dropped: there was no room for it", container=container.id, kept=kept)
    # Not as bytes: a copy would need the memory a second time.
    return ExecResult(sinks[0].data, sinks[1].data, code)


async def _until_started(container_id: str, command: Sequence[str], process: ExecProcess, limit: float) -> None:
    either = (process.started, process.ended)
    done, _ = await asyncio.wait(either, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
    if not done:
        words = f"command {quoted(' '.join(command))} in container {container_id} did not start within {limit:g} s"
        raise DeadlineExceededError(words)
