"""The command lines of the OCI runtime (runc, crun) that a shim runs, and what it reads back from them."""

from __future__ import annotations

import os

from .lean import loads

_TAIL = 64 * 1024
_MAX_ERROR = 4096


class Runtime:
    """An OCI runtime's command line for one container."""

    __slots__ = ("_base", "_container")

    def __init__(self, path: str, root: str, arguments: list[str], container: str) -> None:
        self._base = [path, "--root", root, *arguments, "--log-format", "json"]
        self._container = container

    def run(self, bundle: str, pid_file: str, log: str, console: str | None) -> list[str]:
        """Create and start the container; its standard streams are the command's own, or a console's."""
        sockets = ["--console-socket", console] if console else []
        options = ["--detach", "--pid-file", pid_file, "--bundle", bundle, *sockets]
        return [*self._base, "--log", log, "run", *options, self._container]

    def exec(self, spec: str, pid_file: str, log: str, console: str | None) -> list[str]:
        """Run the process of the file `spec` in the container."""
        sockets = ["--console-socket", console] if console else []
        options = ["--detach", "--process", spec, "--pid-file", pid_file, *sockets]
        return [*self._base, "--log", log, "exec", *options, self._container]

    def delete(self, log: str) -> list[str]:
        """Kill what is left in the container's cgroup and remove it; no error if it is gone already."""
        return [*self._base, "--log", log, "delete", "--force", self._container]


def last_error(log: str, program: str, code: int) -> str:
    """What a failed call says for itself: the last error in its log, else how it ended.

    `code` is its exit code, or minus the signal that ended it.
    """
    try:
        with open(log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            # Not lines: crun's records have several.
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
    if code < 0:
        return f"{program} was ended by signal {-code} and left no message"
    return f"{program} exited with {code} and left no message"


def read_small(path: str) -> bytes:
    """The first 4 KiB of a file. Not by open(): its layers dirty some 100 KiB of a shim's memory."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since the machine's boot (proc(5), /proc/PID/stat field 22)."""
    stat = read_small(f"/proc/{pid}/stat")
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


def oom_kills(path: str) -> int:
    """The kernel's count in a `memory.events` (cgroup v2) or `memory.oom_control` (v1) file; -1 if unread."""
    try:
        for line in read_small(path).splitlines():
            if line.startswith(b"oom_kill "):
                return int(line[9:])
    except (OSError, ValueError):
        pass
    return -1
