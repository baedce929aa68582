"""The native protocol of systemd's journal (systemd.io/JOURNAL_NATIVE_PROTOCOL): log records with searchable fields.

Each record is one datagram. A record that is too large for a datagram is sent as a sealed file in memory. Nothing here
waits: a record that the journal does not take at once is dropped. The next record that the journal takes has the number
of dropped records.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

from criserver.telemetry import families

SOCKET = "/run/systemd/journal/socket"

# The prefix of our fields. Other programs use names without a prefix (systemd.journal-fields(7)).
_PREFIX = "CRI_"
_MAX_NAME = 64
# Bytes of a field. A longer one is cut.
_MAX_VALUE = 256 << 10
# Numbers of syslog(3).
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_TOO_LARGE = (errno.EMSGSIZE, errno.ENOBUFS)
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def is_standard_error(stream: str | None) -> bool:
    """Whether standard error is connected to the journal. ``stream`` is $JOURNAL_STREAM (systemd.exec(5))."""
    if not stream:
        return False
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return stream == f"{found.st_dev}:{found.st_ino}"


def field_name(name: str) -> str:
    """The journal's name for a field: capitals, digits and underscores, at most 64 characters."""
    known = "".join(c if c.isascii() and c.isalnum() else "_" for c in name.upper())
    return (_PREFIX + known)[:_MAX_NAME]


def record(event: Mapping[str, Any], dropped: int = 0) -> bytes:
    """The record of an event of structlog. All values but "event" and "level" become fields.

    The message has the values too, because ``journalctl`` without options shows only the message.
    """
    told = {name: value for name, value in event.items() if name not in ("event", "level", "exception")}
    if dropped:
        told["dropped"] = dropped
    words = [str(event.get("event", "")), *(f"{name}={_text(value)}" for name, value in told.items())]
    message = " ".join(words)
    if "exception" in event:
        message += f"\n{event['exception']}"
    fields = {
        "MESSAGE": message,
        "PRIORITY": str(_PRIORITIES.get(str(event.get("level")), 6)),
        "SYSLOG_IDENTIFIER": "criserver",
        **{field_name(name): _text(value) for name, value in told.items()},
    }
    return b"".join(_field(name, value) for name, value in fields.items())


def _text(value: Any) -> str:
    if isinstance(value, list | tuple | set | frozenset):
        return ",".join(map(str, value))
    return str(value)


def _field(name: str, value: str) -> bytes:
    data = value.encode(errors="replace")[:_MAX_VALUE]
    if b"\n" not in data:
        return b"%s=%s\n" % (name.encode(), data)
    return b"%s\n%s%s\n" % (name.encode(), len(data).to_bytes(8, "little"), data)


class Journal:
    """A structlog logger that takes events instead of lines: see :func:`render`."""

    def __init__(self, path: str = SOCKET) -> None:
        """``path`` is the journal's socket. It need not exist yet."""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._dropped = 0

    def write(self, event: Mapping[str, Any]) -> None:
        """Send the record of an event, or drop it."""
        data = record(event, self._dropped)
        try:
            self._send(data)
        except OSError:
            self._dropped += 1
            families.LOG_DROPPED.add(1)
        else:
            self._dropped = 0

    debug = info = warning = warn = error = critical = exception = msg = write

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendto(data, self._path)
        except OSError as e:
            if e.errno not in _TOO_LARGE:
                raise
            fd = os.memfd_create("journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.write(fd, data)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
                # Not socket.send_fds: it ignores the address that it is given.
                passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))]
                self._socket.sendmsg([], passed, 0, self._path)
            finally:
                os.close(fd)


def render(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> tuple[tuple[MutableMapping[str, Any]], dict[str, Any]]:
    """The last processor of structlog. It passes the event to the logger unchanged."""
    return (event,), {}
