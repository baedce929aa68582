"""Processes beside the container's first one (exec), where a shim of containerd's kind starts and reaps them."""

from __future__ import annotations

import os
import stat
import sys

from .copier import Copier
from .lean import AF_UNIX, SCM_RIGHTS, SIGKILL, SOCK_STREAM, SOL_SOCKET, Socket, socket_pair
from .runtime import LateError, read_all
from .shim_config import RequestError, text
from .task_wire import any_of, data, exit_of, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Loop
    from .messages import ExecExitedEvent, ExecFailedEvent, ExecStartedEvent
    from .task_link import TaskLink
    from .wire import Channel, Message

_EXEC_LIMIT = 60.0  # seconds
_KILL_LIMIT = 10.0  # seconds
_PROCESS = "types.containerd.io/opencontainers/runtime-spec/1/Process"


class TerminalSizer:
    """The size of a terminal that a runtime's shim has. One request is under way at a time, and then the last size."""

    __slots__ = ("_asking", "_link", "_name", "_size", "_started")

    def __init__(self, name: bytes, link: Callable[[], TaskLink]) -> None:
        """`name` are the fields of a request that name the process."""
        self._name = name
        self._link = link
        self._size: tuple[int, int] | None = None
        self._started = False
        self._asking = False

    def resize(self, width: int, height: int) -> None:
        self._size = (width, height)
        self._ask()

    def started(self) -> None:
        """The process runs. It has no terminal before."""
        self._started = True
        self._ask()

    def _ask(self) -> None:
        if self._size is None or not self._started or self._asking:
            return
        width, height = self._size
        self._size = None
        self._asking = True
        request = self._name + number(3, width) + number(4, height)
        self._link().call("ResizePty", request, self._answered, _KILL_LIMIT)

    def _answered(self, _reply: bytes, _error: RequestError | None) -> None:
        self._asking = False
        if not self._link().closed:
            self._ask()


class _TaskExec:
    """One exec. `ends` are the streams' ends that the runtime's shim opens by path.

    It has the outputs once it has started the process. It opens the input at any time after that. An exec is `late` if
    the shim did not start it in time: the client was told so, and the shim may start it yet.
    """

    __slots__ = (
        "_ends",
        "_stdin",
        "channel",
        "console",
        "ended",
        "id",
        "killed",
        "late",
        "running",
        "stdin_ended",
        "terminal",
    )

    def __init__(self, exec_id: str, channel: Channel, console: str, terminal: TerminalSizer) -> None:
        self.id = exec_id
        self.channel = channel
        self.console = console
        self.terminal = terminal
        self.running = False
        self.ended = False
        self.killed = False
        self.late = False
        self.stdin_ended = False
        self._ends: list[int] = []
        self._stdin = -1

    def stdin(self, fd: int) -> str:
        """As `end`, for the end of the input, which is held until the process has ended."""
        self._stdin = fd
        return pipe_path(fd)

    def end(self, fd: int) -> str:
        """Take over an end of a pipe, and return the path by which another process opens the same pipe."""
        self._ends.append(fd)
        return pipe_path(fd)

    def close(self) -> None:
        """Close all ends."""
        self.let_go()
        self.let_go_of_stdin()

    def let_go(self) -> None:
        """Close the ends that the runtime's shim has opened by now."""
        for fd in self._ends:
            os.close(fd)
        self._ends.clear()

    def let_go_of_stdin(self) -> None:
        """Close the end of the input."""
        if self._stdin >= 0:
            os.close(self._stdin)
            self._stdin = -1


class TaskExecs:
    """The execs of the container that are not deleted yet."""

    __slots__ = ("_container", "_execs", "_link", "_loop", "_send")

    def __init__(
        self,
        loop: Loop,
        container: str,
        link: Callable[[], TaskLink],
        send: Callable[[Channel, ExecStartedEvent | ExecFailedEvent | ExecExitedEvent], None],
    ) -> None:
        self._loop = loop
        self._container = container
        self._link = link
        self._send = send
        self._execs: dict[str, _TaskExec] = {}

    def start(self, channel: Channel, message: Message, fds: list[int]) -> None:
        """Start the process of an ExecRequest. Raises RequestError, OSError."""
        exec_id, spec = text(message, "exec_id"), read_all(text(message, "spec"))
        console = text(message, "console") if message.get("console") else ""
        if exec_id in self._execs:
            raise RequestError(f"exec {exec_id} is running already")
        if len(fds) != (0 if console else 3):
            raise RequestError("an exec takes three file descriptors, or a console socket and none")
        execution = _TaskExec(exec_id, channel, console, TerminalSizer(self._name(exec_id), self._link))
        try:
            paths = self._terminal(execution) if console else self._streams(execution, fds)
        except BaseException:
            execution.close()
            raise
        self._execs[exec_id] = execution
        request = self._name(execution.id) + number(3, bool(console))
        for field, path in enumerate(paths, 4):
            request += data(field, path)
        request += any_of(7, _PROCESS, spec)
        self._ask(execution, "Exec", request, self._created)

    def resize(self, console: str, width: int, height: int) -> None:
        """Set the size of the terminal of the exec that was given this console socket."""
        for execution in self._execs.values():
            if execution.console == console:
                execution.terminal.resize(width, height)

    def all_ended(self) -> bool:
        return not any(not execution.ended for execution in self._execs.values())

    def kill(self, channel: Channel | None = None) -> None:
        """Kill the execs of a connection, or all of them, and forget those that have ended.

        The daemon closes the connection when it has all output. A deletion before that would cut the output off.
        """
        for execution in list(self._execs.values()):
            if channel is not None and execution.channel is not channel:
                continue
            execution.killed = True
            if execution.ended:
                self._forget(execution)
            elif execution.running:
                self._kill(execution)

    def _name(self, exec_id: str) -> bytes:
        return data(1, self._container) + data(2, exec_id)

    def _streams(self, execution: _TaskExec, fds: list[int]) -> list[str]:
        """The paths of the streams. The runtime's shim holds a writer of the input: only CloseIO ends that."""
        stdin, *outputs = fds
        paths = [""]
        if _is_pipe(stdin):
            reader, writer = os.pipe()
            paths = [execution.stdin(reader)]
            Copier(self._loop, os.dup(stdin), writer, lambda: self._close_stdin(execution))
        for fd in outputs:
            paths.append(execution.end(os.dup(fd)) if _is_pipe(fd) else os.devnull)
        return paths

    def _terminal(self, execution: _TaskExec) -> list[str]:
        """As `_streams`. The daemon gets one end of a pair of sockets where an OCI runtime sends it a terminal."""
        ours, theirs = socket_pair()
        try:
            client = Socket(AF_UNIX, SOCK_STREAM)
            try:
                client.connect(execution.console)
                client.sendmsg([b"terminal"], [(SOL_SOCKET, SCM_RIGHTS, theirs.fileno().to_bytes(4, sys.byteorder))])
            finally:
                client.close()
        finally:
            theirs.close()
        stdin, stdin_writer = os.pipe()
        stdout, stdout_writer = os.pipe()
        paths = [execution.stdin(stdin), execution.end(stdout_writer)]
        fd = ours.detach()
        Copier(self._loop, os.dup(fd), stdin_writer, lambda: None)
        Copier(self._loop, stdout, fd, lambda: None)
        return paths

    def _ask(
        self, execution: _TaskExec, method: str, request: bytes, then: Callable[[_TaskExec, RequestError | None], None]
    ) -> None:
        """Send a request, and tell the client if there is no answer in time.

        The answer is awaited all the same. Until then the ends stay open: the runtime's shim would open those of
        another exec by the same paths.
        """

        def late() -> None:
            execution.late = True
            words = f"the runtime's shim did not answer {method} within {_EXEC_LIMIT:g} s"
            self._tell_failed(execution, LateError(words))

        timer = self._loop.later(_EXEC_LIMIT, late)

        def answered(_reply: bytes, error: RequestError | None) -> None:
            self._loop.cancel(timer)
            then(execution, error)

        self._link().call(method, request, answered, asked=_EXEC_LIMIT)

    def _created(self, execution: _TaskExec, error: RequestError | None) -> None:
        if error is not None:
            self._failed(execution, error)
        elif execution.late:
            execution.close()
            self._forget(execution)
        else:
            self._ask(execution, "Start", self._name(execution.id), self._started)

    def _started(self, execution: _TaskExec, error: RequestError | None) -> None:
        if error is not None:
            self._link().call("Delete", self._name(execution.id), _ignore)
            self._failed(execution, error)
            return
        execution.let_go()
        execution.running = True
        if execution.late:
            execution.killed = True
        else:
            started: ExecStartedEvent = {"event": "exec-started", "exec": execution.id}
            self._send(execution.channel, started)
        if execution.killed:
            self._kill(execution)
        if execution.stdin_ended:
            self._close_stdin(execution)
        execution.terminal.started()
        self._link().call("Wait", self._name(execution.id), lambda reply, error: self._ended(execution, reply, error))

    def _failed(self, execution: _TaskExec, error: RequestError) -> None:
        execution.close()
        del self._execs[execution.id]
        if not execution.late:
            self._tell_failed(execution, error)

    def _tell_failed(self, execution: _TaskExec, error: RequestError) -> None:
        failed: ExecFailedEvent = {
            "event": "exec-failed",
            "exec_id": execution.id,
            "error": str(error),
            "late": isinstance(error, LateError),
        }
        self._send(execution.channel, failed)

    def _ended(self, execution: _TaskExec, reply: bytes, error: RequestError | None) -> None:
        execution.ended = True
        execution.let_go_of_stdin()
        try:
            code = 255 if error is not None else exit_of(reply)[0]
        except RequestError:
            code = 255
        if not execution.late:
            exited: ExecExitedEvent = {"event": "exec-exited", "exec_id": execution.id, "code": code}
            self._send(execution.channel, exited)
        if execution.killed:
            self._forget(execution)

    def _kill(self, execution: _TaskExec) -> None:
        self._link().call("Kill", self._name(execution.id) + number(3, SIGKILL), _ignore, _KILL_LIMIT)

    def _close_stdin(self, execution: _TaskExec) -> None:
        """The client has sent all. The runtime's shim opens its writer when it starts the process, not before."""
        execution.stdin_ended = True
        if execution.running and not execution.ended:
            self._link().call("CloseIO", self._name(execution.id) + number(3, 1), _ignore, _KILL_LIMIT)

    def _forget(self, execution: _TaskExec) -> None:
        if self._execs.pop(execution.id, None) is not None:
            self._link().call("Delete", self._name(execution.id), _ignore)


def pipe_path(fd: int) -> str:
    """The path by which another process opens a pipe of this one: what a FIFO is for, without a file."""
    return f"/proc/{os.getpid()}/fd/{fd}"


def _is_pipe(fd: int) -> bool:
    return stat.S_ISFIFO(os.fstat(fd).st_mode)


def _ignore(_reply: bytes, _error: RequestError | None) -> None:
    """For calls whose failure means that the process has ended."""
