"""One run of one CNI plugin: configuration in, output back, in bounded time and memory."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass

from criserver.errors import CriError, DeadlineExceededError, FailedPreconditionError, UnavailableError
from criserver.network.result import decode, excerpt

_MAX_STDOUT = 1 << 20
_MAX_STDERR = 4096
# Seconds that output may follow a plugin's exit; longer only if it left a process behind that holds its pipes.
_DRAIN = 1.0
# Seconds that a plugin gets to finish when its caller is cancelled. One killed in the middle of a write may leave
# what its own DEL does not find: host-local does not know whose a lease file is that it did not get to fill.
_GRACE = 2.0
# Seconds that a killed plugin may take to be gone; longer only if the kernel itself does not let go of it.
_KILL = 5.0


@dataclass(frozen=True, slots=True)
class Reply:
    """How a plugin ended, its output, and the last 4 KiB of its standard error."""

    returncode: int
    stdout: bytes
    stderr: bytes


async def run(path: str, *, what: str, env: Mapping[str, str], request: bytes, timeout: float) -> Reply:
    """Run the plugin at ``path`` with ``request`` on its standard input; ``timeout`` is in seconds.

    ``what`` names the run in messages. Raises DeadlineExceededError, FailedPreconditionError or
    UnavailableError where it cannot be started, CriError for more than 1 MiB of output. When it raises, the
    plugin and its process group are dead; when cancelled, the plugin has ended by itself or, after a short
    grace, been killed too.
    """
    loop = asyncio.get_running_loop()
    # Not asyncio's own pipe, which is a socket: a script that opens /dev/stdin could not read it.
    with os.fdopen(os.memfd_create("cni-request"), "w+b") as stdin:
        stdin.write(request)
        stdin.seek(0)
        start = asyncio.ensure_future(
            loop.subprocess_exec(lambda: _Plugin(loop), path, stdin=stdin, env=env, cwd="/", start_new_session=True)
        )
        # A start that is cancelled half-way waits for ever for the end of its process (asyncio of Python 3.11).
        cancelled: asyncio.CancelledError | None = None
        while not start.done():
            try:
                await asyncio.wait({start})
            except asyncio.CancelledError as e:
                cancelled = e
        try:
            transport, plugin = start.result()
        except OSError as e:
            raise _start_error(what, path, e) from e
    try:
        try:
            if cancelled is not None:
                raise cancelled
            done, _ = await asyncio.wait({plugin.ended}, timeout=timeout)
        except asyncio.CancelledError:
            await asyncio.wait({plugin.ended}, timeout=_GRACE)
            raise
        if not done:
            raise DeadlineExceededError(f"{what} did not end within {timeout:g} s and was killed")
        if len(plugin.stdout) > _MAX_STDOUT:
            raise CriError(f"{what} printed more than {_MAX_STDOUT} bytes and was killed")
        returncode = transport.get_returncode()
        assert returncode is not None
        return Reply(returncode, bytes(plugin.stdout), bytes(plugin.stderr))
    finally:
        try:
            if transport.get_returncode() is None:
                _kill_group(transport.get_pid())
                await asyncio.wait({plugin.exited}, timeout=_KILL)
        finally:
            transport.close()


def failure(reply: Reply) -> tuple[int, str]:
    """The error code (0 for none) and the message of a plugin that failed (specification, section 5, "Error")."""
    if reply.returncode < 0:
        return 0, f"killed by signal {-reply.returncode}{_aside(reply.stderr)}"
    if not reply.stdout.strip():
        return 0, f"exit status {reply.returncode} without a message{_aside(reply.stderr)}"
    try:
        document = decode(reply.stdout)
    except CriError as e:
        return 0, f"exit status {reply.returncode}, and its error {e}"
    code = document.get("code")
    texts = [excerpt(str(document[key])) for key in ("msg", "details") if document.get(key)]
    return code if isinstance(code, int) else 0, f"{': '.join(texts) or 'no message'} (code {excerpt(str(code))})"


class _Plugin(asyncio.SubprocessProtocol):
    """Collects a plugin's output until it is done or has printed too much."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.stdout = bytearray()
        self.stderr = bytearray()
        self.exited: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 1:
            self.stdout += data
            if len(self.stdout) > _MAX_STDOUT:
                self._end()
        else:
            self.stderr += data
            del self.stderr[:-_MAX_STDERR]

    def process_exited(self) -> None:
        self.exited.set_result(None)
        self._loop.call_later(_DRAIN, self._end)

    def connection_lost(self, _exc: Exception | None) -> None:
        """The process has ended and both pipes are closed."""
        self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def _start_error(what: str, path: str, e: OSError) -> CriError:
    if e.errno in (errno.ETXTBSY, errno.EAGAIN, errno.ENOMEM):
        return UnavailableError(f"{what} cannot be started just now: {path}: {e.strerror}")
    return FailedPreconditionError(f"{what} cannot be started: {path}: {e.strerror}; install the plugin anew")


def _kill_group(pid: int) -> None:
    """Kill the plugin, which leads a group, and what it has started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _aside(stderr: bytes) -> str:
    return f"; its standard error ends: {excerpt(stderr)}" if stderr.strip() else ""
