"""One run of a program: its start in a thread, its output, its end."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
from collections.abc import Mapping, Sequence
from typing import IO

from snapshotter import program_start

_PIECE = 64 << 10
# Seconds to read output after the program's end. It takes longer only if another process still has the pipes open.
_DRAIN = 1.0
# The first number for the copies of descriptors, which is larger than the numbers that a program gets.
_FIRST = 32


class Program:
    """A program that runs, or starts. Its output is collected until the program ends or has printed too much.

    Not asyncio's subprocess, for two reasons:

    1. It waits for ever for unconnected pipes when its task is cancelled during the start.
    2. It starts the program in the event loop. On a busy node this takes tens of milliseconds.

    Attributes:
        pid: -1 until it is started.
        stdout: its output, up to a piece more than ``most`` bytes. One that prints more is at its ``ended``.
        stderr: the last ``most_errors`` bytes of its error output.
        returncode: as in subprocess; None until it has ended.
        failure: why it could not be started.
        started: is done when the program runs, or could not be started.
        exited: is done when the program has ended, or could not be started.
        ended: is done when its output is complete too, or when it has printed too much.

    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int,
        directory: str = "/",
        passed: Sequence[int] = (),
        most: int,
        most_errors: int,
    ) -> None:
        """Start ``argv``, whose first word is a path. Raises OSError if the node lacks descriptors or threads.

        ``passed`` are the program's descriptors 3, 4, ... The caller may close them and ``stdin`` at once.
        """
        self._loop = asyncio.get_running_loop()
        self.pid = -1
        self.stdout = bytearray()
        self.stderr = bytearray()
        self.returncode: int | None = None
        self.failure: OSError | None = None
        self.started: asyncio.Future[None] = self._loop.create_future()
        self.exited: asyncio.Future[None] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._most, self._most_errors = most, most_errors
        self._pidfd = -1
        self._doomed = self._reaped = self._closed = False
        self._pipes: dict[IO[bytes], bytearray] = {}
        theirs: list[int] = []
        try:
            theirs.append(_copy(stdin))
            for kept in (self.stdout, self.stderr):
                reader, writer = os.pipe2(os.O_CLOEXEC)
                os.set_blocking(reader, False)
                self._pipes[os.fdopen(reader, "rb", 0)] = kept
                try:
                    theirs.append(_copy(writer))
                finally:
                    os.close(writer)
            theirs.extend(_copy(fd) for fd in passed)
            starting = self._loop.run_in_executor(None, program_start.start, argv, env, directory, theirs)
        except OSError:
            self._close_files(theirs)
            raise
        starting.add_done_callback(lambda done: self._started(done, theirs))

    def is_running(self) -> bool:
        """Whether ``pid`` is the program's: later the number may be of another process."""
        return self.pid != -1 and not self._reaped

    def kill_group(self) -> None:
        """Kill the program and all processes of its group, as soon as it is started."""
        self._doomed = True
        if self.is_running():
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    async def finish(self, seconds: float | None = None) -> None:
        """Kill the program if it has not ended, wait up to ``seconds`` for its end, and stop reading."""
        try:
            if not self.exited.done():
                self.kill_group()
                await asyncio.wait({self.exited}, timeout=seconds)
        finally:
            self.close()

    def close(self) -> None:
        """Stop reading. A program that has not ended yet is reaped when it ends."""
        self._closed = True
        self._close_pipes()
        if self.exited.done():
            self._close_pidfd()

    def _started(self, done: asyncio.Future[int], theirs: list[int]) -> None:
        """The program runs, or could not be started."""
        for fd in theirs:
            os.close(fd)
        try:
            self.pid = done.result()
            self._pidfd = os.pidfd_open(self.pid)
        except OSError as e:
            self.failure = e
            if self.pid != -1:
                self.kill_group()
                os.waitpid(self.pid, 0)
            self.started.set_result(None)
            self.exited.set_result(None)
            self._close_pipes()
            self._end()
            return
        if self._doomed:
            self.kill_group()
        self.started.set_result(None)
        self._loop.add_reader(self._pidfd, self._exit)
        for pipe in self._pipes:
            self._loop.add_reader(pipe, self._readable, pipe)

    def _exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        how = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if how is not None:
            self._exited(how)
            return
        # Another process traces it, as a debugger does, and is to see the end first (ptrace(2)).
        waiting = self._loop.run_in_executor(None, os.waitid, os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        waiting.add_done_callback(lambda done: self._exited(done.result()))

    def _exited(self, how: os.waitid_result | None) -> None:
        assert how is not None
        self.returncode = how.si_status if how.si_code == os.CLD_EXITED else -how.si_status
        # In a thread: the kernel forgets the files of /proc/PID then, which takes milliseconds if many were read.
        # Nobody waits for that.
        self._reaped = True
        self._loop.run_in_executor(None, os.waitpid, self.pid, 0)
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
        if len(self.stdout) > self._most:
            self._close_pipes()
            self._end()
            return
        del self.stderr[: -self._most_errors]
        if not data:
            self._loop.remove_reader(pipe)
            del self._pipes[pipe]
            pipe.close()
            if not self._pipes and self.exited.done():
                self._end()

    def _close_files(self, theirs: list[int]) -> None:
        for fd in theirs:
            os.close(fd)
        self._close_pipes()

    def _close_pipes(self) -> None:
        for pipe in self._pipes:
            self._loop.remove_reader(pipe)
            pipe.close()
        self._pipes.clear()

    def _close_pidfd(self) -> None:
        if self._pidfd != -1:
            os.close(self._pidfd)
            self._pidfd = -1

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def input_file(data: bytes) -> IO[bytes]:
    """A file in memory with a program's input, at its beginning. A pipe could block its writer. Raises OSError."""
    file = os.fdopen(os.memfd_create("program-input"), "w+b", 0)
    try:
        file.write(data)
        file.seek(0)
    except OSError:
        file.close()
        raise
    return file


def _copy(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST)
