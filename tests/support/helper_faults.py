"""Faults of the daemon's helper processes, made inside a daemon of :mod:`tests.support.faulty`.

A helper is a program that the daemon starts, the shim or nursery that it sends a message to, or the shim whose
container's process it sends a signal. The helper is

1. killed: SIGKILL, before it does anything, or before the message or signal is sent;
2. stopped: SIGSTOP at the same moment;
3. hanging: a program that ignores SIGTERM and does nothing runs in its place.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from typing import Any

from snapshotter import program_start

NURSERY = "the nursery of shims"
# The events at which a helper is started or told something, and what can become of it there.
HELPER_EVENTS = {
    "subprocess.Popen": ("killed", "stopped", "hanging"),
    "os.posix_spawn": ("killed", "stopped", "hanging"),
    "criserver.send": ("killed", "stopped"),
    "criserver.pidfd_send_signal": ("killed", "stopped"),
}
_HANG = "trap '' TERM INT HUP; while :; do sleep 0.2; done"
_SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


class HelperFaults:
    """``tell`` gets a line "stopped PID" for each process that is stopped: the test has to thaw it."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._next = threading.local()
        self._fork_exec = subprocess._fork_exec  # type: ignore[attr-defined]
        subprocess._fork_exec = self._start  # type: ignore[attr-defined]
        self._call_libc = program_start._call
        program_start._call = self._spawn

    def harm(self, event: str, args: tuple[Any, ...], fault: str) -> None:
        """Called by the audit hook. A program has no PID yet: it is harmed as soon as this thread has started it."""
        if event in ("subprocess.Popen", "os.posix_spawn"):
            self._next.fault = fault
        elif pid := _peer(args[0]) if event == "criserver.send" else _shim_of(args[0]):
            self._signal(pid, fault)

    def _start(self, argv: Any, programs: Any, *rest: Any) -> int:
        """In place of the function by which subprocess starts a program."""
        fault = self._take_fault()
        if fault == "hanging":
            argv, programs = _hanging(), (b"/bin/sh",)
        pid: int = self._fork_exec(argv, programs, *rest)
        if fault in _SIGNALS:
            self._signal(pid, fault)
        return pid

    def _spawn(self, function: str, *arguments: Any) -> None:
        """In place of the function by which the start of a CNI plugin calls the C library."""
        fault = self._take_fault() if function == "posix_spawn" else ""
        if fault == "hanging":
            pid, _, actions, attributes, _, variables = arguments
            words = program_start._string_array(_hanging())
            arguments = (pid, words[0], actions, attributes, words, variables)
        self._call_libc(function, *arguments)
        if fault in _SIGNALS:
            self._signal(arguments[0]._obj.value, fault)

    def _take_fault(self) -> str:
        fault: str = getattr(self._next, "fault", "")
        self._next.fault = ""
        return fault

    def _signal(self, pid: int, fault: str) -> None:
        os.kill(pid, _SIGNALS[fault])
        if fault == "stopped":
            self._tell(f"stopped {pid}")


def _hanging() -> list[bytes]:
    return [b"/bin/sh", b"-c", _HANG.encode(), os.fsencode(_base())]


def _base() -> str:
    """The directory of the test's node, by which the test finds processes that are left."""
    with open("/proc/self/cmdline") as f:
        return os.path.dirname(f.read().split("\0")[-2])


def _peer(name: str) -> int:
    """The PID of the nursery, or of the shim of "the shim of container ID"; 0 where it has ended."""
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        try:
            with open(f"/proc/{entry}/comm", errors="surrogateescape") as f:
                program = f.read().strip()
            if name == NURSERY and program == "criserver-nurse" and _parent(int(entry)) == os.getpid():
                return int(entry)
            if program == "criserver-shim" and os.readlink(f"/proc/{entry}/cwd").endswith(f"/{name.split()[-1]}"):
                return int(entry)
        except OSError:
            continue
    return 0


def _shim_of(pid: int) -> int:
    """The PID of the shim whose container's process this is; 0 where it has ended, or has been adopted by another."""
    parent = _parent(pid)
    try:
        with open(f"/proc/{parent}/comm") as f:
            return parent if f.read() == "criserver-shim\n" else 0
    except OSError:
        return 0


def _parent(pid: int) -> int:
    """The parent of a process (proc(5), /proc/PID/stat field 4); 0 where it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return int(f.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0
