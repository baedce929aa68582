"""A daemon that can be killed, or made to fail, at each of its side effects.

``python -m tests.support.faulty CONTROL LOG serve --config FILE`` runs ``criserver serve`` with an audit hook
(PEP 578). The interpreter calls the hook before each side effect: an open for writing, a rename, a start of a program.
So the points come from what the code does. System calls by ctypes, commits, messages to shims, signals by pidfd
and calls of NRI plugins raise an audit event in criserver and snapshotter.

CONTROL is a file that the daemon maps. It says what happens at the points; see :class:`Control`. LOG gets a line for
each point that was recorded, and one for the point that was hit. Words MODULE.NAME=SECONDS before ``serve`` set
deadlines, as in :mod:`tests.support.hurried`.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import sqlite3
import sys
import threading
from collections import Counter
from typing import Any

from tests.support.helper_faults import HelperFaults

_SIZE = 4096
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_OURS = (os.path.join(_ROOT, "criserver") + os.sep, os.path.join(_ROOT, "snapshotter") + os.sep)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Event -> the errors that the kernel gives there. An event without any is one that a kill alone is tried at.
_FILE = (errno.ENOSPC, errno.EIO)
_PROGRAM = (errno.EAGAIN, errno.EMFILE, errno.ENOMEM)
EVENTS: dict[str, tuple[int, ...]] = {
    "open": (errno.ENOSPC, errno.EIO, errno.EMFILE),
    "os.mkdir": _FILE,
    "os.rename": _FILE,
    "os.symlink": _FILE,
    "os.link": _FILE,
    "os.chmod": (errno.EIO,),
    "os.chown": (errno.EIO,),
    "os.setxattr": _FILE,
    "os.removexattr": (errno.EIO,),
    "os.truncate": _FILE,
    "os.utime": (errno.EIO,),
    "os.remove": (errno.EIO,),
    "os.rmdir": (errno.EIO,),
    "os.posix_spawn": _PROGRAM,
    "os.fork": _PROGRAM,
    "subprocess.Popen": _PROGRAM,
    "socket.__new__": (errno.EMFILE,),
    "socket.bind": _FILE,
    "socket.connect": (errno.EAGAIN,),
    "socket.sethostname": (),
    "fcntl.ioctl": (),
    "os.kill": (),
    "os.killpg": (),
    "sqlite3.connect": (errno.EMFILE,),
    "criserver.commit": _FILE,
    "criserver.mount": (errno.ENOSPC, errno.ENOMEM),
    "criserver.move_mount": (errno.ENOSPC, errno.ENOMEM),
    "criserver.mount_setattr": (errno.ENOMEM,),
    "criserver.umount": (errno.ENOMEM,),
    "criserver.unshare": (errno.ENOSPC, errno.ENOMEM),
    "criserver.setns": (errno.ENOMEM,),
    "criserver.send": (errno.EAGAIN, errno.EPIPE),
    "criserver.pidfd_send_signal": (),
    "criserver.plugin_call": (),
}


class Control:
    """The test's side: what the daemon is to do at its points."""

    def __init__(self, path: str) -> None:
        with open(path, "wb") as f:
            f.truncate(_SIZE)
        with open(path, "r+b") as f:
            self._shared = mmap.mmap(f.fileno(), _SIZE)
        self._number = 0
        self._set({"mode": "off"})

    def record(self) -> None:
        """Write each point to the log, with the number of its occurrence since this call."""
        self._set({"mode": "record"})

    def hit(self, point: str, error: int = 0, *, lasting: bool = False) -> None:
        """Fail at ``point`` with this errno; 0 is a SIGKILL. A ``lasting`` error also fails all later points."""
        self._set({"mode": "hit", "point": point, "error": error, "lasting": lasting})

    def harm(self, point: str, fault: str) -> None:
        """At ``point``, have the helper process that is started or told there "killed", "stopped" or "hanging"."""
        self._set({"mode": "hit", "point": point, "fault": fault})

    def off(self) -> None:
        self._set({"mode": "off"})

    def _set(self, order: dict[str, Any]) -> None:
        text = json.dumps(order).encode().ljust(_SIZE - 4, b"\0")
        self._number += 1
        self._shared[4:] = text
        self._shared[:4] = self._number.to_bytes(4, "little")  # last: the daemon reads the text when this changes


class Faults:
    """The daemon's side: the audit hook."""

    def __init__(self, control: str, log: str) -> None:
        with open(control, "r+b") as f:
            self._shared = mmap.mmap(f.fileno(), _SIZE)
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._lock = threading.RLock()
        self._seen = b""
        self._order: dict[str, Any] = {"mode": "off"}
        self._counts = Counter[str]()
        self._helpers = HelperFaults(self._tell)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in EVENTS or (event == "open" and not _writes(args)):
            return
        number = self._shared[:4]
        if number != self._seen:
            with self._lock:
                self._order = json.loads(self._shared[4:].rstrip(b"\0"))
                self._counts.clear()
                self._seen = number
        if self._order["mode"] != "off":
            self._reached(event, args)

    def _reached(self, event: str, args: tuple[Any, ...]) -> None:
        # One function calls the plugins of the node (NRI), with the name of the method.
        place = f"nri:{args[0]}:" if event == "criserver.plugin_call" else _place()
        if not place:
            return
        with self._lock:
            order = self._order
            self._counts[place + event] += 1
            point = f"{place}{event}#{self._counts[place + event]}"
            if order["mode"] == "record":
                self._tell(point)
                return
            if order["mode"] == "hit" and point == order["point"]:
                self._order = {**order, "mode": "lasting" if order.get("lasting") else "off"}
                self._tell(f"hit {point}")
            elif order["mode"] != "lasting" or order["error"] not in EVENTS[event]:
                return
        if fault := order.get("fault"):
            self._helpers.harm(event, args, fault)
        else:
            _fail(event, args, order["error"])

    def _tell(self, line: str) -> None:
        os.write(self._log, f"{line}\n".encode())


def _fail(event: str, args: tuple[Any, ...], error: int) -> None:
    if not error:
        os.kill(os.getpid(), signal.SIGKILL)
    if event == "criserver.commit":
        raise sqlite3.OperationalError(f"{os.strerror(error)} (injected)")
    path = args[0] if args and isinstance(args[0], str | bytes) else None
    raise OSError(error, f"{os.strerror(error)} (injected)", path)


def _writes(args: tuple[Any, ...]) -> bool:
    path, _, flags = args
    return bool(flags & _WRITING) and path not in ("/dev/null", b"/dev/null")


def _place() -> str:
    """The module and the function of ours that are nearest to the side effect; "" where none of ours is."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_OURS):
            return f"{os.path.basename(code.co_filename).removesuffix('.py')}:{code.co_name}:"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def main() -> None:
    control, log, *rest = sys.argv[1:]
    sys.dont_write_bytecode = True
    from criserver.cli import main as criserver  # before the hook: an import is no operation
    from tests.support.hurried import hurry

    rest = hurry(rest)
    sys.addaudithook(Faults(control, log))
    sys.exit(criserver(rest))


if __name__ == "__main__":
    main()
