"""Frames and their form on the wire (ttrpc's PROTOCOL.md, "Message Frame"); no state of streams."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum, IntFlag
from typing import NamedTuple

HEAD = struct.Struct(">IIBB")
"""The length of the data, the stream's ID, the type and the flags."""

MAX_PAYLOAD = 4 << 20
"""The most bytes of data in a frame."""

MAX_STREAM = 0xFFFFFFFF
_RESERVED = 1 << 24  # the first byte of a frame is reserved: it is zero


class MessageType(IntEnum):
    """The types of frames. A frame of another type is ignored, for later versions of the protocol."""

    REQUEST = 1
    RESPONSE = 2
    DATA = 3


class MessageFlag(IntFlag):
    """The flags of REQUEST and DATA."""

    REMOTE_CLOSED = 1  # the sender sends no more data on the stream
    REMOTE_OPEN = 2  # data follows the request
    NO_DATA = 4  # the frame is no message; without it, a frame of zero bytes is an empty message


class MessageFrame(NamedTuple):
    """A whole frame of a known type. ``data`` is None if the frame was larger than MAX_PAYLOAD, and was skipped."""

    kind: int
    stream: int
    flags: int
    size: int
    data: bytes | None


class MessageFault(Exception):  # noqa: N818 (it becomes an event, and never reaches a caller)
    """The peer broke the protocol, and the connection cannot go on."""


def message_frame(kind: MessageType, stream: int, data: bytes, flags: int = 0) -> bytes:
    """A frame as it is sent."""
    return HEAD.pack(len(data), stream, kind, flags) + data


class MessageReader:
    """Decodes a byte stream into frames. It keeps one frame at most."""

    __slots__ = ("_frame", "_partial", "_skipped")

    def __init__(self) -> None:
        self._partial = bytearray()  # the part of a head, or of a frame's data, that has come
        self._frame: tuple[int, int, int, int] | None = None  # the head of the frame whose data is read
        self._skipped = 0  # bytes of a skipped frame's data that have come

    def read(self, view: memoryview) -> Iterator[MessageFrame]:
        """The frames that ``view`` completes. Raises MessageFault."""
        at, end = 0, len(view)
        while True:
            if self._frame is None:
                piece = view[at : at + HEAD.size - len(self._partial)]
                self._partial += piece
                at += len(piece)
                if len(self._partial) < HEAD.size:
                    return
                self._frame = HEAD.unpack(self._partial)
                self._partial.clear()
                if self._frame[0] >= _RESERVED:
                    raise MessageFault(f"a frame of {self._frame[0]} bytes: its first byte is not zero")
            size, stream, kind, flags = self._frame
            skip = size > MAX_PAYLOAD or kind not in _KNOWN
            piece = view[at : at + size - (self._skipped if skip else len(self._partial))]
            at += len(piece)
            if skip:
                self._skipped += len(piece)
            else:
                self._partial += piece
            if (self._skipped if skip else len(self._partial)) < size:
                return
            data = None if skip else bytes(self._partial)
            self._partial.clear()
            self._frame, self._skipped = None, 0
            if kind in _KNOWN:
                yield MessageFrame(kind, stream, flags, size, data)
            if at == end:
                return


_KNOWN = frozenset(MessageType)
