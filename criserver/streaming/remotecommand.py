"""Exec and attach: streams and channels, the versions of their protocol, statuses and terminal sizes; no I/O.

Over SPDY each stream of a command is a stream of the connection, which its header ``streamType`` names; over WebSocket
it is a channel with a number. The versions of the protocol differ in two things that matter to a server:

- Sizes of the terminal come from version 3 on; over WebSocket always.
- The error stream tells how the command ended: from version 4 on by a v1.Status in JSON, with the exit code; before
  that by a text, and by nothing where all went well.

That a client writes no more to stdin is a half-closed stream over SPDY. WebSocket has a sign for it in version 5 alone.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from criserver.errors import InvalidArgumentError

STREAM_TYPE = "streamtype"
"""The header that names a stream's type, as it is on the wire of SPDY."""

_MAX_RESIZE = 1024
_SPACE = b" \t\r\n"
# A size is an object without objects in it.
_RESIZES = re.compile(rb"(?:[ \t\r\n]*\{[^{}]*\})*")
_RESIZE = re.compile(rb"\{[^{}]*\}")


class Stream(enum.IntEnum):
    """A stream of a command; the value is its channel over WebSocket."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    ERROR = 3
    RESIZE = 4

    @property
    def type(self) -> str:
        """What ``streamType`` calls it over SPDY."""
        return self.name.lower()


_TYPES = {stream.type: stream for stream in Stream}


@dataclass(frozen=True, slots=True)
class Features:
    """What a version of the protocol has: sizes of the terminal, and the end told as a v1.Status."""

    resize: bool
    status: bool


# In the order in which a client that supports none of them is told. Kubernetes gives version 5 to WebSocket alone.
SPDY_PROTOCOLS: Mapping[str, Features] = {
    "v4.channel.k8s.io": Features(resize=True, status=True),
    "v3.channel.k8s.io": Features(resize=True, status=False),
    "v2.channel.k8s.io": Features(resize=False, status=False),
    "channel.k8s.io": Features(resize=False, status=False),
}
# "" is for a client that offers nothing. Versions 2 and 3 were never spoken here, and a channel for sizes always is.
WEBSOCKET_PROTOCOLS: Mapping[str, Features] = {
    "v5.channel.k8s.io": Features(resize=True, status=True),
    "v4.channel.k8s.io": Features(resize=True, status=True),
    "v4.base64.channel.k8s.io": Features(resize=True, status=True),
    "channel.k8s.io": Features(resize=True, status=False),
    "base64.channel.k8s.io": Features(resize=True, status=False),
    "": Features(resize=True, status=False),
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """The streams that a request of exec or attach asks for."""

    stdin: bool
    stdout: bool
    stderr: bool
    tty: bool

    def spdy_streams(self, features: Features) -> frozenset[Stream]:
        """The streams that the client opens; the command waits for them all."""
        resize = {Stream.RESIZE} if self.tty and features.resize else set()
        return frozenset({Stream.ERROR, *self._outputs(), *self._inputs(), *resize})

    def websocket_channels(self) -> tuple[frozenset[Stream], frozenset[Stream]]:
        """The channels that the client may write to, and those that we write to."""
        # Sizes for no terminal are dropped: they would be kept, and nothing behind them read, as nobody takes them.
        resize = {Stream.RESIZE} if self.tty else set()
        return frozenset({*self._inputs(), *resize}), frozenset({*self._outputs(), Stream.ERROR})

    def greeting_channel(self) -> Stream:
        """The channel whose first message is empty: it tells a client of WebSocket that the command is connected."""
        return min(self.websocket_channels()[1])

    def _inputs(self) -> set[Stream]:
        return {Stream.STDIN} if self.stdin else set()

    def _outputs(self) -> set[Stream]:
        return {stream for stream, asked in ((Stream.STDOUT, self.stdout), (Stream.STDERR, self.stderr)) if asked}


def negotiate(offered: Iterable[str], accepted: Collection[str]) -> str | None:
    """The protocol to speak: the first of the client's that is accepted, as Kubernetes does it; None for none.

    A client that offers nothing gets "", where that is accepted.
    """
    return next((protocol for protocol in tuple(offered) or ("",) if protocol in accepted), None)


def stream_of(headers: Iterable[tuple[str, str]]) -> Stream:
    """The stream that the headers of a SPDY stream announce, names in lower case. Raises InvalidArgumentError."""
    kind = next((value for name, value in headers if name == STREAM_TYPE), "")
    if not kind:
        raise InvalidArgumentError("a stream came without the header streamType; update the client")
    try:
        return _TYPES[kind]
    except KeyError:
        known = ", ".join(_TYPES)
        raise InvalidArgumentError(f"streamType {kind[:100]!r} is none of {known}; update the client") from None


def exit_message(code: int, features: Features) -> bytes:
    """What the error stream says of a command that has ended with ``code``; b"" for nothing."""
    if not code:
        return _document({"status": "Success"}) if features.status else b""
    text = f"command terminated with non-zero exit code: {code}"
    if not features.status:
        return text.encode()
    causes = [{"reason": "ExitCode", "message": str(code)}]
    return _document({"status": "Failure", "message": text, "reason": "NonZeroExitCode", "details": {"causes": causes}})


def failure_message(text: str, features: Features) -> bytes:
    """What the error stream says where a command could not be run, or its end is not known."""
    text = f"Internal error occurred: {text}"
    if not features.status:
        return text.encode(errors="replace")
    return _document({"status": "Failure", "message": text, "reason": "InternalError", "code": 500})


def _document(status: Mapping[str, object]) -> bytes:
    return json.dumps(status, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Size:
    """A terminal's size in characters."""

    width: int
    height: int


class Resizes:
    """The decoder of a stream of terminal sizes: JSON objects one after the other, with or without space between.

    Names are "Width" and "Height" in whatever case, 0 where one is missing, and others count for nothing. What is no
    such object ends the stream, as it does in Kubernetes: nothing behind it can be trusted.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the stream has had something else than sizes in it."""
        return self._ended

    def feed(self, data: bytes) -> Size | None:
        """The last of the sizes that ``data`` completes, or None. Never raises."""
        if self._ended:
            return None
        data = self._rest + data
        match = _RESIZES.match(data)
        assert match is not None
        size = None
        for text in _RESIZE.findall(data, 0, match.end()):
            found = _size(text)
            if found is None:
                self._end()
                return size
            size = found
        self._rest = data[match.end() :].lstrip(_SPACE)
        if self._rest and (not self._rest.startswith(b"{") or b"{" in self._rest[1:] or len(self._rest) > _MAX_RESIZE):
            self._end()
        return size

    def _end(self) -> None:
        self._ended, self._rest = True, b""


def _size(text: bytes) -> Size | None:
    if len(text) > _MAX_RESIZE:
        return None
    try:
        found = {name.lower(): value for name, value in json.loads(text.decode()).items()}
    except (ValueError, RecursionError):
        return None
    size = Size(found.get("width", 0), found.get("height", 0))
    valid = all(type(value) is int and 0 <= value < 1 << 16 for value in (size.width, size.height))
    return size if valid else None
