"""The bytes of containerd's shim API: protobuf's encoding and ttrpc's frames, as far as one client needs them.

Sources: protobuf.dev/programming-guides/encoding, and the protocol page of containerd/ttrpc. A frame is a header of ten
bytes (length, stream, type, flags; big-endian) and a message. A shim imports no package, so this is by hand.
"""

from __future__ import annotations

from .shim_config import RequestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    Fields = dict[int, list["int | bytes"]]
    """The fields of a message by their numbers: numbers are int, and everything else is bytes."""

REQUEST = 1
RESPONSE = 2
HEADER = 10
MAX_MESSAGE = 4 << 20
"""Bytes of a message; ttrpc refuses larger ones."""

_MAX_CODE = (1 << 31) - 1
_MAX_TIME = (1 << 63) - 1

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def number(field: int, value: int) -> bytes:
    """A field of an integer or a truth value. The default value, 0, is left out."""
    return _varint(field << 3 | _VARINT) + _varint(value) if value else b""


def data(field: int, value: str | bytes) -> bytes:
    """A field of a text, of bytes or of a message. An empty one is left out."""
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogateescape")
    return _varint(field << 3 | _BYTES) + _varint(len(value)) + value if value else b""


def any_of(field: int, url: str, value: bytes) -> bytes:
    """A field of type google.protobuf.Any. It is left out without a type."""
    return data(field, data(1, url) + data(2, value)) if url else b""


def fields(message: bytes) -> Fields:
    """Take a message apart. Raises RequestError for bytes that are none."""
    found: Fields = {}
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        kind = key & 7
        value: int | bytes
        if kind == _VARINT:
            value, at = _read_varint(message, at)
        else:
            if kind == _BYTES:
                size, at = _read_varint(message, at)
            elif kind in (_FIXED64, _FIXED32):
                size = 8 if kind == _FIXED64 else 4
            else:
                raise RequestError(f"a message of the shim has a field of the unknown type {kind}")
            value, at = message[at : at + size], at + size
            if at > len(message):
                raise RequestError("a message of the shim is cut off")
        found.setdefault(key >> 3, []).append(value)
    return found


def integer(message: Fields, field: int) -> int:
    """An integer of a message; 0 where it is left out or is something else."""
    value = message.get(field, [0])[-1]
    return value if isinstance(value, int) else 0


def content(message: Fields, field: int) -> bytes:
    """The bytes of a text, of bytes or of a message; empty where they are left out or are something else."""
    value = message.get(field, [b""])[-1]
    return value if isinstance(value, bytes) else b""


def exit_of(reply: bytes) -> tuple[int, int]:
    """The exit code in a reply to Wait, and the time in nanoseconds, 0 for one that CRI has no room for.

    Raises RequestError for a reply that is no message, and for a code that CRI has no room for.
    """
    found = fields(reply)
    at = fields(content(found, 2))
    code, time = integer(found, 1), integer(at, 1) * 10**9 + integer(at, 2)
    if code > _MAX_CODE:
        raise RequestError(f"the runtime's shim tells of the exit code {code}")
    return code, time if time <= _MAX_TIME else 0


def frame(stream: int, kind: int, message: bytes) -> bytes:
    """One frame."""
    return len(message).to_bytes(4, "big") + stream.to_bytes(4, "big") + bytes((kind, 0)) + message


class TaskFrames:
    """Decoder of a byte stream into frames: stream, type and message of each."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, block: bytes) -> list[tuple[int, int, bytes]]:
        """The frames that are complete with this block. Raises RequestError for one that is too large."""
        self._buffer += block
        found = []
        while len(self._buffer) >= HEADER:
            size = int.from_bytes(self._buffer[:4], "big")
            if size > MAX_MESSAGE:
                raise RequestError(f"a message of the shim has {size} bytes; {MAX_MESSAGE} are the most")
            if len(self._buffer) < HEADER + size:
                break
            message = bytes(self._buffer[HEADER : HEADER + size])
            found.append((int.from_bytes(self._buffer[4:8], "big"), self._buffer[8], message))
            del self._buffer[: HEADER + size]
        return found


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise RequestError("a message of the shim is cut off")
