"""The command lines of the OCI runtime (runc, crun) that a shim runs, and the files that these calls write."""

from __future__ import annotations

import os

from .lean import loads
from .shim_config import RequestError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .loop import ChildProgram

_TAIL = 64 * 1024
_MAX_ERROR = 4096


class LateError(RequestError):
    """The runtime did not return in its time."""


class Runtime:
    """An OCI runtime's command lines for one container. `log` is the file for its errors.

    `command` is the program with the options before any verb, as `criserver.runtime.oci_runtime` makes it.
    """

    __slots__ = ("_base", "_container", "_path")

    def __init__(self, command: list[str], container: str) -> None:
        self._path = command[0]
        self._base = [*command, "--log-format", "json"]
        self._container = container

    def run(self, bundle: str, pid_file: str, log: str, console: str | None) -> list[str]:
        """Create and start the container. It gets the command's standard streams, or a terminal.

        `console` is the socket to which the runtime sends the terminal's master side.
        """
        sockets = ["--console-socket", console] if console else []
        options = ["--detach", "--pid-file", pid_file, "--bundle", bundle, *sockets]
        return [*self._base, "--log", log, "run", *options, self._container]

    def exec(self, spec: str, pid_file: str, log: str, console: str | None) -> list[str]:
        """Run the process of the file `spec` in the container."""
        sockets = ["--console-socket", console] if console else []
        options = ["--detach", "--process", spec, "--pid-file", pid_file, *sockets]
        return [*self._base, "--log", log, "exec", *options, self._container]

    def delete(self, log: str) -> list[str]:
        """Kill what is left in the container's cgroup and remove it. No error if it is removed already."""
        return [*self._base, "--log", log, "delete", "--force", self._container]

    def started_pid(self, verb: str, call: ChildProgram | None, code: int, pid_file: str, log: str) -> int:
        """The process that a run or an exec has started, once it has ended itself with `code`.

        Raises RequestError, also where there is no good PID file; LateError where it was killed at its limit: its log
        does not say why it failed.
        """
        if code and call is not None and call.late:
            raise LateError(f"{self._path} {verb} did not come back within {call.limit:g} s")
        if code:
            raise RequestError(self.last_error(log, code))
        try:
            return int(read_small(pid_file))
        except (OSError, ValueError) as error:
            raise RequestError(
                f"{self._path} {verb} ended as if it had succeeded, but there is no process ID in {pid_file}: "
                f"{reason(error)}"
            ) from None

    def last_error(self, log: str, code: int) -> str:
        """Why a call failed: the last error in its log, else how it ended.

        `code` is its exit code, or minus the signal that ended it.
        """
        return _logged_error(log) or (
            f"{self._path} was ended by signal {-code} and left no message"
            if code < 0
            else f"{self._path} exited with {code} and left no message"
        )


def _logged_error(log: str) -> str:
    try:
        with open(log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            # Not by lines: a record of crun's has several.
            records = file.read(_TAIL).split(b"}\n")
    except OSError:
        records = []
    for record in reversed(records):
        try:
            entry = loads(record.decode(errors="replace") + "}")
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("level") in ("error", "fatal", "panic"):
            return str(entry.get("msg", "")).strip()[:_MAX_ERROR]
    return ""


def read_small(path: str) -> bytes:
    """The first 4 KiB of a file. Not by open(), which would cost some 100 KiB of memory in each shim."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def read_all(path: str) -> bytes:
    """A whole file, as :func:`read_small`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        blocks = []
        while block := os.read(fd, 1 << 16):
            blocks.append(block)
        return b"".join(blocks)
    finally:
        os.close(fd)


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since the machine's boot (proc(5), /proc/PID/stat field 22)."""
    stat = read_small(f"/proc/{pid}/stat")
    return int(stat[stat.rindex(b")") + 2 :].split()[19])
