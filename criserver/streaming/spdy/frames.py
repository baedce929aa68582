"""Frames and their form on the wire (SPDY Protocol Draft 3.1, sections 2.2 and 2.6); no state of streams."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import NamedTuple

VERSION = 3  # SPDY/3.1 has the number of SPDY/3 in its frames
MAX_ID = MAX_WINDOW = 0x7FFFFFFF
MAX_SIZE = 0xFFFFFF
DEFAULT_WINDOW = 64 * 1024
FIN = 0x01
UNIDIRECTIONAL = 0x02
CONTROL = 0x80000000

HEAD = struct.Struct(">II")
"""A frame's first eight bytes: control bit, version and type, or a stream ID; then flags (8 bits) and length (24)."""


class Type(IntEnum):
    """The control frames."""

    SYN_STREAM = 1
    SYN_REPLY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    HEADERS = 8
    WINDOW_UPDATE = 9


class Status(IntEnum):
    """Why a stream was reset (section 2.6.3)."""

    PROTOCOL_ERROR = 1
    INVALID_STREAM = 2
    REFUSED_STREAM = 3
    UNSUPPORTED_VERSION = 4
    CANCEL = 5
    INTERNAL_ERROR = 6
    FLOW_CONTROL_ERROR = 7
    STREAM_IN_USE = 8
    STREAM_ALREADY_CLOSED = 9
    FRAME_TOO_LARGE = 11


class GoAwayStatus(IntEnum):
    """Why a connection goes away (section 2.6.6; the last one is from section 2.6.8)."""

    OK = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 7


class Setting(IntEnum):
    """The settings that this side uses; the others are hints for browsers."""

    MAX_CONCURRENT_STREAMS = 4
    INITIAL_WINDOW_SIZE = 7


class LocalError(Exception):
    """The protocol does not allow the call; nothing was sent."""


class Fault(Exception):  # noqa: N818 (it becomes a frame and an event, and never reaches a caller)
    """The peer broke the protocol. It gets ``status``; ``reason`` is for the event."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class ConnectionFault(Fault):
    """A fault after which the connection cannot be read any more; ``status`` is a GoAwayStatus."""


class StreamFault(Fault):
    """A fault of one stream; ``status`` is a Status."""


def data_head(stream: int, size: int, *, end: bool) -> bytes:
    """The head of a DATA frame; ``size`` bytes of payload follow it."""
    return HEAD.pack(stream, FIN << 24 | size if end else size)


def control(kind: Type, body: bytes, flags: int = 0) -> bytes:
    """A whole control frame."""
    return HEAD.pack(CONTROL | VERSION << 16 | kind, flags << 24 | len(body)) + body


def two_words(kind: Type, first: int, second: int) -> bytes:
    """RST_STREAM (stream, status), GOAWAY (last stream, status) or WINDOW_UPDATE (stream, delta)."""
    return control(kind, HEAD.pack(first, second))


def settings(values: dict[Setting, int]) -> bytes:
    """A SETTINGS frame; the lowest ID is first, as section 2.6.4 requires."""
    entries = b"".join(HEAD.pack(key, value) for key, value in sorted(values.items()))
    return control(Type.SETTINGS, len(values).to_bytes(4, "big") + entries)


def parse_settings(body: bytes, limit: int) -> dict[int, int]:
    """The values by ID. For an ID that comes twice, the first value counts. Raises ConnectionFault."""
    count = int.from_bytes(body[:4], "big")
    if len(body) != 4 + 8 * count:
        raise ConnectionFault(
            GoAwayStatus.PROTOCOL_ERROR, f"a SETTINGS frame of {len(body)} bytes claims {count} entries of 8 bytes"
        )
    if count > limit:
        raise ConnectionFault(GoAwayStatus.PROTOCOL_ERROR, f"{count} settings in one frame, more than {limit}")
    values: dict[int, int] = {}
    for flags_and_key, value in HEAD.iter_unpack(body[4:]):
        values.setdefault(flags_and_key & 0xFFFFFF, value)
    return values


# The least and the most bytes of a control frame's body; None is the limit of the reader.
_SIZES: Mapping[int, tuple[int, int | None]] = {
    Type.SYN_STREAM: (10, None),
    Type.SYN_REPLY: (4, None),
    Type.RST_STREAM: (8, 8),
    Type.SETTINGS: (4, None),
    Type.PING: (4, 4),
    Type.GOAWAY: (8, 8),
    Type.HEADERS: (4, None),
    Type.WINDOW_UPDATE: (8, 8),
}

_DATA = -1  # no type of a control frame has this value


class Control(NamedTuple):
    """A whole control frame of a known type, with a body of a valid length."""

    kind: int
    flags: int
    body: bytes


class Payload(NamedTuple):
    """A piece of a DATA frame. ``begins``: it is the first of its frame. ``ended``: it is the last of a stream.

    The first may be empty, because the head of a frame may come before its payload.
    """

    stream: int
    data: memoryview
    begins: bool
    ended: bool


class FrameReader:
    """Decodes a byte stream into control frames and pieces of DATA frames. Pieces are passed on as they come."""

    __slots__ = ("_flags", "_kind", "_left", "_limit", "_partial", "_stream")

    def __init__(self, limit: int) -> None:
        """``limit`` is the most bytes of a control frame's body."""
        self._limit = limit
        self._partial = bytearray()  # the part that has come of a head, or of a control frame's body
        self._kind = _DATA
        self._flags = 0
        self._stream = 0
        self._left = 0  # bytes of the frame's body that have not come yet

    def read(self, view: memoryview) -> Iterator[Control | Payload]:
        """The frames and pieces that ``view`` has or completes. Raises ConnectionFault.

        Control frames of unknown types are skipped (section 2.2.1), whatever their size.
        """
        partial = self._partial
        at, end = 0, len(view)
        while at < end:
            begins = not self._left
            if begins:
                if not partial and end - at >= 8:
                    first, second = HEAD.unpack_from(view, at)
                    at += 8
                else:
                    piece = view[at : at + 8 - len(partial)]
                    partial += piece
                    at += len(piece)
                    if len(partial) < 8:
                        return
                    first, second = HEAD.unpack(partial)
                    partial.clear()
                self._begin(first, second)
            piece = view[at : at + self._left]
            at += len(piece)
            self._left -= len(piece)
            if self._kind == _DATA:
                ended = not self._left and self._flags & FIN != 0
                yield Payload(self._stream, piece, begins, ended)
            elif self._kind not in _SIZES:
                continue
            elif self._left:
                partial += piece
            else:
                body = bytes(partial + piece)
                partial.clear()
                yield Control(self._kind, self._flags, body)

    def _begin(self, first: int, second: int) -> None:
        self._flags, self._left = second >> 24, second & MAX_SIZE
        if first < CONTROL:
            self._kind, self._stream = _DATA, first
            return
        version, self._kind = first >> 16 & 0x7FFF, first & 0xFFFF
        if version != VERSION:
            raise ConnectionFault(GoAwayStatus.PROTOCOL_ERROR, f"a control frame of version {version}, not {VERSION}")
        least, most = _SIZES.get(self._kind, (0, MAX_SIZE))
        if not least <= self._left <= (self._limit if most is None else most):
            raise ConnectionFault(
                GoAwayStatus.PROTOCOL_ERROR, f"a {Type(self._kind).name} frame with a body of {self._left} bytes"
            )
