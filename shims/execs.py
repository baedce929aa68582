"""Processes beside the container's first one (exec): started by the OCI runtime, reaped and reported by the shim."""

from __future__ import annotations

import os

from .exit_record import exit_code
from .lean import SIGKILL
from .runtime import LateError, read_small
from .shim_config import RequestError, reason, text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import ChildProgram, Loop
    from .messages import ExecExitedEvent, ExecFailedEvent, ExecStartedEvent
    from .runtime import Runtime
    from .wire import Channel, Message

_EXEC_LIMIT = 60.0  # seconds


class _Exec:
    """One exec: the OCI runtime's `call` starts its process. It ends with its connection, `channel`."""

    __slots__ = ("_killed", "_pid", "call", "channel", "id")

    def __init__(self, exec_id: str, channel: Channel) -> None:
        self.id = exec_id
        self.channel = channel
        self.call: ChildProgram | None = None
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


class Execs:
    """The execs of the container that have not ended."""

    __slots__ = ("_directory", "_execs", "_loop", "_runtime", "_send")

    def __init__(
        self,
        loop: Loop,
        runtime: Runtime,
        directory: str,
        send: Callable[[Channel, ExecStartedEvent | ExecFailedEvent | ExecExitedEvent], None],
    ) -> None:
        self._loop = loop
        self._runtime = runtime
        self._directory = directory
        self._send = send
        self._execs: dict[str, _Exec] = {}

    def start(self, channel: Channel, message: Message, fds: list[int]) -> None:
        """Start the process of an ExecRequest. Raises RequestError, OSError."""
        exec_id = text(message, "exec_id")
        console = text(message, "console") if message.get("console") else None
        if "/" in exec_id:
            raise RequestError(f"exec id {exec_id!r} is not a file name")
        if exec_id in self._execs:
            raise RequestError(f"exec {exec_id} is running already")
        if len(fds) != (0 if console else 3):
            raise RequestError("an exec takes three file descriptors, or a console socket and none")
        execution = _Exec(exec_id, channel)
        pid_file, log = f"exec-{exec_id}.pid", f"exec-{exec_id}.log"
        argv = self._runtime.exec(
            text(message, "spec"), f"{self._directory}/{pid_file}", f"{self._directory}/{log}", console
        )
        execution.call = self._loop.spawn(
            argv, fds or (0, 1, 2), _EXEC_LIMIT, lambda code: self._entered(execution, code, pid_file, log)
        )
        self._execs[exec_id] = execution

    def all_ended(self) -> bool:
        return not self._execs

    def kill(self, channel: Channel | None = None) -> None:
        """Kill the execs of a connection, or all of them."""
        for execution in self._execs.values():
            if channel is None or execution.channel is channel:
                execution.kill()

    def _entered(self, execution: _Exec, code: int, pid_file: str, log: str) -> None:
        """The OCI runtime has ended: take over the process that it started."""
        told: ExecStartedEvent | ExecFailedEvent = {"event": "exec-started", "exec": execution.id}
        try:
            pid = self._runtime.started_pid("exec", execution.call, code, pid_file, log)
            self._loop.adopt(pid, lambda status: self._ended(execution, status))
        except (OSError, ValueError, RequestError) as error:
            _end_unseen(pid_file)
            del self._execs[execution.id]
            told = {
                "event": "exec-failed",
                "exec_id": execution.id,
                "exec": execution.id,
                "error": reason(error),
                "late": isinstance(error, LateError),
            }
        else:
            execution.started(pid)
        for path in (pid_file, log):
            if os.path.lexists(path):
                os.unlink(path)
        self._send(execution.channel, told)

    def _ended(self, execution: _Exec, status: int) -> None:
        del self._execs[execution.id]
        exited: ExecExitedEvent = {
            "event": "exec-exited",
            "exec_id": execution.id,
            "exec": execution.id,
            "code": exit_code(status),
        }
        self._send(execution.channel, exited)


def _end_unseen(pid_file: str) -> None:
    """Kill the process of a runtime that was killed after it had started the process and before it ended."""
    try:
        pid = int(read_small(pid_file))
        # The process is our child, so no other process has its number: orphans are not reaped before this.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        os.killpg(pid, SIGKILL)
    except (OSError, ValueError):
        pass
