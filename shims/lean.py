"""JSON, sockets and signals for shims, by the C halves of the standard library's modules alone.

The Python halves (json, socket, signal) import enum and re. Measured with ten shims, that costs 0.3 MiB in each shim,
for functions that a shim does not use. This module alone uses names that the standard library does not document.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # typeshed has no stub for it
from _json import encode_basestring_ascii, make_encoder, make_scanner
from _socket import (
    AF_UNIX,
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    MSG_CTRUNC,
    SCM_RIGHTS,
    SOCK_STREAM,
    SOL_SOCKET,
)
from _socket import socket as Socket  # noqa: N812 - it is a class
from _socket import socketpair as socket_pair

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

SIGKILL: int = _signal.SIGKILL
SIGSTOP: int = _signal.SIGSTOP
SIGCHLD: int = _signal.SIGCHLD
ENDING_SIGNALS: tuple[int, ...] = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP)

__all__ = [
    "AF_UNIX",
    "CMSG_SPACE",
    "ENDING_SIGNALS",
    "MSG_CMSG_CLOEXEC",
    "MSG_CTRUNC",
    "SCM_RIGHTS",
    "SIGCHLD",
    "SIGKILL",
    "SIGSTOP",
    "SOCK_STREAM",
    "SOL_SOCKET",
    "Socket",
    "accept",
    "dumps",
    "ignore_signal",
    "loads",
    "on_signal",
    "signal_pidfd",
    "socket_pair",
    "wake_by_signals",
]


class _Rules:
    """How the scanner reads JSON: as json.loads does by default."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float
    memo: dict[str, str] = {}  # noqa: RUF012 - the scanner's own, empty between its runs


def _refuse(value: object) -> NoReturn:
    raise TypeError(f"{type(value).__name__} has no form in JSON")


_scan: Callable[[str, int], tuple[Any, int]] = make_scanner(_Rules)  # type: ignore[arg-type]
_encode: Callable[[object, int], tuple[str, ...]] = make_encoder(
    None, _refuse, encode_basestring_ascii, None, ":", ",", False, False, True
)


def loads(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, or RecursionError if it is nested too deep."""
    text = text.strip(" \t\r\n")
    try:
        value, end = _scan(text, 0)
    except StopIteration as place:
        raise ValueError(f"no JSON value at character {place.value}") from None
    except SystemError:  # the scanner at the end of a text that is cut off
        raise ValueError("the JSON value is cut off") from None
    if end != len(text):
        raise ValueError(f"text after the JSON value, at character {end}")
    return value


def dumps(value: object) -> str:
    """The JSON text of a value, in ASCII and without spaces."""
    return "".join(_encode(value, 0))


def accept(listener: Socket) -> Socket:
    """The next connection of a listening socket. Raises OSError."""
    fd, _ = listener._accept()  # type: ignore[attr-defined]  # the stub has it in the Python half
    return Socket(fileno=fd)


def on_signal(number: int, handler: Callable[[int, Any], None]) -> None:
    """Have `handler` called for a signal."""
    _signal.signal(number, handler)


def signal_pidfd(pidfd: int, number: int) -> None:
    """Signal the process of a descriptor. Raises ProcessLookupError where it has ended."""
    _signal.pidfd_send_signal(pidfd, number)


def ignore_signal(number: int) -> None:
    """Ignore a signal."""
    _signal.signal(number, _signal.SIG_IGN)


def wake_by_signals(fd: int) -> None:
    """Have a byte written into the pipe `fd` for each signal that has a handler."""
    _signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
