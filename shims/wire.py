"""The protocol between the daemon, the nursery and the shims: what all of them must agree on.

A frame is a length (4 bytes, big-endian) and that many bytes of a JSON object in UTF-8 (its keys: `shims.messages`).
File descriptors go as SCM_RIGHTS with the first byte of the frame; the key "fds" of the object says how many. `Frames`
does no I/O; `Channel` uses it on a unix stream socket.
"""

from __future__ import annotations

import os
import struct

from .lean import (
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    MSG_CTRUNC,
    SCM_RIGHTS,
    SOL_SOCKET,
    Socket,
    dumps,
    loads,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    Message = dict[str, Any]
    """A message as it was received. Its keys are not checked yet."""

# 2: a shim tells when the process of an exec runs. Receivers refuse no version.
VERSION = 2
MAX_FRAME = 1 << 20
MAX_FDS = 8

_ANCILLARY_SPACE = CMSG_SPACE(MAX_FDS * 4)
_READ_SIZE = 1 << 16


class ProtocolError(Exception):
    """The peer did not send a frame. Close the connection: where the next frame begins is unknown."""


def encode(message: Mapping[str, object]) -> bytes:
    """One frame. Raises ProtocolError if the message is larger than a frame may be."""
    body = dumps(message).encode()
    if len(body) > MAX_FRAME:
        raise ProtocolError(f"a message of {len(body)} bytes is larger than a frame ({MAX_FRAME} bytes)")
    return len(body).to_bytes(4, "big") + body


class Frames:
    """Decoder of a byte stream into messages."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes, in order.

        Raises ProtocolError, then and on every later call, for a length over MAX_FRAME and for a body that
        is not a JSON object.
        """
        buffer = self._buffer
        buffer += data
        messages = []
        while len(buffer) >= 4:
            size = int.from_bytes(buffer[:4], "big")
            if size > MAX_FRAME:
                raise ProtocolError(f"a frame of {size} bytes is larger than {MAX_FRAME} bytes")
            if len(buffer) < 4 + size:
                break
            messages.append(_decode(buffer[4 : 4 + size]))
            del buffer[: 4 + size]
        return messages


def _decode(body: bytearray) -> Message:
    try:
        message = loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a frame's body is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise ProtocolError("a frame's body is not a JSON object")
    return message


def receive_once(sock: Socket) -> tuple[bytes, list[int]]:
    """Read once: bytes, empty at the stream's end, and the descriptors that came with them.

    Raises OSError, and ProtocolError if more descriptors came than a frame may bring.
    """
    data, ancillary, flags, _ = sock.recvmsg(_READ_SIZE, _ANCILLARY_SPACE, MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == SOL_SOCKET and kind == SCM_RIGHTS:
            count = len(payload) // 4
            fds += struct.unpack(f"{count}i", payload[: count * 4])
    if flags & MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        raise ProtocolError(f"more than {MAX_FDS} file descriptors came with one frame")
    return data, fds


class Channel:
    """Messages with file descriptors over a connected unix stream socket, blocking or not."""

    __slots__ = ("_fds", "_frames", "sock")

    def __init__(self, sock: Socket) -> None:
        self.sock = sock
        self._frames = Frames()
        self._fds: list[int] = []

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
        """Send one frame; the descriptors stay open here.

        Raises OSError; BlockingIOError if a non-blocking socket does not take the whole frame at once. Then the peer
        does not read, half a frame is sent, and the connection is of no further use.
        """
        if fds:
            rights = [(SOL_SOCKET, SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
            data = encode({**message, "fds": len(fds)})
            sent = self.sock.sendmsg([data], rights)
        else:
            data = encode(message)
            sent = self.sock.send(data)
        if sent < len(data):
            if not self.sock.getblocking():
                raise BlockingIOError("the peer does not read its messages")
            self.sock.sendall(data[sent:])

    def receive(self) -> list[tuple[Message, list[int]]]:
        """Read once and return the messages completed, each with its descriptors, which the caller owns.

        Raises EOFError when the peer has closed, ProtocolError for anything that is not the protocol, and
        OSError (BlockingIOError on a non-blocking socket with nothing to read).
        """
        data, fds = receive_once(self.sock)
        self._fds += fds
        if not data:
            raise EOFError("the peer has closed the connection")
        return [(message, self._take(message)) for message in self._frames.feed(data)]

    def _take(self, message: Message) -> list[int]:
        count = message.get("fds", 0)
        if not isinstance(count, int) or not 0 <= count <= len(self._fds):
            raise ProtocolError(f"a frame claims {count!r} file descriptors, {len(self._fds)} have come")
        taken, self._fds = self._fds[:count], self._fds[count:]
        return taken

    def close(self) -> None:
        """Close the socket and the descriptors that no message has claimed."""
        self.sock.close()
        for fd in self._fds:
            os.close(fd)
        self._fds = []
