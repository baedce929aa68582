"""One run of one CNI plugin, in bounded time and memory: configuration to its input, results from its output."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

from criserver.errors import CriError, DeadlineExceededError, FailedPreconditionError, UnavailableError
from criserver.network import plugin_start
from criserver.network.cni_result import decode, excerpt

_MAX_STDOUT = 1 << 20
_MAX_STDERR = 4096
_PIECE = 64 << 10
# Seconds to read output after a plugin's exit. Output takes longer only if another process still has the pipes open.
_DRAIN = 1.0
# Seconds that a plugin gets to finish when its caller is cancelled. A plugin that is killed during a write may leave
# something that its DEL does not find: host-local cannot tell the owner of a lease file that is still empty.
_GRACE = 2.0
# Seconds for a killed plugin to end. It takes longer only if the kernel is stuck.
_KILL = 5.0


@dataclass(frozen=True, slots=True)
class PluginReply:
    """A plugin's exit status, its output, and the last 4 KiB of its standard error."""

    returncode: int
    stdout: bytes
    stderr: bytes


async def run(path: str, *, run_name: str, env: Mapping[str, str], request: bytes, timeout: float) -> PluginReply:
    """Run the plugin at ``path`` with ``request`` on its standard input; ``timeout`` is in seconds.

    ``run_name`` names the run in messages. Raises DeadlineExceededError, FailedPreconditionError or UnavailableError
    where the plugin cannot be started, and CriError for more than 1 MiB of output. When it raises, the plugin and its
    process group are dead. When it is cancelled, the plugin gets a short time to end, and is killed after that.
    """
    try:
        plugin = _Plugin(path, env, request)
    except OSError as e:
        raise _start_error(run_name, path, e) from e
    try:
        try:
            done, _ = await asyncio.wait({plugin.ended}, timeout=timeout)
        except asyncio.CancelledError:
            await asyncio.wait({plugin.ended}, timeout=_GRACE)
            raise
        if not done:
            raise DeadlineExceededError(f"{run_name} did not end within {timeout:g} s and was killed")
        if plugin.failure is not None:
            raise _start_error(run_name, path, plugin.failure) from plugin.failure
        if len(plugin.stdout) > _MAX_STDOUT:
            raise CriError(f"{run_name} printed more than {_MAX_STDOUT} bytes and was killed")
        assert plugin.returncode is not None
        return PluginReply(plugin.returncode, bytes(plugin.stdout), bytes(plugin.stderr))
    finally:
        try:
            if not plugin.exited.done():
                plugin.kill_group()
                await asyncio.wait({plugin.exited}, timeout=_KILL)
        finally:
            plugin.close()


def failure(reply: PluginReply) -> tuple[int, str]:
    """The error code (0 for none) and the message of a plugin that failed (specification, section 5, "Error")."""
    if reply.returncode < 0:
        return 0, f"killed by signal {-reply.returncode}{_stderr_note(reply.stderr)}"
    if not reply.stdout.strip():
        return 0, f"exit status {reply.returncode} without a message{_stderr_note(reply.stderr)}"
    try:
        document = decode(reply.stdout)
    except CriError as e:
        return 0, f"exit status {reply.returncode}, and its error {e}"
    code = document.get("code")
    texts = [excerpt(str(document[key])) for key in ("msg", "details") if document.get(key)]
    return code if isinstance(code, int) else 0, f"{': '.join(texts) or 'no message'} (code {excerpt(str(code))})"


class _Plugin:
    """A plugin that runs, or starts. Its output is collected until the plugin ends or has printed too much.

    Not asyncio's subprocess, for two reasons:

    1. It waits for ever for unconnected pipes when its task is cancelled during the start.
    2. It starts the plugin in the event loop. On a busy node this takes tens of milliseconds.
    """

    def __init__(self, path: str, env: Mapping[str, str], request: bytes) -> None:
        self._loop = asyncio.get_running_loop()
        self.stdout = bytearray()
        self.stderr = bytearray()
        self.returncode: int | None = None  # as in subprocess
        self.failure: OSError | None = None  # why it was not started
        self.exited: asyncio.Future[None] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._pid = self._pidfd = -1
        self._doomed = self._reaped = self._closed = False
        self._pipes: dict[IO[bytes], bytearray] = {}
        theirs: list[IO[bytes]] = []
        try:
            # The request is a file, because writing to a pipe could block.
            theirs.append(os.fdopen(os.memfd_create("cni-request"), "w+b", 0))
            theirs[0].write(request)
            theirs[0].seek(0)
            for kept in (self.stdout, self.stderr):
                reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
                self._pipes[os.fdopen(reader, "rb", 0)] = kept
                theirs.append(os.fdopen(writer, "wb", 0))
                os.set_blocking(writer, True)
            stdin, stdout, stderr = (file.fileno() for file in theirs)
            started = self._loop.run_in_executor(None, plugin_start.start, path, env, stdin, stdout, stderr)
        except OSError:
            self._close_files([*theirs, *self._pipes])
            raise
        started.add_done_callback(lambda done: self._started(done, theirs))

    def _started(self, done: asyncio.Future[int], theirs: list[IO[bytes]]) -> None:
        """The plugin runs, or could not be started."""
        self._close_files(theirs)
        try:
            self._pid = done.result()
            self._pidfd = os.pidfd_open(self._pid)
        except OSError as e:
            self.failure = e
            if self._pid != -1:
                self.kill_group()
                os.waitpid(self._pid, 0)
            self.exited.set_result(None)
            self._close_pipes()
            self._end()
            return
        if self._doomed:
            self.kill_group()
        self._loop.add_reader(self._pidfd, self._exit)
        for pipe in self._pipes:
            self._loop.add_reader(pipe, self._readable, pipe)

    def kill_group(self) -> None:
        """Kill the plugin and all processes of its group, as soon as it is started."""
        self._doomed = True
        if self._pid != -1 and not self._reaped:  # the number may be of another process then
            try:
                os.killpg(self._pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def close(self) -> None:
        """Stop reading. A plugin that has not ended yet is reaped when it ends."""
        self._closed = True
        self._close_pipes()
        if self.exited.done():
            self._close_pidfd()

    def _exit(self) -> None:
        # In a thread: the kernel forgets the files of /proc/PID then, which takes milliseconds if many were read.
        self._loop.remove_reader(self._pidfd)
        self._reaped = True
        reaping = self._loop.run_in_executor(None, os.waitpid, self._pid, 0)
        reaping.add_done_callback(lambda done: self._exited(done.result()[1]))

    def _exited(self, status: int) -> None:
        self.returncode = os.waitstatus_to_exitcode(status)
        self.exited.set_result(None)
        if self._closed:
            self._close_pidfd()
        elif self._pipes:
            self._loop.call_later(_DRAIN, self._end)
        else:
            self._end()

    def _readable(self, pipe: IO[bytes]) -> None:
        try:
            data = os.read(pipe.fileno(), _PIECE)
        except BlockingIOError:
            return
        kept = self._pipes[pipe]
        kept += data
        if len(self.stdout) > _MAX_STDOUT:
            self._close_pipes()
            self._end()
            return
        del self.stderr[:-_MAX_STDERR]
        if not data:
            self._loop.remove_reader(pipe)
            del self._pipes[pipe]
            pipe.close()
            if not self._pipes and self.exited.done():
                self._end()

    def _close_pipes(self) -> None:
        for pipe in self._pipes:
            self._loop.remove_reader(pipe)
        self._close_files(list(self._pipes))
        self._pipes.clear()

    def _close_pidfd(self) -> None:
        if self._pidfd != -1:
            os.close(self._pidfd)
            self._pidfd = -1

    @staticmethod
    def _close_files(files: list[IO[bytes]]) -> None:
        for file in files:
            file.close()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def _start_error(run_name: str, path: str, e: OSError) -> CriError:
    if e.errno in (errno.ETXTBSY, errno.EAGAIN, errno.ENOMEM):
        return UnavailableError(f"{run_name} cannot be started just now: {path}: {e.strerror}")
    return FailedPreconditionError(f"{run_name} cannot be started: {path}: {e.strerror}; install the plugin anew")


def _stderr_note(stderr: bytes) -> str:
    return f"; its standard error ends: {excerpt(stderr)}" if stderr.strip() else ""
