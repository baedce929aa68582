"""SPDY with any bytes from the peer and any calls; ``check`` is one input."""

from __future__ import annotations

import struct

from criserver.streaming import spdy
from tests.support.spdy_peer import (
    GOAWAY,
    PING,
    RST_STREAM,
    SETTINGS,
    SYN_STREAM,
    WINDOW_UPDATE,
    Peer,
    control,
    data,
    frames,
    words,
)

LIMITS = spdy.SpdyLimits(
    control=9000, headers=2000, pairs=8, settings=4, streams=6, answers=32, text=4000, frame=500, window=60
)
MAX_ID = 0x7FFFFFFF


class Source:
    """The input, read from its front; zeros where it is at its end."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.at = 0

    def __bool__(self) -> bool:
        return self.at < len(self.content)

    def bytes(self, count: int) -> bytes:
        part = self.content[self.at : self.at + count]
        self.at += count
        return part

    def number(self, size: int = 1) -> int:
        return int.from_bytes(self.bytes(size), "big")

    def stream(self) -> int:
        """Mostly a stream that there may be."""
        number = self.number()
        return number % 16 if number < 250 else self.number(4) & MAX_ID


class Session:
    """One connection, all that has gone in and out of it, and what must hold of that."""

    def __init__(self, *, client: bool, announce: bool) -> None:
        self.client = client
        self.connection = spdy.Connection(client=client, limits=LIMITS, announce=announce)
        self.peer = Peer(level=1)
        self.opened = 0
        self.held = 0
        self.received = 0
        self.sent = 0
        self.failed = False
        self.gone: set[int] = set()
        self.take()

    def receive(self, part: bytes) -> None:
        self.received += len(part)
        events = self.connection.receive(part)
        assert not (self.failed and events), "events after the failure"
        for event in events:
            self.check(event)
        self.bounds()

    def check(self, event: spdy.Event) -> None:
        assert not self.failed, "an event after the failure"
        match event:
            case spdy.StreamOpened(stream, headers) | spdy.Replied(stream, headers) | spdy.Headers(stream, headers):
                assert 0 < stream <= MAX_ID
                assert stream not in self.gone
                assert len(headers) <= LIMITS.pairs
                assert all(name and name == name.lower() and "\0" not in value for name, value in headers)
            case spdy.Data(stream, payload, ended):
                assert 0 < stream <= MAX_ID
                assert stream not in self.gone
                assert len(payload) or ended
                self.held += len(payload)
            case spdy.Reset(stream, status, reason):
                assert 0 < stream <= MAX_ID
                assert stream not in self.gone
                assert status or not reason, "a status of ours is never 0"
                self.gone.add(stream)
            case spdy.Refused(stream, status, reason):
                assert 0 < stream <= MAX_ID
                assert status
                assert reason
                self.gone.add(stream)
            case spdy.WindowGrown(stream):
                assert 0 <= stream <= MAX_ID
                assert stream not in self.gone
            case spdy.Pong(number):
                assert number % 2 == self.client
            case spdy.GoneAway(last):
                assert 0 <= last <= MAX_ID
            case spdy.ConnectionFailed(_, reason):
                assert reason
                self.failed = True
            case _:
                raise AssertionError(f"an unknown event: {event}")

    def bounds(self) -> None:
        """What one connection may keep, whatever came."""
        connection = self.connection
        assert connection.held == self.held
        assert len(connection.streams) <= LIMITS.streams + self.opened
        assert len(connection._reader._partial) <= LIMITS.control
        assert len(connection._decoder._text or b"") <= 32 * 1024
        assert len(connection._reset) <= LIMITS.answers + self.opened + LIMITS.streams
        for stream in connection.streams:
            assert connection.state(stream) != (spdy.Half.DONE, spdy.Half.DONE)
            assert stream not in self.gone

    def take(self) -> None:
        output = self.connection.take()
        # Answers are bounded in number, the rest by what came in or was asked for by the caller.
        assert len(output) <= 16 * (LIMITS.answers + LIMITS.streams + self.opened + 8) + self.received // 8 + self.sent
        self.received = self.sent = 0
        for kind, flags, body in frames(output):
            assert flags <= 1
            if kind <= 0:
                assert kind < 0
                assert len(body) <= LIMITS.frame
            elif kind == RST_STREAM:
                stream, status = struct.unpack(">II", body)
                assert stream
                assert status
            elif kind == PING:
                assert len(body) == 4
            elif kind in (GOAWAY, WINDOW_UPDATE):
                assert len(body) == 8
                assert kind == GOAWAY or 0 < struct.unpack(">II", body)[1] <= MAX_ID
            elif kind != SETTINGS:
                text = self.peer.read_block(body[10 if kind == SYN_STREAM else 4 :])
                assert len(text) >= 4

    def act(self, source: Source) -> None:
        """Something that the caller does."""
        connection = self.connection
        what, stream, size = source.number() % 10, source.stream(), source.number()
        end = size % 2 == 1
        self.sent += 2 * size + 100
        headers = [(f"name{number}", "value") for number in range(size % 4)]
        before = connection.streams, connection.held
        try:
            if what == 0:
                connection.open(headers, end=end)
                self.opened += 1
            elif what <= 2:
                connection.reply(stream, headers, end=end)
            elif what == 3:
                connection.headers(stream, headers, end=end)
            elif what == 4:
                connection.send(stream, bytearray(min(size * 8, connection.window(stream) + size % 3)), end=end)
                self.sent += 10 * size
            elif what == 5:
                if stream in connection.streams:
                    self.gone.add(stream)
                connection.reset(stream, 1 + size)
                self.opened += 1  # an RST_STREAM in the output that the peer did not ask for
            elif what == 6:
                connection.ping()
            elif what == 7:
                connection.go_away()
            else:
                count = min(size * 8, self.held + size % 3)
                connection.consumed(stream, count)
                self.held -= count
        except spdy.LocalError:
            assert (connection.streams, connection.held) == before

    def frame(self, source: Source) -> bytes:
        """A frame that is right in its form, but perhaps not at this place; or many of it."""
        what, stream = source.number() % 10, source.stream()
        flags, count = source.number() % 4, source.number()
        match what:
            case 0:
                return data(stream, source.bytes(count) * (1 + flags // 2 * 400), flags)
            case 1:
                return self.peer.syn_stream(stream, [(b"streamtype", source.bytes(count % 16))], flags)
            case 2:
                headers = [
                    (source.bytes(source.number() % 5), source.bytes(source.number() % 9)) for _ in range(count % 12)
                ]
                return self.peer.syn_stream(stream, headers, flags)
            case 3:
                return self.peer.syn_reply(stream, [(b"name", source.bytes(count % 16))], flags)
            case 4:
                return self.peer.headers(stream, flags=flags, text=source.bytes(count) * (1 + flags * 10))
            case 5:
                return words(count % 12, stream, source.number(4))
            case 6:
                entries = [
                    struct.pack(">II", source.number() % 10, source.number(source.number() % 5))
                    for _ in range(count % 6)
                ]
                return control(SETTINGS, struct.pack(">I", len(entries)) + b"".join(entries), flags)
            case 7:
                return words(PING, source.number(4)) * (count % 64)
            case 8:
                return b"".join(data(other, flags=flags) for other in range(stream, stream + count))
            case _:
                return control(count % 16, source.bytes(count), flags)


def check(content: bytes) -> None:
    """One input. Raises AssertionError, or what the protocol raised, if something does not hold."""
    source = Source(content)
    mode = source.number()
    session = Session(client=mode & 1 != 0, announce=mode & 2 != 0)
    while source:
        what = source.number()
        if what < 96:
            session.receive(source.bytes(what))
        elif what < 176:
            session.receive(session.frame(source))
        elif what < 192:
            frame = session.frame(source)
            for byte in frame[:1000]:
                session.receive(bytes([byte]))
            session.receive(frame[1000:])
        elif what < 248:
            session.act(source)
        else:
            session.take()
    session.take()
    session.connection.consumed(0, session.held)
    session.take()
