"""The shim of a container that a shim of containerd's kind runs (shim API version 2 or 3, over ttrpc).

It does for the daemon what `Shim` does: it keeps the log, tells how the container ended, and outlives the daemon. A
container is started, ended and deleted by the runtime's shim, which is a program of the runtime's makers:
containerd-shim-runc-v2, or those of Kata Containers and gVisor. Its name for a container is a task.
"""

from __future__ import annotations

import os
import time

from .connections import bind
from .lean import dumps, loads
from .oom_watch import OomWatch
from .output import Output
from .runtime import LateError, read_all, start_ticks
from .shim import Shim
from .shim_config import RequestError, whole
from .task_execs import TaskExecs, TerminalSizer, pipe_path
from .task_link import EventSink, TaskLink, discard
from .task_wire import any_of, content, data, exit_of, fields, integer, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .connections import Answer
    from .messages import StartedEvent, UpdatedEvent
    from .shim_config import ShimConfig
    from .wire import Channel, Message

MARK = "task.json"
"""The file that says that the runtime's shim may have something of the container, and how that shim is reached."""

_EVENTS = "events.sock"
_LOG = "log"
_RESOURCES = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"

# Seconds.
_BOOTSTRAP_LIMIT = 60.0
_CREATE_LIMIT = 100.0
_CALL_LIMIT = 10.0
_UPDATE_LIMIT = 30.0
_DELETE_LIMIT = 30.0
_END_LIMIT = 5.0


class TaskShim(Shim):
    """One container's life under a runtime's shim."""

    def __init__(self, config: ShimConfig, first: Any) -> None:
        assert config.task is not None
        self._task = config.task
        self._link: TaskLink | None = None
        self._created = False
        self._terminal = TerminalSizer(data(1, config.id), self._connected)
        super().__init__(config, first)

    def _make_execs(self) -> TaskExecs:
        self._task_execs = TaskExecs(self._loop, self._config.id, self._connected, self._connections.send)
        return self._task_execs

    # The start

    def _start(self) -> None:
        config = self._config
        ends = self._make_ends()
        self._oom = OomWatch(self._loop, config.oom_files, config.pod_events)
        try:
            self._link = self._join() if config.task_of else self._bootstrap()
            request = data(1, config.id) + data(2, config.bundle) + number(4, config.tty)
            for field, fd in enumerate(ends, 5):
                request += data(field, pipe_path(fd) if fd >= 0 else "")
            request += any_of(10, self._task["options_type"], bytes.fromhex(self._task["options"]))
            pid = integer(fields(self._link.ask("Create", request, _CREATE_LIMIT)), 1)
            self._created = True
            for fd, name in zip(self._pipes, ("stdout", "stderr"), strict=False):
                self._outputs[name] = Output(self._loop, fd, name, self._log)
            self._link.call("Wait", self._name(), self._waited)
            self._started_at = time.time_ns()  # before it can end, by the same clock
            started = integer(fields(self._link.ask("Start", self._name(), _CREATE_LIMIT)), 1)
            self._start_ticks = _ticks(started or pid)
            self._init = started or pid
        except (OSError, RequestError):
            self._delete()
            raise
        finally:
            # The runtime's shim opens the input at any time later, so its end stays open.
            for fd in ends[1:]:
                os.close(fd)
        self._terminal.started()
        self._oom.start()
        event: StartedEvent = {
            "event": "started",
            "init": self._init,
            "pid": self._init,
            "start_ticks": self._start_ticks,
            "started_at": self._started_at,
        }
        self._connections.tell(event)

    def _make_ends(self) -> list[int]:
        """Pipes for standard streams; returns the container's ends, -1 for a stream that it has not."""
        stdin = -1
        if self._config.stdin or self._config.tty:
            stdin, self._input = os.pipe()
        stdout, stdout_end = os.pipe()
        self._pipes = [stdout]
        if self._config.tty:
            return [stdin, stdout_end]
        stderr, stderr_end = os.pipe()
        self._pipes.append(stderr)
        return [stdin, stdout_end, stderr_end]

    def _bootstrap(self) -> TaskLink:
        """Start the runtime's shim for this container, and connect to it. Raises RequestError, OSError."""
        EventSink(self._loop, bind(_EVENTS))
        discard(self._loop, _LOG)
        self._mark({})
        events = f"/proc/{os.getpid()}/cwd/{_EVENTS}"  # short enough for a socket's address
        namespace = self._task["namespace"]
        argv = [
            *self._task["command"],
            *("-namespace", namespace, "-address", events, "-publish-binary", "/bin/true", "-id", self._config.id),
            "start",
        ]
        environment = {
            "TTRPC_ADDRESS": events,
            "GRPC_ADDRESS": events,
            "NAMESPACE": namespace,
            "MAX_SHIM_VERSION": "3",
            "GOMAXPROCS": "2",
        }
        told, told_end = os.pipe()
        errors, errors_end = os.pipe()
        codes: list[int] = []
        try:
            call = self._loop.spawn(argv, (0, told_end, errors_end), _BOOTSTRAP_LIMIT, codes.append, environment)
            os.close(told_end)
            os.close(errors_end)
            self._loop.until(lambda: bool(codes))
            os.set_blocking(told, False)
            os.set_blocking(errors, False)
            if codes[0]:
                if call.late:
                    raise LateError(f"{argv[0]} start did not come back within {_BOOTSTRAP_LIMIT:g} s")
                words = (_read(errors) or _read(told)).decode(errors="replace").strip()
                raise RequestError(words or f"{argv[0]} start exited with {codes[0]} and left no message")
            found = bootstrap_result(_read(told))
        finally:
            os.close(told)
            os.close(errors)
        self._mark(found)
        return self._connect(found)

    def _join(self) -> TaskLink:
        """Connect to the runtime's shim of the pod's sandbox container. Raises RequestError, OSError."""
        try:
            found = loads(read_all(self._config.task_of).decode())
        except FileNotFoundError:
            raise RequestError("the pod's sandbox container has no shim any more") from None
        self._mark({**found, "joined": True})
        return self._connect(found)

    def _connect(self, bootstrap: dict[str, Any]) -> TaskLink:
        service = f"containerd.task.v{bootstrap['version']}.Task"
        return TaskLink(self._loop, bootstrap["address"], service, self._task["namespace"])

    def _mark(self, bootstrap: dict[str, Any]) -> None:
        """Write down how the runtime's shim is reached, and its program: a later configuration may not have it."""
        bootstrap = {**bootstrap, "program": self._task["command"][0]}
        fd = os.open(MARK + ".tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, dumps(bootstrap).encode())
        finally:
            os.close(fd)
        os.rename(MARK + ".tmp", MARK)

    # The end

    def _wait_for_end(self) -> bool:
        link = self._connected()
        self._loop.until(lambda: self._status is not None or link.closed)
        return self._status is not None

    def _waited(self, reply: bytes, error: RequestError | None) -> None:
        try:
            if error is not None:
                raise error
            code, finished_at = exit_of(reply)
        except RequestError as wrong:
            # Nobody knows how the container ended. The daemon looks for its process.
            self._connected().close(wrong)
            return
        self._finished_at = finished_at or time.time_ns()
        self._status = code

    def _delete(self) -> str:
        """Have the runtime's shim delete the container, and end that shim unless it has the pod's other containers."""
        if self._deleted or self._link is None:
            return ""
        if self._link.closed:
            return "the runtime's shim is gone, or stuck"  # the daemon calls its program to clean up
        if self._created:
            try:
                self._link.ask("Delete", self._name(), _DELETE_LIMIT)
            except RequestError as error:
                if "not found" not in str(error):
                    return str(error)
        self._deleted = True
        if not self._config.task_of:
            link = self._link
            link.call("Shutdown", self._name(), lambda _reply, _error: link.close())
            if not self._loop.until(lambda: link.closed, _END_LIMIT):
                return "the runtime's shim does not end"
        self._link.close()
        _unlink(MARK)  # the daemon may have deleted it already
        return ""

    def _name(self) -> bytes:
        return data(1, self._config.id)

    def _connected(self) -> TaskLink:
        if self._link is None:
            raise RequestError("the runtime's shim has not started yet")
        return self._link

    # Requests

    def _op_signal(self, _channel: Channel, message: Message, _fds: list[int]) -> Answer:
        self._must_run()
        self._ask_soon("Kill", number(3, whole(message, "signal")), vital=True)
        return {"ok": True}, ()

    def _op_resize(self, _channel: Channel, message: Message, _fds: list[int]) -> Answer:
        width, height = whole(message, "width"), whole(message, "height")
        console = str(message.get("console", ""))
        if console:
            self._task_execs.resize(console, width, height)
        else:
            self._terminal.resize(width, height)
        return {"ok": True}, ()

    def _op_update(self, channel: Channel, message: Message, _fds: list[int]) -> Answer:
        self._must_run()

        def done(_reply: bytes, error: RequestError | None) -> None:
            event: UpdatedEvent = {"event": "updated", "late": isinstance(error, LateError)}
            if error is not None:
                event["error"] = str(error)
            self._connections.send(channel, event)

        resources = dumps(message.get("resources", {})).encode()
        self._connected().call("Update", self._name() + any_of(2, _RESOURCES, resources), done, _UPDATE_LIMIT)
        return {"ok": True}, ()

    def _op_close_stdin(self, channel: Channel, message: Message, fds: list[int]) -> Answer:
        answer = super()._op_close_stdin(channel, message, fds)
        self._ask_soon("CloseIO", number(3, 1))  # the runtime's shim holds a writer too
        return answer

    def _ask_soon(self, method: str, rest: bytes, *, vital: bool = False) -> None:
        self._connected().call(method, self._name() + rest, lambda _reply, _error: None, _CALL_LIMIT, vital=vital)


def bootstrap_result(output: bytes) -> dict[str, Any]:
    """What a shim has printed at its start: "version" and "address". Raises RequestError.

    1. Shims of containerd before 1.7 print an address. They speak version 2.
    2. Those before 2.3 print JSON with the keys version, address and protocol.
    3. Later ones print a BootstrapResult of protobuf, with the same fields as numbers 1, 2 and 3.
    """
    version: object
    address: object
    protocol: object
    try:
        found = loads(output.decode())
    except ValueError:
        found = None
    if isinstance(found, dict):
        version, address, protocol = found.get("version"), found.get("address"), found.get("protocol")
    elif output.startswith((b"unix://", b"/")):
        version, address, protocol = 2, output.decode(errors="replace").strip(), "ttrpc"
    else:
        result = fields(output)
        version = integer(result, 1)
        address, protocol = (content(result, field).decode(errors="replace") for field in (2, 3))
    if version not in (2, 3) or protocol != "ttrpc" or not isinstance(address, str):
        raise RequestError(f"the runtime's shim speaks version {version} by {protocol}; 2 and 3 by ttrpc are known")
    if not address.removeprefix("unix://").startswith("/"):
        raise RequestError(f"the runtime's shim listens at {address}, which is not a unix socket")
    return {"version": version, "address": address}


def _ticks(pid: int) -> int:
    """As `start_ticks`; 0 for a process that has ended and was reaped already."""
    try:
        return start_ticks(pid)
    except OSError:
        return 0


def _unlink(name: str) -> None:
    if os.path.lexists(name):
        os.unlink(name)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except BlockingIOError:
        return b""
