"""SPDY/3.1 without I/O: bytes in, events out, and the bytes to send (SPDY Protocol Draft 3.1, section 2).

kubectl (exec, attach, port-forward) and crictl use it after an HTTP upgrade. Their library is moby/spdystream. Where
the specification leaves a choice, this module follows that library:

1. It drops data for a stream that has no SYN_REPLY yet. So ``send`` before ``reply`` is refused here.
2. It reads nothing after a GOAWAY, not even data of open streams. So call ``go_away`` after the last data.
3. It has no flow control: it never sends a WINDOW_UPDATE, and ignores those that it gets. But each one takes a place in
   one of its five bounded queues. Behind a stream that is not read these queues fill up, until all streams stop. So
   flow control begins only when the peer sends a WINDOW_UPDATE, or a SETTINGS with an initial window. Before that, this
   side sends no WINDOW_UPDATE, and no window limits ``send``.

A peer that sends more than its window is not disconnected. The caller limits its own memory: it stops reading the
socket while too many bytes are in memory (``held``), and while the transport's send buffer is full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from criserver.streaming.spdy.connection_events import (
    ConnectionFailed,
    Data,
    Event,
    GoneAway,
    Headers,
    Pong,
    Refused,
    Replied,
    Reset,
    StreamOpened,
    WindowGrown,
)
from criserver.streaming.spdy.flow_control import FlowControl
from criserver.streaming.spdy.frames import (
    FIN,
    HEAD,
    MAX_ID,
    MAX_SIZE,
    MAX_WINDOW,
    UNIDIRECTIONAL,
    ConnectionFault,
    FrameReader,
    GoAwayStatus,
    LocalError,
    Payload,
    Setting,
    Status,
    StreamFault,
    Type,
    control,
    data_head,
    parse_settings,
    two_words,
)
from criserver.streaming.spdy.headers import HeaderDecoder, HeaderEncoder, Pairs, split_pairs
from criserver.streaming.spdy.states import REASONS, RULES, Half, Sent, StreamState

# An attribute of an Enum costs too much for each frame of data.
_OPEN, _DONE = Half.OPEN, Half.DONE


@dataclass(frozen=True, slots=True)
class SpdyLimits:
    """The limits of one connection; sizes are in bytes.

    ``control``: the body of a control frame (section 2.2.1: at least 8192). ``headers``: a decompressed header block.
    ``pairs``: the headers in one block, each value counted. ``settings``: the entries of a SETTINGS frame. ``streams``:
    the open streams of both sides together. ``frame``: the payload of a DATA frame that this side sends. ``window``:
    what a peer with flow control may send on one stream ahead of ``consumed``.

    Two limits hold between two calls of ``take``. ``answers``: the answers to the peer's frames (PING, RST_STREAM).
    ``text``: all header blocks together.
    """

    control: int = 16 * 1024
    headers: int = 64 * 1024
    pairs: int = 128
    settings: int = 64
    streams: int = 1024
    answers: int = 1024
    text: int = 1024 * 1024
    frame: int = 64 * 1024
    window: int = 256 * 1024


class Connection:
    """One side of a connection, the server unless ``client``.

    With ``announce`` flow control begins at once; without it, when the peer begins. No method blocks or does I/O. A
    method that makes a frame raises LocalError where the state of the connection or stream forbids it, and has changed
    nothing then.
    """

    __slots__ = (
        "_accepted",
        "_answers",
        "_client",
        "_decoder",
        "_encoder",
        "_failed",
        "_flow",
        "_going",
        "_last_opened",
        "_limits",
        "_next_id",
        "_next_ping",
        "_out",
        "_peer_gone",
        "_peer_limit",
        "_pings",
        "_reader",
        "_reset",
        "_streams",
        "_text",
        "_wanted",
    )

    def __init__(self, *, client: bool = False, limits: SpdyLimits | None = None, announce: bool = False) -> None:
        self._client = client
        self._limits = limits or SpdyLimits()
        self._streams: dict[int, StreamState] = {}
        self._decoder = HeaderDecoder()
        self._encoder = HeaderEncoder()
        self._next_id = self._next_ping = 1 if client else 2
        self._last_opened = 0  # the last stream that the peer opened or tried to
        self._accepted = 0
        self._pings: set[int] = set()
        self._peer_limit = MAX_ID
        self._peer_gone = False
        self._going = False
        self._failed = False
        # The frames to send.
        self._out: list[bytes | memoryview] = []
        self._reset: set[int] = set()  # streams that have got an RST_STREAM since the last take()
        self._answers = 0
        self._text = 0
        self._reader = FrameReader(self._limits.control)
        self._wanted = False  # whether the payload of the DATA frame that is being read goes to the caller
        self._flow = FlowControl(self._limits.window, self._limits.streams, self._out)
        if announce:
            self._flow.begin_grants(())

    @property
    def streams(self) -> tuple[int, ...]:
        """The streams that are open in a direction."""
        return tuple(self._streams)

    @property
    def held(self) -> int:
        """Bytes handed out in Data events and not yet ``consumed``."""
        return self._flow.held

    def state(self, stream: int) -> tuple[Half, Half]:
        """What this side and the peer may still send on a stream."""
        known = self._streams.get(stream)
        return (known.ours, known.theirs) if known else (_DONE, _DONE)

    def window(self, stream: int) -> int:
        """How many bytes ``send`` may carry on the stream now; MAX_WINDOW where the peer has no windows."""
        known = self._streams.get(stream)
        if known is None or known.ours is not _OPEN:
            return 0
        return max(0, self._flow.room(known))

    def open(self, headers: Iterable[tuple[str, str]] = (), *, end: bool = False) -> int:
        """Open a stream and return its ID; ``end``: this side sends nothing more on it."""
        if self._failed or self._going or self._peer_gone:
            raise LocalError("no stream can be opened: the connection is going away")
        own = sum(1 for stream in self._streams if self._is_own(stream))
        if own >= self._peer_limit:
            raise LocalError(f"no stream can be opened: the peer allows {self._peer_limit} at once")
        stream = self._next_id
        if stream > MAX_ID:
            raise LocalError("no stream can be opened: the connection has used up its stream IDs")
        block = self._encoder.encode(headers)
        body = HEAD.pack(stream, 0) + b"\x00\x00" + block
        self._out.append(control(Type.SYN_STREAM, body, FIN if end else 0))
        self._next_id += 2
        self._streams[stream] = StreamState(stream, _DONE if end else _OPEN, Half.SILENT)
        return stream

    def reply(self, stream: int, headers: Iterable[tuple[str, str]] = (), *, end: bool = False) -> None:
        """Accept a stream of the peer; ``end``: this side sends no data on it."""
        self._send_block(Type.SYN_REPLY, Sent.REPLY, stream, headers, end=end)

    def headers(self, stream: int, headers: Iterable[tuple[str, str]], *, end: bool = False) -> None:
        """Send more headers on a stream."""
        self._send_block(Type.HEADERS, Sent.HEADERS, stream, headers, end=end)

    def send(self, stream: int, data: bytes | bytearray | memoryview, *, end: bool = False) -> None:
        """Send data, at most ``window`` bytes; with ``end`` it is this side's last data, and may be empty."""
        known, _ = self._may_send(stream, Sent.DATA)
        if type(data) is not bytes:
            data = bytes(data)  # it may change before take()
        size = len(data)
        room = self._flow.room(known)
        if size > room:
            raise LocalError(f"{size} bytes exceed the window of stream {stream} ({max(0, room)} bytes)")
        self._flow.sent(known, size)
        most = min(self._limits.frame, MAX_SIZE)
        if size <= most:
            if size or end:
                self._out += (data_head(stream, size, end=end), data)
        else:
            view = memoryview(data)
            for start in range(0, size, most):
                part = view[start : start + most]
                self._out += (data_head(stream, len(part), end=end and start + most >= size), part)
        if end:
            known.ours = _DONE
            self._forget_closed(known)

    def reset(self, stream: int, status: int) -> None:
        """End a stream in both directions. Does nothing where it has ended already."""
        if not 0 < status <= 0xFFFFFFFF:
            raise LocalError(f"{status} is no status of RST_STREAM")
        if self._drop(stream):
            self._reset.add(stream)
            self._out.append(two_words(Type.RST_STREAM, stream, status))

    def ping(self) -> int:
        """Send a ping and return the ID that its Pong will have."""
        if self._failed:
            raise LocalError("no ping can be sent: the connection has failed")
        ping = self._next_ping
        self._next_ping = ping + 2 if ping + 2 <= MAX_ID else 2 - ping % 2
        self._pings.add(ping)
        self._out.append(control(Type.PING, ping.to_bytes(4, "big")))
        return ping

    def go_away(self, status: int = GoAwayStatus.OK) -> None:
        """Accept no more streams. Open streams go on. A second call does nothing."""
        if not (self._going or self._failed):
            self._going = True
            self._out.append(two_words(Type.GOAWAY, self._accepted, status))

    def consumed(self, stream: int, count: int) -> None:
        """The caller has passed on or dropped ``count`` bytes of the stream's Data. The stream may have ended."""
        if not 0 <= count <= self._flow.held:
            raise LocalError(f"{count} bytes cannot have been consumed: {self._flow.held} are held")
        self._flow.consumed(self._streams.get(stream), count)

    def take(self) -> bytes:
        """The bytes to send now, b"" for none."""
        out = b"".join(self._out)
        self._out.clear()
        self._reset.clear()
        self._answers = self._text = 0
        return out

    def receive(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """The events in the peer's bytes. A fault of the peer is an event, and is never raised."""
        events: list[Event] = []
        if self._failed:
            return events
        try:
            for frame in self._reader.read(memoryview(data)):
                if isinstance(frame, Payload):
                    self._payload(frame, events)
                else:
                    _HANDLERS[frame.kind](self, frame.body, frame.flags, events)
        except ConnectionFault as fault:
            self._failed = True
            self._streams.clear()
            self._out.append(two_words(Type.GOAWAY, self._accepted, fault.status))
            events.append(ConnectionFailed(fault.status, fault.reason))
        return events

    def _payload(self, frame: Payload, events: list[Event]) -> None:
        stream, data, begins, ended = frame
        known = self._streams.get(stream)
        if begins:
            self._wanted = known is not None and known.theirs is _OPEN
            if known is None:
                self._unknown(stream, Sent.DATA)
            elif known.theirs is not _OPEN:
                step = known.theirs, Sent.DATA
                self._stream_fault(stream, RULES[step], REASONS[step], events)
        size = len(data)
        if known is None or not self._wanted:  # or the caller has reset it in the middle of a frame
            # The caller will not consume these bytes, but they have used up the connection's window (section 2.6.8).
            self._flow.restore(size)
            return
        if size or ended:
            self._flow.held += size
            events.append(Data(stream, data, ended))
        if ended:
            known.theirs = _DONE
            self._forget_closed(known)

    def _syn_stream(self, body: bytes, flags: int, events: list[Event]) -> None:
        text = self._decode(body[10:])
        if self._going:
            return
        stream = HEAD.unpack_from(body)[0] & MAX_ID
        if stream in self._streams or (stream == self._last_opened and stream):
            self._stream_fault(stream, Status.PROTOCOL_ERROR, "a second SYN_STREAM for the stream", events)
            return
        if not stream or self._is_own(stream) or stream < self._last_opened:
            raise ConnectionFault(
                GoAwayStatus.PROTOCOL_ERROR, f"stream {stream} cannot be opened after stream {self._last_opened}"
            )
        self._last_opened = stream
        if len(self._streams) >= self._limits.streams:
            self._refuse(stream, Status.REFUSED_STREAM, f"{self._limits.streams} streams are open", events)
            return
        try:
            pairs = split_pairs(text, self._limits.pairs)
        except StreamFault as fault:
            self._refuse(stream, fault.status, fault.reason, events)
            return
        self._accepted = stream
        ended, unidirectional = bool(flags & FIN), bool(flags & UNIDIRECTIONAL)
        known = StreamState(stream, _DONE if unidirectional else Half.SILENT, _DONE if ended else _OPEN)
        self._streams[stream] = known
        events.append(StreamOpened(stream, pairs, ended, unidirectional))
        self._forget_closed(known)

    def _syn_reply(self, body: bytes, flags: int, events: list[Event]) -> None:
        self._block(Sent.REPLY, Replied, body, flags, events)

    def _headers(self, body: bytes, flags: int, events: list[Event]) -> None:
        self._block(Sent.HEADERS, Headers, body, flags, events)

    def _block(
        self,
        sent: Sent,
        event: Callable[[int, Pairs, bool], Replied | Headers],
        body: bytes,
        flags: int,
        events: list[Event],
    ) -> None:
        text = self._decode(body[4:])
        stream = int.from_bytes(body[:4], "big") & MAX_ID
        known = self._streams.get(stream)
        if known is None:
            self._unknown(stream, sent)
            return
        step = known.theirs, sent
        after = RULES[step]
        if isinstance(after, Status):
            self._stream_fault(stream, after, REASONS[step], events)
            return
        try:
            pairs = split_pairs(text, self._limits.pairs)
        except StreamFault as fault:
            self._stream_fault(stream, fault.status, fault.reason, events)
            return
        ended = bool(flags & FIN)
        known.theirs = _DONE if ended else after
        events.append(event(stream, pairs, ended))
        self._forget_closed(known)

    def _decode(self, block: bytes) -> bytes:
        """The text of a header block. Every block must be decoded, also of ignored frames: the next block needs it."""
        text = self._decoder.decode(block, self._limits.headers)
        self._text += len(text)
        if self._text > self._limits.text:
            raise ConnectionFault(
                GoAwayStatus.PROTOCOL_ERROR, f"more than {self._limits.text} bytes of headers at once"
            )
        return text

    def _rst_stream(self, body: bytes, _flags: int, events: list[Event]) -> None:
        stream, status = HEAD.unpack(body)
        if self._drop(stream & MAX_ID):
            events.append(Reset(stream & MAX_ID, status))

    def _settings(self, body: bytes, _flags: int, events: list[Event]) -> None:
        values = parse_settings(body, self._limits.settings)
        self._peer_limit = values.get(Setting.MAX_CONCURRENT_STREAMS, self._peer_limit)
        initial = values.get(Setting.INITIAL_WINDOW_SIZE)
        if initial is None:
            return
        if initial > MAX_WINDOW:
            raise ConnectionFault(GoAwayStatus.FLOW_CONTROL_ERROR, f"an initial window of {initial} bytes")
        self._flow.begin(self._streams.values())
        if self._flow.set_initial(initial):
            events.append(WindowGrown(0))

    def _ping(self, body: bytes, _flags: int, events: list[Event]) -> None:
        ping = int.from_bytes(body, "big")
        if not self._is_own(ping):
            self._answer(control(Type.PING, body))
        elif ping in self._pings:
            self._pings.remove(ping)
            events.append(Pong(ping))

    def _goaway(self, body: bytes, _flags: int, events: list[Event]) -> None:
        last, status = HEAD.unpack(body)
        last &= MAX_ID
        self._peer_gone = True
        if last < self._next_id - 2:
            for stream in [stream for stream in self._streams if self._is_own(stream) and stream > last]:
                self._drop(stream)
                events.append(Reset(stream, Status.REFUSED_STREAM, "the peer went away before it took the stream"))
        events.append(GoneAway(last, status))

    def _window_update(self, body: bytes, _flags: int, events: list[Event]) -> None:
        stream, delta = (word & MAX_ID for word in HEAD.unpack(body))
        self._flow.begin(self._streams.values())
        if not stream:
            self._flow.grow_connection(delta)
            events.append(WindowGrown(0))
            return
        known = self._streams.get(stream)
        if known is None or known.ours is _DONE:
            return
        try:
            self._flow.grow_stream(known, delta)
        except StreamFault as fault:
            self._stream_fault(stream, fault.status, fault.reason, events)
        else:
            events.append(WindowGrown(stream))

    def _stream_fault(self, stream: int, status: int, reason: str, events: list[Event]) -> None:
        if self._drop(stream):
            events.append(Reset(stream, status, reason))
        self._answer_reset(stream, status)

    def _refuse(self, stream: int, status: int, reason: str, events: list[Event]) -> None:
        events.append(Refused(stream, status, reason))
        self._answer_reset(stream, status)

    def _unknown(self, stream: int, sent: Sent) -> None:
        """A frame for a stream that is not open. It is no event: frames may still arrive after a reset."""
        if not stream:
            raise ConnectionFault(GoAwayStatus.PROTOCOL_ERROR, "a frame for stream 0")
        if self._going:  # it may be for a stream that was ignored here (section 2.2.2)
            return
        closed = stream < self._next_id if self._is_own(stream) else stream <= self._last_opened
        # Section 2.3.7 for data after the close, 2.2.2 and 2.6.3 for the rest.
        wrong = sent is Sent.DATA and closed
        self._answer_reset(stream, Status.PROTOCOL_ERROR if wrong else Status.INVALID_STREAM)

    def _answer_reset(self, stream: int, status: int) -> None:
        # One RST_STREAM is enough for several frames in succession (section 2.4.2).
        if stream not in self._reset:
            self._reset.add(stream)
            self._answer(two_words(Type.RST_STREAM, stream, status))

    def _answer(self, frame: bytes) -> None:
        self._answers += 1
        if self._answers > self._limits.answers:
            raise ConnectionFault(
                GoAwayStatus.PROTOCOL_ERROR, f"more than {self._limits.answers} frames that demand an answer at once"
            )
        self._out.append(frame)

    def _is_own(self, number: int) -> bool:
        """Whether the ID of a stream or ping is one of this side: a client's IDs are odd (sections 2.3.2, 2.6.5)."""
        return number % 2 == self._client

    def _drop(self, stream: int) -> bool:
        """Close a stream. False where there was none."""
        return self._streams.pop(stream, None) is not None

    def _forget_closed(self, known: StreamState) -> None:
        if known.ours is _DONE and known.theirs is _DONE:
            del self._streams[known.id]

    def _may_send(self, stream: int, sent: Sent) -> tuple[StreamState, Half]:
        known = self._streams.get(stream)
        if known is None:
            raise LocalError(f"stream {stream} is not open")
        step = known.ours, sent
        after = RULES[step]
        if isinstance(after, Status):
            raise LocalError(f"stream {stream}: {REASONS[step]}")
        return known, after

    def _send_block(
        self, kind: Type, sent: Sent, stream: int, headers: Iterable[tuple[str, str]], *, end: bool
    ) -> None:
        known, after = self._may_send(stream, sent)
        body = stream.to_bytes(4, "big") + self._encoder.encode(headers)
        self._out.append(control(kind, body, FIN if end else 0))
        known.ours = _DONE if end else after
        self._forget_closed(known)


_HANDLERS: Mapping[int, Callable[[Connection, bytes, int, list[Event]], None]] = {
    Type.SYN_STREAM: Connection._syn_stream,
    Type.SYN_REPLY: Connection._syn_reply,
    Type.RST_STREAM: Connection._rst_stream,
    Type.SETTINGS: Connection._settings,
    Type.PING: Connection._ping,
    Type.GOAWAY: Connection._goaway,
    Type.HEADERS: Connection._headers,
    Type.WINDOW_UPDATE: Connection._window_update,
}
