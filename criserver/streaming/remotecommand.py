"""Exec and attach: streams and channels, the versions of the protocol, statuses and terminal sizes; no I/O.

Over SPDY each stream of a command is a stream of the connection, named by its header ``streamType``. Over WebSocket it
is a channel with a number. The versions of the protocol differ in two things that matter to a server:

1. Version 3 and later send sizes of the terminal. Over WebSocket all versions do.
2. The error stream tells how the command ended. Version 4 and later send a v1.Status in JSON with the exit code. Older
   versions send a text, and nothing for a success.

The client ends stdin by half-closing the stream over SPDY. Over WebSocket only version 5 can tell the end of stdin.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from criserver.errors import InvalidArgumentError

STREAM_TYPE = "streamtype"
"""The header with a stream's type, in lower case as SPDY sends it."""

_MAX_RESIZE = 1024
_SPACE = b" \t\r\n"
# A size is an object without objects in it.
_RESIZES = re.compile(rb"(?:[ \t\r\n]*\{[^{}]*\})*")
_RESIZE = re.compile(rb"\{[^{}]*\}")


class StreamType(enum.IntEnum):
    """A stream of a command; the value is its channel over WebSocket."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    ERROR = 3
    RESIZE = 4

    @property
    def header(self) -> str:
        """The value of the header ``streamType`` over SPDY."""
        return self.name.lower()


_TYPES = {stream_type.header: stream_type for stream_type in StreamType}


@dataclass(frozen=True, slots=True)
class ProtocolFeatures:
    """The features of a version: sizes of the terminal (``resize``), the end as a v1.Status (``status``)."""

    resize: bool
    status: bool


# In the order in which the refusal lists them to a client that supports none. Version 5 is for WebSocket alone, as in
# Kubernetes.
SPDY_PROTOCOLS: Mapping[str, ProtocolFeatures] = {
    "v4.channel.k8s.io": ProtocolFeatures(resize=True, status=True),
    "v3.channel.k8s.io": ProtocolFeatures(resize=True, status=False),
    "v2.channel.k8s.io": ProtocolFeatures(resize=False, status=False),
    "channel.k8s.io": ProtocolFeatures(resize=False, status=False),
}
# "" is for a client that offers no protocol. WebSocket never had versions 2 and 3, and always has a channel for sizes.
WEBSOCKET_PROTOCOLS: Mapping[str, ProtocolFeatures] = {
    "v5.channel.k8s.io": ProtocolFeatures(resize=True, status=True),
    "v4.channel.k8s.io": ProtocolFeatures(resize=True, status=True),
    "v4.base64.channel.k8s.io": ProtocolFeatures(resize=True, status=True),
    "channel.k8s.io": ProtocolFeatures(resize=True, status=False),
    "base64.channel.k8s.io": ProtocolFeatures(resize=True, status=False),
    "": ProtocolFeatures(resize=True, status=False),
}


@dataclass(frozen=True, slots=True)
class RequestedStreams:
    """The streams that a request of exec or attach asks for."""

    stdin: bool
    stdout: bool
    stderr: bool
    tty: bool

    def spdy_streams(self, features: ProtocolFeatures) -> frozenset[StreamType]:
        """The streams that the client opens. The command waits for all of them."""
        resize = {StreamType.RESIZE} if self.tty and features.resize else set()
        return frozenset({StreamType.ERROR, *self._outputs(), *self._inputs(), *resize})

    def websocket_channels(self) -> tuple[frozenset[StreamType], frozenset[StreamType]]:
        """The channels that the client may write to, and those that the server writes to."""
        # Without a terminal, nothing reads the sizes. Their channel would keep its bytes, and hold back the connection.
        resize = {StreamType.RESIZE} if self.tty else set()
        return frozenset({*self._inputs(), *resize}), frozenset({*self._outputs(), StreamType.ERROR})

    def greeting_channel(self) -> StreamType:
        """The channel that gets an empty first message: it tells a WebSocket client that the command is connected."""
        return min(self.websocket_channels()[1])

    def _inputs(self) -> set[StreamType]:
        return {StreamType.STDIN} if self.stdin else set()

    def _outputs(self) -> set[StreamType]:
        return {
            stream for stream, asked in ((StreamType.STDOUT, self.stdout), (StreamType.STDERR, self.stderr)) if asked
        }


def negotiate(offered: Iterable[str], accepted: Collection[str]) -> str | None:
    """The protocol to use: the first of the client's that is accepted, as in Kubernetes; None where none is.

    A client that offers none gets "", where that is accepted.
    """
    return next((protocol for protocol in tuple(offered) or ("",) if protocol in accepted), None)


def stream_type(headers: Iterable[tuple[str, str]]) -> StreamType:
    """The type of a SPDY stream by its headers, names in lower case. Raises InvalidArgumentError."""
    header = next((value for name, value in headers if name == STREAM_TYPE), "")
    if not header:
        raise InvalidArgumentError("a stream came without the header streamType; update the client")
    try:
        return _TYPES[header]
    except KeyError:
        known = ", ".join(_TYPES)
        raise InvalidArgumentError(f"streamType {header[:100]!r} is none of {known}; update the client") from None


def exit_message(code: int, features: ProtocolFeatures) -> bytes:
    """The error stream's message for a command that has ended with ``code``; b"" for no message."""
    if not code:
        return _document({"status": "Success"}) if features.status else b""
    text = f"command terminated with non-zero exit code: {code}"
    if not features.status:
        return text.encode()
    causes = [{"reason": "ExitCode", "message": str(code)}]
    return _document({"status": "Failure", "message": text, "reason": "NonZeroExitCode", "details": {"causes": causes}})


def failure_message(text: str, features: ProtocolFeatures) -> bytes:
    """The error stream's message for a command that could not be run, or whose end is not known."""
    text = f"Internal error occurred: {text}"
    if not features.status:
        return text.encode(errors="replace")
    return _document({"status": "Failure", "message": text, "reason": "InternalError", "code": 500})


def _document(status: Mapping[str, object]) -> bytes:
    return json.dumps(status, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class TerminalSize:
    """A terminal's size in characters."""

    width: int
    height: int


class ResizeDecoder:
    """The decoder of a stream of terminal sizes: JSON objects one after the other, with or without space between.

    The keys are "Width" and "Height" in any case. A missing one is 0, other keys are ignored. Anything but such an
    object ends the stream, as in Kubernetes: the bytes behind it cannot be trusted.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the stream has ended, because there was something else than sizes in it."""
        return self._ended

    def feed(self, data: bytes) -> TerminalSize | None:
        """The last of the sizes that ``data`` completes, or None. Never raises."""
        if self._ended:
            return None
        data = self._rest + data
        match = _RESIZES.match(data)
        assert match is not None
        size = None
        for text in _RESIZE.findall(data, 0, match.end()):
            parsed = _size(text)
            if parsed is None:
                self._end()
                return size
            size = parsed
        self._rest = data[match.end() :].lstrip(_SPACE)
        if self._rest and (not self._rest.startswith(b"{") or b"{" in self._rest[1:] or len(self._rest) > _MAX_RESIZE):
            self._end()
        return size

    def _end(self) -> None:
        self._ended, self._rest = True, b""


def _size(text: bytes) -> TerminalSize | None:
    if len(text) > _MAX_RESIZE:
        return None
    try:
        fields = {name.lower(): value for name, value in json.loads(text.decode()).items()}
    except (ValueError, RecursionError):
        return None
    size = TerminalSize(fields.get("width", 0), fields.get("height", 0))
    valid = all(type(value) is int and 0 <= value < 1 << 16 for value in (size.width, size.height))
    return size if valid else None
