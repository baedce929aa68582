"""The other end of a SPDY connection. It shares no code with what is tested."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from itertools import pairwise

from criserver.streaming.spdy import Connection, Data, Event
from criserver.streaming.spdy.headers import DICTIONARY

SYN_STREAM, SYN_REPLY, RST_STREAM, SETTINGS, PING, GOAWAY, HEADERS, WINDOW_UPDATE = 1, 2, 3, 4, 6, 7, 8, 9
FIN, UNIDIRECTIONAL = 1, 2


def control(kind: int, body: bytes, flags: int = 0, version: int = 3) -> bytes:
    return struct.pack(">HHI", 0x8000 | version, kind, flags << 24 | len(body)) + body


def data(stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack(">II", stream, flags << 24 | len(payload)) + payload


def words(kind: int, *numbers: int) -> bytes:
    return control(kind, struct.pack(f">{len(numbers)}I", *numbers))


def block_text(headers: Iterable[tuple[bytes, bytes]], count: int | None = None) -> bytes:
    """A header block before its compression; ``count`` lies about the number of headers."""
    pairs = list(headers)
    text = struct.pack(">I", len(pairs) if count is None else count)
    for name, value in pairs:
        text += struct.pack(">I", len(name)) + name + struct.pack(">I", len(value)) + value
    return text


class Peer:
    """Makes frames whose header blocks share a zlib stream, and reads the frames of the other side."""

    def __init__(self, level: int = 9) -> None:
        self.deflate = zlib.compressobj(level, zdict=DICTIONARY)
        self.inflate = zlib.decompressobj(zdict=DICTIONARY)

    def compress(self, text: bytes) -> bytes:
        return self.deflate.compress(text) + self.deflate.flush(zlib.Z_SYNC_FLUSH)

    def syn_stream(
        self, stream: int, headers: Iterable[tuple[bytes, bytes]] = (), flags: int = 0, text: bytes | None = None
    ) -> bytes:
        block = self.compress(block_text(headers) if text is None else text)
        return control(SYN_STREAM, struct.pack(">IIH", stream, 0, 0) + block, flags)

    def syn_reply(self, stream: int, headers: Iterable[tuple[bytes, bytes]] = (), flags: int = 0) -> bytes:
        return control(SYN_REPLY, struct.pack(">I", stream) + self.compress(block_text(headers)), flags)

    def headers(
        self, stream: int, headers: Iterable[tuple[bytes, bytes]] = (), flags: int = 0, text: bytes | None = None
    ) -> bytes:
        block = self.compress(block_text(headers) if text is None else text)
        return control(HEADERS, struct.pack(">I", stream) + block, flags)

    def read_block(self, block: bytes) -> bytes:
        return self.inflate.decompress(block)


def frames(output: bytes) -> list[tuple[int, int, bytes]]:
    """What a connection has sent: (type, flags, body) of control frames, (-stream, flags, payload) of data."""
    found = []
    while output:
        first, second = struct.unpack_from(">II", output)
        size = second & 0xFFFFFF
        body, output = output[8 : 8 + size], output[8 + size :]
        assert len(body) == size, "a frame ends beyond the output"
        if first >> 31:
            assert first >> 16 == 0x8003, "a control frame that is not of version 3"
            found.append((first & 0xFFFF, second >> 24, body))
        else:
            found.append((-first, second >> 24, body))
    return found


def resets(output: bytes) -> list[tuple[int, int]]:
    """The RST_STREAM frames in an output, as (stream, status)."""
    return [struct.unpack(">II", body) for kind, _, body in frames(output) if kind == RST_STREAM]


def chunks(stream: bytes, cuts: Iterable[int]) -> list[bytes]:
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    return [stream[start:end] for start, end in pairwise(places)]


def whole(events: Iterable[Event]) -> list[Event]:
    """The events with data that came in pieces joined, as no caller may depend on where it was cut."""
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, Data) and isinstance(last, Data) and last.stream == event.stream and not last.ended:
            merged[-1] = Data(event.stream, memoryview(bytes(last.data) + bytes(event.data)), event.ended)
        else:
            merged.append(event)
    return merged


def opened(**kwargs: object) -> tuple[Connection, Peer]:
    """A server with stream 1 open and replied to, its output taken."""
    connection, peer = Connection(**kwargs), Peer()  # type: ignore[arg-type]
    connection.receive(peer.syn_stream(1))
    connection.reply(1)
    connection.take()
    return connection, peer
