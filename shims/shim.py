"""The shim of one container: starts it with the OCI runtime, logs its output, reaps it, tells how it ended.

A shim outlives the daemon. The container does not notice when the daemon ends or starts: the next daemon connects to
the socket in the state directory, and the greeting tells it how things are. `Shim.run` is the whole life, from top to
bottom; requests are served meanwhile.
"""

from __future__ import annotations

import os
import time

from .connections import Connections, bind
from .execs import Execs
from .exit_record import exit_code, save
from .lean import Socket, accept
from .log_writer import LogWriter
from .loop import Loop
from .oom_watch import OomWatch
from .output import Output
from .runtime import LateError, Runtime, start_ticks
from .shim_config import RequestError, reason, text, texts
from .wire import VERSION, receive_once

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .connections import Answer
    from .loop import ChildProgram
    from .messages import ExitRecord, FailedEvent, GoneEvent, OkReply, ShimGreeting, ShimMessage, StartedEvent
    from .shim_config import ShimConfig
    from .task_execs import TaskExecs
    from .wire import Channel, Message

_CONSOLE = "console.sock"
_PID_FILE = "init.pid"
_LOG = "runtime.log"

# Seconds.
_RUN_LIMIT = 100.0
_DELETE_LIMIT = 30.0
_DELETE_ATTEMPTS = 3
_QUIET_DRAIN = 0.2
_LAST_DRAIN = 2.0
_SAVE_PAUSE = 1.0

_OK: OkReply = {"ok": True}


class Shim:
    """One container's life."""

    def __init__(self, config: ShimConfig, first: Socket) -> None:
        """Takes over `first`, the connection of the daemon that asked for this shim."""
        self._config = config
        self._loop = Loop()
        self._connections = Connections(
            self._loop, self._greetings, self._answer, lambda channel: self._execs.kill(channel)
        )
        self._execs = self._make_execs()
        self._outputs: dict[str, Output] = {}
        self._input = -1
        self._pipes: list[int] = []
        self._call: ChildProgram | None = None
        self._failure: RequestError | None = None
        self._init = 0
        self._start_ticks = 0
        self._started_at = 0
        self._finished_at = 0
        self._status: int | None = None
        self._record: ExitRecord | None = None
        self._gone: GoneEvent | None = None
        self._deleted = False
        self._connections.connect(first)

    def run(self) -> None:
        """Start the container, wait for its end, and clean up after it."""
        listening = False
        try:
            self._log = LogWriter(self._config.log_path, self._config.max_line)
            self._connections.listen()
            listening = True
            self._start()
        except (OSError, RequestError) as error:
            failed: FailedEvent = {"event": "failed", "error": reason(error), "late": isinstance(error, LateError)}
            if isinstance(error, OSError) and error.errno:
                failed["errno"] = error.errno
            self._connections.tell(failed)
        else:
            if self._wait_for_end():
                self._finish()
        if listening:
            self._connections.unlisten()

    def _make_execs(self) -> Execs | TaskExecs:
        self._runtime = Runtime(self._config.runtime_command, self._config.id)
        return Execs(self._loop, self._runtime, self._config.directory, self._connections.send)

    # The start

    def _start(self) -> None:
        """Run the container. Raises RequestError or OSError, with nothing of the container left behind."""
        config = self._config
        console = bind(_CONSOLE) if config.tty else None
        stdio = [0, 1, 2] if console else self._make_pipes()
        # A name of the console's socket that is short enough for a socket address, and valid for the runtime too.
        name = f"/proc/{os.getpid()}/cwd/{_CONSOLE}" if console else None
        argv = self._runtime.run(config.bundle, self._path(_PID_FILE), self._path(_LOG), name)
        self._oom = OomWatch(self._loop, config.oom_files, config.pod_events)
        try:
            self._call = self._loop.spawn(argv, stdio, _RUN_LIMIT, lambda code: self._ran(code, console))
            for fd in stdio:
                if fd > 2:
                    os.close(fd)
            self._loop.until(lambda: self._init > 0 or self._failure is not None)
        finally:
            if console:
                console.close()
                os.unlink(_CONSOLE)
        if self._failure is not None:
            self._delete()
            raise self._failure

    def _make_pipes(self) -> list[int]:
        """Pipes for standard streams; returns the container's ends."""
        stdin = 0
        if self._config.stdin:
            stdin, self._input = os.pipe()
        stdout, stdout_end = os.pipe()
        stderr, stderr_end = os.pipe()
        self._pipes = [stdout, stderr]
        if self._config.owner:
            for fd in (stdin, stdout_end, stderr_end):
                if fd:
                    os.fchown(fd, *self._config.owner)
        return [stdin, stdout_end, stderr_end]

    def _ran(self, code: int, console: Socket | None) -> None:
        """The OCI runtime has ended: take over the container's init, which cannot have been reaped yet."""
        try:
            pid = self._runtime.started_pid("run", self._call, code, _PID_FILE, _LOG)
            self._start_ticks, self._started_at = start_ticks(pid), time.time_ns()
            self._loop.adopt(pid, self._init_ended)
            if console:
                master = _receive_console(console)
                self._input = os.dup(master)
                self._pipes = [master]
            for fd, name in zip(self._pipes, ("stdout", "stderr"), strict=False):
                self._outputs[name] = Output(self._loop, fd, name, self._log)
        except RequestError as error:
            self._failure = error
            return
        except (OSError, ValueError) as error:
            self._failure = RequestError(reason(error))
            return
        self._init = pid
        self._oom.start()
        started: StartedEvent = {
            "event": "started",
            "init": pid,
            "pid": pid,
            "start_ticks": self._start_ticks,
            "started_at": self._started_at,
        }
        self._connections.tell(started)

    def _init_ended(self, status: int) -> None:
        self._finished_at = time.time_ns()
        self._status = status

    # The end

    def _wait_for_end(self) -> bool:
        """Wait until the container has ended. False if nobody will know how; the daemon then looks for its process."""
        return self._loop.until(lambda: self._status is not None)

    def _finish(self) -> None:
        """After the container's end: save the exit record, complete the log, tell the daemon, clean up."""
        assert self._status is not None
        record: ExitRecord = {
            "code": exit_code(self._status),
            "start_ticks": self._start_ticks,
            "started_at": self._started_at,
            "finished_at": self._finished_at,
            "oom_killed": self._oom.killed(self._status != 0),  # its count is gone once it is deleted
        }
        # Before the log is complete: its disk may stand still, and the daemon then ends this shim.
        saved = save(record)
        if not self._drained(_QUIET_DRAIN):
            self._delete()  # processes left in the cgroup hold the pipes
            if not self._drained(_LAST_DRAIN):
                for output in self._outputs.values():
                    output.detach()
                self._drained(_QUIET_DRAIN)
                for output in self._outputs.values():
                    output.end()
        self._log.close()
        saved = saved or save(record)
        self._record = record
        self._connections.tell({"event": "exited", **record})
        error = self._delete()
        if not self._loop.until(self._execs.all_ended, _LAST_DRAIN):
            self._execs.kill()  # nobody else ends a runtime that hangs
        self._gone = {"event": "gone", "error": error} if error else {"event": "gone"}
        self._connections.tell(self._gone)
        # On a full disk the shim keeps the record, for the next daemon, until it can be saved. The removal of the
        # container may be what makes room: then the directory is gone, which ends this.
        while not saved:
            self._loop.rest(_SAVE_PAUSE)
            saved = save(record)

    def _drained(self, limit: float) -> bool:
        return self._loop.until(lambda: all(output.ended for output in self._outputs.values()), limit)

    def _delete(self) -> str:
        """Have the OCI runtime delete the container. Returns why that failed; empty if it did not."""
        attempts = 0
        codes: list[int] = []
        while not self._deleted and attempts < _DELETE_ATTEMPTS:
            self._loop.rest(0.1 * attempts)
            attempts += 1
            codes.clear()
            try:
                self._loop.spawn(self._runtime.delete(self._path(_LOG)), (0, 1, 2), _DELETE_LIMIT, codes.append)
            except OSError as error:
                return reason(error)
            self._loop.until(lambda: bool(codes))
            self._deleted = codes == [0]
        return "" if self._deleted else self._runtime.last_error(self._path(_LOG), codes[0])

    # Requests

    def _greetings(self) -> Sequence[ShimMessage]:
        return [self._greeting(), self._gone] if self._gone else [self._greeting()]

    def _greeting(self) -> ShimGreeting:
        if not self._init:
            return {"hello": "shim", "version": VERSION, "state": "starting"}
        if self._record is not None:
            return {"hello": "shim", "version": VERSION, "state": "exited", "init": self._init, **self._record}
        return {
            "hello": "shim",
            "version": VERSION,
            "state": "running",
            "init": self._init,
            "start_ticks": self._start_ticks,
            "started_at": self._started_at,
        }

    def _answer(self, channel: Channel, message: Message, fds: list[int]) -> Answer:
        """Carry out one request (`shims.messages`)."""
        name = text(message, "op")
        method = getattr(self, "_op_" + name.replace("-", "_"), None)
        if method is None:
            raise RequestError(f"unknown operation {name!r}: this shim has version {VERSION}")
        answer: Answer = method(channel, message, fds)
        return answer

    def _hung_up(self, channel: Channel) -> None:
        self._execs.kill(channel)

    def _op_status(self, _channel: Channel, _message: Message, _fds: list[int]) -> Answer:
        return _OK, ()

    def _op_reopen(self, _channel: Channel, _message: Message, _fds: list[int]) -> Answer:
        self._log.reopen()
        return _OK, ()

    def _op_exec(self, channel: Channel, message: Message, fds: list[int]) -> Answer:
        self._must_run()
        self._execs.start(channel, message, fds)
        return _OK, ()

    def _op_attach(self, _channel: Channel, message: Message, fds: list[int]) -> Answer:
        self._must_run()
        streams = texts(message, "streams")
        if len(streams) != len(fds) or not self._outputs.keys() >= set(streams):
            raise RequestError(f"attach takes one descriptor for each of {', '.join(self._outputs)}")
        for name in streams:
            self._outputs[name].attach(fds[0])
            del fds[0]
        return _OK, [self._input] if self._input >= 0 else []

    def _op_close_stdin(self, _channel: Channel, _message: Message, _fds: list[int]) -> Answer:
        """The container's standard input ends when no attached client has it open any more."""
        if self._input >= 0 and not self._config.tty:
            os.close(self._input)
            self._input = -1
        return _OK, ()

    def _must_run(self) -> None:
        if not self._init or self._status is not None:
            raise RequestError(f"container {self._config.id} is not running")

    def _path(self, name: str) -> str:
        """The absolute path of a file of the state directory, for the OCI runtime."""
        return f"{self._config.directory}/{name}"


def _receive_console(listener: Socket) -> int:
    """The master side of the container's terminal, which the runtime sent before it ended."""
    connection = accept(listener)
    try:
        _, fds = receive_once(connection)
    finally:
        connection.close()
    if not fds:
        raise RequestError("the runtime sent no terminal to the console socket")
    return fds[0]
