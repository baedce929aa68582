"""The shim of one container: starts it with the OCI runtime, logs its output, reaps it, tells how it ended.

What it holds outlives the daemon. The daemon's going and coming changes nothing for the container: a new
one connects to the socket in the state directory and is greeted with how things are. `Shim.run` is the
whole life, from top to bottom; requests are served meanwhile.
"""

from __future__ import annotations

import os
import select
import time

from .lean import AF_UNIX, SIGKILL, SOCK_STREAM, Socket, accept, dumps
from .logs import LogWriter
from .loop import Loop
from .output import Output
from .runtime import Runtime, last_error, oom_kills, read_small, start_ticks
from .wire import VERSION, Channel, ProtocolError, receive_once

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .loop import Call
    from .messages import (
        ExecExitedEvent,
        ExecFailedEvent,
        ExitRecord,
        FailedEvent,
        GoneEvent,
        OkReply,
        Reply,
        ShimEvent,
        ShimGreeting,
        StartedEvent,
    )
    from .wire import Message

    Answer = tuple[Reply, Sequence[int]]

SOCKET = "shim.sock"
EXIT_RECORD = "exit.json"

_CONSOLE = "console.sock"
_PID_FILE = "init.pid"
_LOG = "runtime.log"

_RUN_LIMIT = 100.0
_EXEC_LIMIT = 60.0
_DELETE_LIMIT = 30.0
_DELETE_ATTEMPTS = 3
_QUIET_DRAIN = 0.2
_LAST_DRAIN = 2.0
_SAVE_PAUSE = 1.0

_OK: OkReply = {"ok": True}


class RequestError(Exception):
    """A request, or the start itself, cannot be carried out; the text goes to the daemon."""


class LateError(RequestError):
    """The runtime did not come back in its time."""


class Config:
    """What a shim has to know, from the daemon's message. Raises RequestError for a key missing or wrong."""

    __slots__ = (
        "arguments",
        "bundle",
        "directory",
        "id",
        "log_path",
        "oom_files",
        "pod_events",
        "runtime",
        "runtime_root",
        "stdin",
        "tty",
    )

    def __init__(self, message: Message) -> None:
        self.id = _text(message, "id")
        self.bundle = _text(message, "bundle")
        self.directory = _text(message, "directory")
        self.runtime = _text(message, "runtime")
        self.runtime_root = _text(message, "runtime_root")
        self.arguments = _texts(message, "runtime_args")
        self.oom_files = _texts(message, "oom_files")
        self.pod_events = _text(message, "pod_events") if message.get("pod_events") else ""
        self.log_path = _text(message, "log_path") if message.get("log_path") else ""
        self.tty = bool(message.get("tty"))
        self.stdin = bool(message.get("stdin"))


class _Exec:
    """An exec: the OCI runtime's `call` starts the process, then `pid` is set. It ends with its connection."""

    __slots__ = ("_killed", "_pid", "call", "channel", "id")

    def __init__(self, exec_id: str, channel: Channel) -> None:
        self.id = exec_id
        self.channel = channel
        self.call: Call | None = None
        self._pid = 0
        self._killed = False

    def started(self, pid: int) -> None:
        self._pid = pid
        if self._killed:
            self.kill()

    def kill(self) -> None:
        """Kill the process with its group, since runc and crun make it the leader of a session of its own.

        Where it is not yet started, kill the runtime that starts it.
        """
        self._killed = True
        if self._pid:
            try:
                os.killpg(self._pid, SIGKILL)
            except ProcessLookupError:
                os.kill(self._pid, SIGKILL)  # this runtime gives it no session
        elif self.call is not None:
            self.call.end()


class Shim:
    """One container's life."""

    def __init__(self, config: Config, first: Socket) -> None:
        """Takes over `first`, the connection of the daemon that asked for this shim."""
        self._config = config
        self._loop = Loop()
        self._runtime = Runtime(config.runtime, config.runtime_root, config.arguments, config.id)
        self._channels: dict[int, Channel] = {}
        self._execs: dict[str, _Exec] = {}
        self._outputs: dict[str, Output] = {}
        self._input = -1
        self._pipes: list[int] = []
        self._call: Call | None = None
        self._failure: RequestError | None = None
        self._init = 0
        self._start_ticks = 0
        self._started_at = 0
        self._finished_at = 0
        self._status: int | None = None
        self._record: ExitRecord | None = None
        self._gone: GoneEvent | None = None
        self._deleted = False
        self._others = 0
        self._connect(first)

    def run(self) -> None:
        """Start the container, wait for its end, and clear up after it."""
        listener = None
        try:
            self._log = LogWriter(self._config.log_path)
            listener = self._listen()
            self._start()
        except (OSError, RequestError) as error:
            failed: FailedEvent = {"event": "failed", "error": str(error), "late": isinstance(error, LateError)}
            self._tell(failed)
        else:
            self._loop.until(lambda: self._status is not None)
            self._finish()
        if listener is not None and os.path.lexists(SOCKET):
            os.unlink(SOCKET)

    # The way up

    def _listen(self) -> Socket:
        """The socket for later daemons. Bound by a relative name: the directory's may be too long for one."""
        listener = _bind(SOCKET)
        self._loop.watch(listener.fileno(), select.EPOLLIN, lambda _: self._accept(listener))
        return listener

    def _start(self) -> None:
        """Run the container. Raises RequestError or OSError, with nothing of the container left behind."""
        config = self._config
        if os.path.lexists(f"{config.runtime_root}/{config.id}"):
            raise RequestError(f"container {config.id} exists in {config.runtime_root}: delete it there first")
        console = _bind(_CONSOLE) if config.tty else None
        stdio = [0, 1, 2] if console else self._make_pipes()
        # The console's socket by a name that is short enough, and means the same to the runtime.
        name = f"/proc/{os.getpid()}/cwd/{_CONSOLE}" if console else None
        argv = self._runtime.run(config.bundle, self._path(_PID_FILE), self._path(_LOG), name)
        if config.pod_events:
            self._others = max(0, oom_kills(config.pod_events))
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
        return [stdin, stdout_end, stderr_end]

    def _ran(self, code: int, console: Socket | None) -> None:
        """The runtime has ended: take over the container's init, which cannot have been reaped yet."""
        try:
            self._in_time(self._call, code, "run", _RUN_LIMIT)
            pid = self._started_pid(code, _PID_FILE, _LOG)
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
            self._failure = RequestError(str(error) or type(error).__name__)
            return
        self._init = pid
        self._watch_pod()
        started: StartedEvent = {
            "event": "started",
            "init": pid,
            "pid": pid,
            "start_ticks": self._start_ticks,
            "started_at": self._started_at,
        }
        self._tell(started)

    def _watch_pod(self) -> None:
        """Follow how many processes of the pod's others were killed for want of memory.

        systemd removes a scope as soon as its last process has ended, and with it the count of what killed that; the
        pod's count stays, and what the others' is not is ours. A change wakes who polls it (kernel, cgroup-v2.rst).
        """
        if not self._config.pod_events:
            return
        try:
            fd = os.open(self._config.pod_events, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        self._loop.watch(fd, select.EPOLLPRI, lambda _: self._count_others(fd))
        self._count_others(fd)

    def _count_others(self, fd: int) -> None:
        try:
            os.pread(fd, 4096, 0)  # or it would wake us again
        except OSError:
            self._loop.forget(fd)
            os.close(fd)
            return
        # The sum first: what is added in between is ours the sooner.
        total, own = oom_kills(self._config.pod_events), self._own_oom_kills()
        if total >= 0 and own >= 0:
            self._others = total - own

    def _own_oom_kills(self) -> int:
        return max((oom_kills(path) for path in self._config.oom_files), default=-1)

    def _was_oom_killed(self) -> bool:
        own = self._own_oom_kills()
        if own < 0 and self._config.pod_events and self._status:
            own = oom_kills(self._config.pod_events) - self._others
        return own > 0

    def _in_time(self, call: Call | None, code: int, command: str, limit: float) -> None:
        """Raises LateError where the runtime was ended at its limit: what it has logged is not why it failed."""
        if code and call is not None and call.late:
            raise LateError(f"{self._config.runtime} {command} did not come back within {limit:g} s")

    def _started_pid(self, code: int, pid_file: str, log: str) -> int:
        """The process that the runtime has started. Raises RequestError, OSError or ValueError."""
        if code:
            raise RequestError(last_error(log, self._config.runtime, code))
        return int(read_small(pid_file))

    def _init_ended(self, status: int) -> None:
        self._finished_at = time.time_ns()
        self._status = status

    # The way down

    def _finish(self) -> None:
        """After the container's end: complete the log, write the status down, tell it, clear up."""
        # The count is gone once it is deleted.
        assert self._status is not None
        record: ExitRecord = {
            "code": _exit_code(self._status),
            "start_ticks": self._start_ticks,
            "started_at": self._started_at,
            "finished_at": self._finished_at,
            "oom_killed": self._was_oom_killed(),
        }
        if not self._drained(_QUIET_DRAIN):
            _save(EXIT_RECORD, record)  # it will be a while until it is told
            self._delete()  # processes left in the cgroup hold the pipes
            if not self._drained(_LAST_DRAIN):
                for output in self._outputs.values():
                    output.detach()
                self._drained(_QUIET_DRAIN)
                for output in self._outputs.values():
                    output.end()
        self._log.close()
        saved = _save(EXIT_RECORD, record)
        self._record = record
        self._tell({"event": "exited", **record})
        error = self._delete()
        if not self._loop.until(lambda: not self._execs, _LAST_DRAIN):
            for execution in self._execs.values():
                execution.kill()  # a runtime that hangs has nobody to end it afterwards
        self._gone = {"event": "gone", "error": error} if error else {"event": "gone"}
        self._tell(self._gone)
        # On a full disk the record is kept here, for a daemon to come, until it can be saved. The removal of the
        # container may be what makes room: it takes the directory away, which ends this.
        while not saved:
            self._loop.rest(_SAVE_PAUSE)
            saved = _save(EXIT_RECORD, record)

    def _drained(self, limit: float) -> bool:
        return self._loop.until(lambda: all(output.ended for output in self._outputs.values()), limit)

    def _delete(self) -> str:
        """Remove the container from the runtime; returns why that failed, or nothing."""
        attempts = 0
        codes: list[int] = []
        while not self._deleted and attempts < _DELETE_ATTEMPTS:
            self._loop.rest(0.1 * attempts)
            attempts += 1
            codes.clear()
            try:
                self._loop.spawn(self._runtime.delete(self._path(_LOG)), (0, 1, 2), _DELETE_LIMIT, codes.append)
            except OSError as error:
                return str(error)
            self._loop.until(lambda: bool(codes))
            self._deleted = codes == [0]
        return "" if self._deleted else last_error(self._path(_LOG), self._config.runtime, codes[0])

    # Connections

    def _accept(self, listener: Socket) -> None:
        try:
            sock = accept(listener)
        except OSError:
            return  # it has hung up already
        self._connect(sock)

    def _connect(self, sock: Socket) -> None:
        sock.setblocking(False)
        channel = Channel(sock)
        self._channels[channel.fileno()] = channel
        self._loop.watch(channel.fileno(), select.EPOLLIN, lambda _: self._serve(channel))
        self._send(channel, self._greeting())
        if self._gone:
            self._send(channel, self._gone)

    def _hang_up(self, channel: Channel) -> None:
        """Close a connection. The execs that it asked for end with it."""
        if self._channels.pop(channel.fileno(), None) is None:
            return
        self._loop.forget(channel.fileno())
        channel.close()
        for execution in self._execs.values():
            if execution.channel is channel:
                execution.kill()

    def _send(self, channel: Channel, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
        if channel.fileno() in self._channels:
            try:
                channel.send(message, fds)
            except (OSError, ProtocolError):
                self._hang_up(channel)

    def _tell(self, event: ShimEvent) -> None:
        for channel in list(self._channels.values()):
            self._send(channel, event)

    def _serve(self, channel: Channel) -> None:
        try:
            requests = channel.receive()
        except BlockingIOError:
            return
        except (EOFError, OSError, ProtocolError):
            self._hang_up(channel)
            return
        for message, fds in requests:
            if channel.fileno() < 0:  # hung up on by an answer; what it asked for after that has no owner
                for fd in fds:
                    os.close(fd)
                continue
            answer, sent = self._answer(channel, message, fds)
            self._send(channel, {"re": message.get("re"), **answer}, sent)

    def _answer(self, channel: Channel, message: Message, fds: list[int]) -> Answer:
        """Carry out one request. Descriptors that the operation leaves in `fds` are closed."""
        try:
            return _operation(message)(self, channel, message, fds)
        except Exception as error:  # noqa: BLE001 - no request may end the process that holds a container
            return {"error": str(error) or type(error).__name__}, ()
        finally:
            for fd in fds:
                os.close(fd)

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

    # Operations

    def _op_status(self, _channel: Channel, _message: Message, _fds: list[int]) -> Answer:
        return _OK, ()

    def _op_reopen(self, _channel: Channel, _message: Message, _fds: list[int]) -> Answer:
        self._log.reopen()
        return _OK, ()

    def _op_exec(self, channel: Channel, message: Message, fds: list[int]) -> Answer:
        """Start a process in the container; how it goes is told by events to the connection that asked.

        Its standard streams are three descriptors, or those of the terminal that the runtime sends to the
        socket "console", which the daemon listens on.
        """
        self._must_run()
        exec_id = _text(message, "exec_id")
        console = _text(message, "console") if message.get("console") else None
        if "/" in exec_id:
            raise RequestError(f"exec id {exec_id!r} is not a file name")
        if exec_id in self._execs:
            raise RequestError(f"exec {exec_id} is running already")
        if len(fds) != (0 if console else 3):
            raise RequestError("an exec takes three file descriptors, or a console socket and none")
        execution = _Exec(exec_id, channel)
        pid_file, log = f"exec-{exec_id}.pid", f"exec-{exec_id}.log"
        argv = self._runtime.exec(_text(message, "spec"), self._path(pid_file), self._path(log), console)
        execution.call = self._loop.spawn(
            argv, fds or (0, 1, 2), _EXEC_LIMIT, lambda code: self._entered(execution, code, pid_file, log)
        )
        self._execs[exec_id] = execution
        return _OK, ()

    def _entered(self, execution: _Exec, code: int, pid_file: str, log: str) -> None:
        """The runtime's exec has ended: take over the process that it started."""
        failed: ExecFailedEvent | None = None
        try:
            self._in_time(execution.call, code, "exec", _EXEC_LIMIT)
            pid = self._started_pid(code, pid_file, log)
            self._loop.adopt(pid, lambda status: self._exec_ended(execution, status))
        except (OSError, ValueError, RequestError) as error:
            _end_unseen(pid_file)
            del self._execs[execution.id]
            failed = {
                "event": "exec-failed",
                "exec_id": execution.id,
                "exec": execution.id,
                "error": str(error),
                "late": isinstance(error, LateError),
            }
        else:
            execution.started(pid)
        for path in (pid_file, log):
            if os.path.lexists(path):
                os.unlink(path)
        if failed is not None:
            self._send(execution.channel, failed)

    def _exec_ended(self, execution: _Exec, status: int) -> None:
        del self._execs[execution.id]
        exited: ExecExitedEvent = {
            "event": "exec-exited",
            "exec_id": execution.id,
            "exec": execution.id,
            "code": _exit_code(status),
        }
        self._send(execution.channel, exited)

    def _op_attach(self, _channel: Channel, message: Message, fds: list[int]) -> Answer:
        """Copy output from now on to the descriptors given, one for each of "streams" ("stdout", "stderr").

        The answer brings the writing end of the container's standard input, or its terminal, if it has any.
        """
        self._must_run()
        streams = _texts(message, "streams")
        if len(streams) != len(fds) or not self._outputs.keys() >= set(streams):
            raise RequestError(f"attach takes one descriptor for each of {', '.join(self._outputs)}")
        for name in streams:
            self._outputs[name].attach(fds[0])
            del fds[0]
        return {"ok": True}, [self._input] if self._input >= 0 else []

    def _op_close_stdin(self, _channel: Channel, _message: Message, _fds: list[int]) -> Answer:
        """Let go of the container's standard input: it ends when no attached client holds it any more."""
        if self._input >= 0 and not self._config.tty:
            os.close(self._input)
            self._input = -1
        return _OK, ()

    def _must_run(self) -> None:
        if not self._init or self._status is not None:
            raise RequestError(f"container {self._config.id} is not running")

    def _path(self, name: str) -> str:
        """The absolute name of a file of the state directory, for programs that run elsewhere."""
        return f"{self._config.directory}/{name}"


_OPERATIONS: dict[str, Callable[[Shim, Channel, Message, list[int]], Answer]] = {
    "status": Shim._op_status,
    "reopen": Shim._op_reopen,
    "exec": Shim._op_exec,
    "attach": Shim._op_attach,
    "close-stdin": Shim._op_close_stdin,
}


def _operation(message: Message) -> Callable[[Shim, Channel, Message, list[int]], Answer]:
    name = _text(message, "op")
    if name not in _OPERATIONS:
        raise RequestError(f"unknown operation {name!r}: this shim has version {VERSION}")
    return _OPERATIONS[name]


def _text(message: Message, key: str) -> str:
    value = message.get(key)
    if not isinstance(value, str) or not value or "\0" in value:
        raise RequestError(f"{key!r} must be a non-empty string, not {value!r}")
    return value


def _texts(message: Message, key: str) -> list[str]:
    value = message.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise RequestError(f"{key!r} must be a list of strings, not {value!r}")
    return value


def _exit_code(status: int) -> int:
    """The exit code for a child's status, which is minus a signal's number: then 128 and that number, as in shells."""
    return status if status >= 0 else 128 - status


def _bind(name: str) -> Socket:
    """A listening socket in the current directory that only root may use. Raises OSError if it exists."""
    listener = Socket(AF_UNIX, SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(name)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(mask)
    listener.listen(16)
    listener.setblocking(False)
    return listener


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


def _end_unseen(pid_file: str) -> None:
    """Kill the process of a runtime that was given up between starting it and saying so."""
    try:
        pid = int(read_small(pid_file))
        # Ours, so that its number is no other's: orphans are not reaped before this.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        os.killpg(pid, SIGKILL)
    except (OSError, ValueError):
        pass


def _save(name: str, record: ExitRecord) -> bool:
    """Write a record so that it survives a crash of the machine; False if that should be tried again.

    When the directory itself is gone, nobody will look there: that counts as done.
    """
    try:
        fd = os.open(name + ".tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, dumps(record).encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(name + ".tmp", name)
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
