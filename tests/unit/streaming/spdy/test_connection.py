"""SPDY's streams and windows: the state machine, flow control, and attacks of a peer.

The frames' bytes are in test_spdy_wire.py; here frames come from and go to the peer of spdy_peer.py.
"""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criserver.streaming import spdy
from tests.support.spdy_peer import (
    FIN,
    GOAWAY,
    HEADERS,
    PING,
    RST_STREAM,
    SETTINGS,
    SYN_REPLY,
    SYN_STREAM,
    UNIDIRECTIONAL,
    WINDOW_UPDATE,
    Peer,
    chunks,
    control,
    data,
    frames,
    opened,
    resets,
    whole,
    words,
)

SILENT, OPEN, DONE = spdy.Half.SILENT, spdy.Half.OPEN, spdy.Half.DONE
CLOSED = (DONE, DONE)

# What one side may send, whoever it is: its half of the stream, the frame, and its half afterwards or the status of
# the RST_STREAM that the frame earns.
TABLE: list[tuple[spdy.Half, str, spdy.Half | spdy.Status]] = [
    (SILENT, "reply", OPEN),
    (SILENT, "headers", SILENT),
    (SILENT, "data", spdy.Status.PROTOCOL_ERROR),
    (OPEN, "reply", spdy.Status.STREAM_IN_USE),
    (OPEN, "headers", OPEN),
    (OPEN, "data", OPEN),
    (DONE, "reply", spdy.Status.STREAM_ALREADY_CLOSED),
    (DONE, "headers", spdy.Status.STREAM_ALREADY_CLOSED),
    (DONE, "data", spdy.Status.STREAM_ALREADY_CLOSED),
]
CASES = [(*case, end) for case in TABLE for end in (False, True)]
IDS = [f"{half.name}-{frame}{'-fin' if end else ''}" for half, frame, _, end in CASES]


def _theirs_in(half: spdy.Half) -> tuple[spdy.Connection, Peer, int]:
    """A server and a stream on which the peer's half is as asked, and its own OPEN."""
    connection, peer = spdy.Connection(), Peer()
    stream = connection.open()  # ours: the peer has to reply
    if half is not SILENT:
        connection.receive(peer.syn_reply(stream, flags=FIN if half is DONE else 0))
    assert connection.state(stream) == (OPEN, half)
    connection.take()
    return connection, peer, stream


@pytest.mark.parametrize(("half", "frame", "after", "end"), CASES, ids=IDS)
def test_the_peers_frames_move_its_half_or_reset_the_stream(
    half: spdy.Half, frame: str, after: spdy.Half | spdy.Status, end: bool
) -> None:
    connection, peer, stream = _theirs_in(half)
    flags = FIN if end else 0
    events: list[spdy.Event]
    event: spdy.Event
    match frame:
        case "reply":
            events, event = connection.receive(peer.syn_reply(stream, flags=flags)), spdy.Replied(stream, (), end)
        case "headers":
            events, event = connection.receive(peer.headers(stream, flags=flags)), spdy.Headers(stream, (), end)
        case _:
            events, event = connection.receive(data(stream, b"x", flags)), spdy.Data(stream, memoryview(b"x"), end)
    if isinstance(after, spdy.Half):
        assert events == [event]
        assert connection.state(stream) == (OPEN, DONE if end else after)
        assert connection.take() == b""
    else:
        (reset,) = events
        assert isinstance(reset, spdy.Reset)
        assert (reset.stream, reset.status, connection.state(stream)) == (stream, after, CLOSED)
        assert reset.reason
        assert resets(connection.take()) == [(stream, after)]


def _ours_in(half: spdy.Half) -> spdy.Connection:
    """A server with stream 1, on which its half is as asked and the peer's OPEN."""
    connection = spdy.Connection()
    connection.receive(Peer().syn_stream(1))
    if half is not SILENT:
        connection.reply(1, end=half is DONE)
    assert connection.state(1) == (half, OPEN)
    connection.take()
    return connection


@pytest.mark.parametrize(("half", "frame", "after", "end"), CASES, ids=IDS)
def test_our_frames_move_our_half_or_are_refused(
    half: spdy.Half, frame: str, after: spdy.Half | spdy.Status, end: bool
) -> None:
    connection = _ours_in(half)
    actions: dict[str, Callable[[], None]] = {
        "reply": lambda: connection.reply(1, end=end),
        "headers": lambda: connection.headers(1, [], end=end),
        "data": lambda: connection.send(1, b"x", end=end),
    }
    if isinstance(after, spdy.Half):
        actions[frame]()
        assert connection.state(1) == (DONE if end else after, OPEN)
        ((_, flags, _),) = frames(connection.take())
        assert flags == (FIN if end else 0)
    else:
        with pytest.raises(spdy.LocalError, match="stream 1"):
            actions[frame]()
        assert connection.state(1) == (half, OPEN)
        assert connection.take() == b""


OUR_ENDS: dict[str, Callable[[spdy.Connection, int], object]] = {
    "data": lambda connection, stream: connection.send(stream, b"x", end=True),
    "headers": lambda connection, stream: connection.headers(stream, [], end=True),
}
THEIR_ENDS: dict[str, Callable[[Peer, int], bytes]] = {
    "data": lambda _, stream: data(stream, b"x", FIN),
    "empty data": lambda _, stream: data(stream, b"", FIN),
    "headers": lambda peer, stream: peer.headers(stream, flags=FIN),
}


@pytest.mark.parametrize("theirs", THEIR_ENDS.values(), ids=THEIR_ENDS)
@pytest.mark.parametrize("ours", OUR_ENDS.values(), ids=OUR_ENDS)
@pytest.mark.parametrize("ours_first", [True, False])
def test_a_stream_is_closed_when_both_halves_are_done(
    ours_first: bool, ours: Callable[[spdy.Connection, int], object], theirs: Callable[[Peer, int], bytes]
) -> None:
    connection, peer = opened()
    if ours_first:
        ours(connection, 1)
        assert connection.state(1) == (DONE, OPEN)
    assert [*connection.streams] == [1]
    connection.receive(theirs(peer, 1))
    if not ours_first:
        assert connection.state(1) == (OPEN, DONE)
        assert [*connection.streams] == [1]
        ours(connection, 1)
    assert connection.state(1) == CLOSED
    assert [*connection.streams] == []


def test_a_stream_can_be_closed_by_its_reply() -> None:
    connection, peer = spdy.Connection(), Peer()
    connection.receive(peer.syn_stream(1, flags=FIN))
    connection.reply(1, end=True)
    assert connection.streams == ()
    stream = connection.open(end=True)
    assert connection.receive(peer.syn_reply(stream, flags=FIN)) == [spdy.Replied(stream, (), True)]
    assert connection.streams == ()


@pytest.mark.parametrize(
    ("flags", "state"),
    [
        (0, (SILENT, OPEN)),
        (FIN, (SILENT, DONE)),
        (UNIDIRECTIONAL, (DONE, OPEN)),
        (FIN | UNIDIRECTIONAL, CLOSED),
    ],
)
def test_flags_of_syn_stream_say_which_halves_there_are(flags: int, state: tuple[spdy.Half, spdy.Half]) -> None:
    connection = spdy.Connection()
    assert connection.receive(Peer().syn_stream(1, flags=flags)) == [
        spdy.StreamOpened(1, (), bool(flags & FIN), bool(flags & UNIDIRECTIONAL))
    ]
    assert connection.state(1) == state
    assert connection.streams == (() if state == CLOSED else (1,))


@pytest.mark.parametrize("by_peer", [True, False])
def test_a_reset_closes_both_halves(by_peer: bool) -> None:
    connection, _ = opened()
    if by_peer:
        assert connection.receive(words(RST_STREAM, 1, spdy.Status.CANCEL)) == [spdy.Reset(1, spdy.Status.CANCEL)]
        assert connection.take() == b""  # never an RST_STREAM for an RST_STREAM (section 2.4.2)
    else:
        connection.reset(1, spdy.Status.CANCEL)
        connection.reset(1, spdy.Status.CANCEL)
        assert resets(connection.take()) == [(1, spdy.Status.CANCEL)]
    assert connection.state(1) == CLOSED
    with pytest.raises(spdy.LocalError, match="stream 1 is not open"):
        connection.send(1, b"late")


def test_a_stream_reset_in_the_middle_of_a_frame_gets_nothing_more() -> None:
    connection, peer = opened()
    frame = data(1, b"a" * 100)
    assert connection.receive(frame[:50]) == [spdy.Data(1, memoryview(b"a" * 42), False)]
    connection.reset(1, spdy.Status.CANCEL)
    assert connection.receive(frame[50:] + peer.syn_stream(3)) == [spdy.StreamOpened(3, (), False, False)]
    assert connection.receive(data(1, b"more")) == []
    assert resets(connection.take()) == [(1, spdy.Status.CANCEL)]


# Streams that are not open.


def _with_closed_stream() -> tuple[spdy.Connection, Peer]:
    connection, peer = opened()
    connection.send(1, b"", end=True)
    connection.receive(data(1, b"", FIN))
    connection.take()
    return connection, peer


@pytest.mark.parametrize(
    ("frame", "status"),
    [
        (lambda _: data(1, b"x"), spdy.Status.PROTOCOL_ERROR),  # section 2.3.7
        (lambda _: data(1), spdy.Status.PROTOCOL_ERROR),
        (lambda _: data(3, b"x"), spdy.Status.INVALID_STREAM),  # section 2.2.2
        (lambda _: data(2, b"x"), spdy.Status.INVALID_STREAM),
        (lambda peer: peer.headers(1), spdy.Status.INVALID_STREAM),
        (lambda peer: peer.syn_reply(2), spdy.Status.INVALID_STREAM),
        (lambda peer: peer.syn_reply(1), spdy.Status.INVALID_STREAM),
    ],
)
def test_a_frame_for_no_open_stream_is_answered_and_no_event(
    frame: Callable[[Peer], bytes], status: spdy.Status
) -> None:
    connection, peer = _with_closed_stream()
    wire = frame(peer)
    assert connection.receive(wire) == []
    ((stream, answer),) = resets(connection.take())
    assert answer == status
    assert stream in (1, 2, 3)


def test_answers_to_one_stream_are_one_until_they_are_taken() -> None:
    connection, _ = _with_closed_stream()
    connection.receive(data(1, b"x") * 100)
    assert resets(connection.take()) == [(1, spdy.Status.PROTOCOL_ERROR)]
    connection.receive(data(1, b"x"))
    assert resets(connection.take()) == [(1, spdy.Status.PROTOCOL_ERROR)]


@pytest.mark.parametrize("frame", [words(RST_STREAM, 1, 1), words(RST_STREAM, 9, 1), words(WINDOW_UPDATE, 9, 1)])
def test_what_concerns_a_stream_that_is_gone_is_ignored(frame: bytes) -> None:
    connection, _ = _with_closed_stream()
    assert connection.receive(frame) == []
    assert resets(connection.take()) == []


@pytest.mark.parametrize("still_open", [True, False])
def test_a_second_syn_stream_for_a_stream_resets_it(still_open: bool) -> None:
    connection, peer = opened() if still_open else _with_closed_stream()
    reset = spdy.Reset(1, spdy.Status.PROTOCOL_ERROR, "a second SYN_STREAM for the stream")
    assert connection.receive(peer.syn_stream(1)) == ([reset] if still_open else [])
    assert resets(connection.take()) == [(1, spdy.Status.PROTOCOL_ERROR)]
    assert connection.state(1) == CLOSED
    assert connection.receive(peer.syn_stream(3)) == [spdy.StreamOpened(3, (), False, False)]


def test_a_second_syn_stream_for_an_older_stream_that_is_open_resets_it() -> None:
    connection, peer = opened()
    connection.receive(peer.syn_stream(3))
    assert [type(event) for event in connection.receive(peer.syn_stream(1))] == [spdy.Reset]
    assert connection.streams == (3,)


# The end of a connection.


def test_after_our_goaway_new_streams_are_ignored_and_open_ones_go_on() -> None:
    connection, peer = opened()
    connection.go_away()
    connection.go_away(spdy.GoAwayStatus.INTERNAL_ERROR)
    assert frames(connection.take()) == [(GOAWAY, 0, struct.pack(">II", 1, 0))]
    assert connection.receive(peer.syn_stream(3) + data(3, b"x") + peer.headers(3)) == []
    assert connection.take() == b""
    assert connection.receive(data(1, b"x")) == [spdy.Data(1, memoryview(b"x"), False)]
    connection.send(1, b"y")
    with pytest.raises(spdy.LocalError, match="going away"):
        connection.open()


def test_goaway_names_the_last_stream_that_was_accepted() -> None:
    connection, peer = spdy.Connection(limits=spdy.SpdyLimits(streams=1)), Peer()
    connection.receive(peer.syn_stream(5) + peer.syn_stream(7))
    connection.take()
    connection.go_away()
    assert frames(connection.take()) == [(GOAWAY, 0, struct.pack(">II", 5, 0))]


def test_after_the_peers_goaway_no_stream_is_opened() -> None:
    client, peer = spdy.Connection(client=True), Peer()
    client.open()
    client.open()
    lost = spdy.Reset(3, spdy.Status.REFUSED_STREAM, "the peer went away before it took the stream")
    assert client.receive(words(GOAWAY, 1, 0)) == [lost, spdy.GoneAway(1, 0)]
    with pytest.raises(spdy.LocalError, match="going away"):
        client.open()
    assert client.receive(peer.syn_reply(1)) == [spdy.Replied(1, (), False)]
    client.send(1, b"still open")


def _entries(*pairs: tuple[int, int], count: int | None = None) -> bytes:
    body = struct.pack(">I", len(pairs) if count is None else count)
    return control(SETTINGS, body + b"".join(struct.pack(">II", *pair) for pair in pairs))


BREAKS: dict[str, tuple[Callable[[Peer], bytes], spdy.GoAwayStatus, str]] = {
    "version 0": (lambda _: control(0, b"", version=0), spdy.GoAwayStatus.PROTOCOL_ERROR, "version 0"),
    "version 2": (lambda _: control(PING, bytes(4), version=2), spdy.GoAwayStatus.PROTOCOL_ERROR, "version 2"),
    "an unknown frame of version 4": (
        lambda _: control(77, b"", version=4),
        spdy.GoAwayStatus.PROTOCOL_ERROR,
        "version 4",
    ),
    "PING of 3 bytes": (lambda _: control(PING, bytes(3)), spdy.GoAwayStatus.PROTOCOL_ERROR, "PING.*3 bytes"),
    "PING of 5 bytes": (lambda _: control(PING, bytes(5)), spdy.GoAwayStatus.PROTOCOL_ERROR, "PING.*5 bytes"),
    "PING of nothing": (lambda _: control(PING, b""), spdy.GoAwayStatus.PROTOCOL_ERROR, "PING.*0 bytes"),
    "RST_STREAM of 4 bytes": (lambda _: control(RST_STREAM, bytes(4)), spdy.GoAwayStatus.PROTOCOL_ERROR, "RST_STREAM"),
    "RST_STREAM of 9 bytes": (lambda _: control(RST_STREAM, bytes(9)), spdy.GoAwayStatus.PROTOCOL_ERROR, "RST_STREAM"),
    "GOAWAY of 9 bytes": (lambda _: control(GOAWAY, bytes(9)), spdy.GoAwayStatus.PROTOCOL_ERROR, "GOAWAY"),
    "WINDOW_UPDATE of 7": (
        lambda _: control(WINDOW_UPDATE, bytes(7)),
        spdy.GoAwayStatus.PROTOCOL_ERROR,
        "WINDOW_UPDATE",
    ),
    "GOAWAY of 4 bytes, as in SPDY/2": (
        lambda _: control(GOAWAY, bytes(4)),
        spdy.GoAwayStatus.PROTOCOL_ERROR,
        "GOAWAY",
    ),
    "WINDOW_UPDATE of 9": (
        lambda _: control(WINDOW_UPDATE, bytes(9)),
        spdy.GoAwayStatus.PROTOCOL_ERROR,
        "WINDOW_UPDATE",
    ),
    "SYN_STREAM of 9 bytes": (lambda _: control(SYN_STREAM, bytes(9)), spdy.GoAwayStatus.PROTOCOL_ERROR, "SYN_STREAM"),
    "SYN_REPLY of 3 bytes": (lambda _: control(SYN_REPLY, bytes(3)), spdy.GoAwayStatus.PROTOCOL_ERROR, "SYN_REPLY"),
    "HEADERS of 3 bytes": (lambda _: control(HEADERS, bytes(3)), spdy.GoAwayStatus.PROTOCOL_ERROR, "HEADERS"),
    "SETTINGS of 3 bytes": (lambda _: control(SETTINGS, bytes(3)), spdy.GoAwayStatus.PROTOCOL_ERROR, "SETTINGS"),
    "SETTINGS with too few entries": (
        lambda _: _entries((4, 1), count=2),
        spdy.GoAwayStatus.PROTOCOL_ERROR,
        "2 entries",
    ),
    "SETTINGS with too many entries": (
        lambda _: _entries((4, 1), count=0),
        spdy.GoAwayStatus.PROTOCOL_ERROR,
        "0 entries",
    ),
    "an initial window of 2 GiB": (
        lambda _: _entries((7, 1 << 31)),
        spdy.GoAwayStatus.FLOW_CONTROL_ERROR,
        "2147483648",
    ),
    "a connection's window over 2 GiB": (
        lambda _: words(WINDOW_UPDATE, 0, spdy.MAX_WINDOW),
        spdy.GoAwayStatus.FLOW_CONTROL_ERROR,
        "more than 2147483647",
    ),
    "WINDOW_UPDATE of nothing": (lambda _: words(WINDOW_UPDATE, 0, 0), spdy.GoAwayStatus.PROTOCOL_ERROR, "0 bytes"),
    "DATA of stream 0": (lambda _: data(0, b"x"), spdy.GoAwayStatus.PROTOCOL_ERROR, "stream 0"),
    "HEADERS of stream 0": (lambda peer: peer.headers(0), spdy.GoAwayStatus.PROTOCOL_ERROR, "stream 0"),
    "SYN_STREAM of stream 0": (lambda peer: peer.syn_stream(0), spdy.GoAwayStatus.PROTOCOL_ERROR, "stream 0"),
    "a stream of the wrong side": (lambda peer: peer.syn_stream(8), spdy.GoAwayStatus.PROTOCOL_ERROR, "stream 8"),
    "a stream of a lower ID": (
        lambda peer: peer.syn_stream(3),
        spdy.GoAwayStatus.PROTOCOL_ERROR,
        "stream 3.*after stream 5",
    ),
}


@pytest.mark.parametrize(("frame", "status", "reason"), BREAKS.values(), ids=BREAKS)
def test_what_breaks_the_protocol_ends_the_connection(
    frame: Callable[[Peer], bytes], status: spdy.GoAwayStatus, reason: str
) -> None:
    connection, peer = spdy.Connection(), Peer()
    connection.receive(peer.syn_stream(5))
    connection.reply(5)
    connection.take()
    wire = frame(peer)
    events = connection.receive(data(5, b"before") + wire + data(5, b"after"))
    assert events[:-1] == [spdy.Data(5, memoryview(b"before"), False)]
    last = events[-1]
    assert isinstance(last, spdy.ConnectionFailed)
    assert last.status == status
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(last.reason)
    assert (GOAWAY, 0, struct.pack(">II", 5, status)) in frames(connection.take())
    # From here on it is dead: nothing is read, and nothing can be sent.
    assert connection.receive(peer.syn_stream(7) + words(PING, 1)) == []
    assert connection.streams == ()
    for action in (connection.open, connection.ping, lambda: connection.send(5, b"x"), lambda: connection.reply(5)):
        with pytest.raises(spdy.LocalError):
            action()
    connection.go_away()
    connection.reset(5, spdy.Status.CANCEL)
    assert connection.take() == b""


# What the caller can not do.


def test_a_callers_mistakes_are_told() -> None:
    connection, _ = opened()
    with pytest.raises(spdy.LocalError, match="stream 3 is not open"):
        connection.send(3, b"x")
    with pytest.raises(spdy.LocalError, match="stream 3 is not open"):
        connection.reply(3)
    for status in (0, -1, 1 << 32):
        with pytest.raises(spdy.LocalError, match="no status"):
            connection.reset(1, status)
    connection.receive(data(1, b"x" * 10))
    for count in (-1, 11):
        with pytest.raises(spdy.LocalError, match="10 are held"):
            connection.consumed(1, count)
    assert connection.take() == b""
    assert connection.state(1) == (OPEN, OPEN)


@pytest.mark.parametrize("status", [1, 0xFFFFFFFF])
def test_any_status_but_0_can_be_sent(status: int) -> None:
    connection, _ = opened()
    connection.reset(1, status)
    assert resets(connection.take()) == [(1, status)]


def test_stream_ids_are_not_used_again() -> None:
    client = spdy.Connection(client=True)
    client._next_id = 0x7FFFFFFF
    assert client.open() == 0x7FFFFFFF
    client.reset(0x7FFFFFFF, spdy.Status.CANCEL)
    with pytest.raises(spdy.LocalError, match="used up its stream IDs"):
        client.open()


def test_no_more_streams_are_opened_than_the_peer_allows() -> None:
    client, peer = spdy.Connection(client=True), Peer()
    client.receive(_entries((4, 2)))
    first, _ = client.open(), client.open()
    with pytest.raises(spdy.LocalError, match="allows 2 at once"):
        client.open()
    client.receive(peer.syn_stream(2))  # one of the peer's does not count
    client.reset(first, spdy.Status.CANCEL)
    client.open()


def test_of_a_setting_that_comes_twice_the_first_value_holds() -> None:
    client = spdy.Connection(client=True)
    client.receive(_entries((4, 1), (0x01000004, 5)))
    client.open()
    with pytest.raises(spdy.LocalError, match="allows 1 at once"):
        client.open()


# Flow control.

KIB = 1024


def test_a_peer_without_windows_neither_bounds_us_nor_hears_of_ours() -> None:
    connection, _ = opened()
    assert connection.window(1) == spdy.MAX_WINDOW
    for _ in range(100):
        connection.send(1, bytes(100 * KIB))
        for event in connection.receive(data(1, bytes(100 * KIB))):
            assert isinstance(event, spdy.Data)
            connection.consumed(1, len(event.data))
    assert {kind for kind, _, _ in frames(connection.take())} == {-1}
    assert connection.window(1) == spdy.MAX_WINDOW
    assert connection.held == 0


@pytest.mark.parametrize("sign", [_entries((7, 64 * KIB)), words(WINDOW_UPDATE, 0, 1), words(WINDOW_UPDATE, 1, 1)])
def test_a_peer_that_shows_windows_bounds_us_and_is_told_ours(sign: bytes) -> None:
    connection, _ = opened(limits=spdy.SpdyLimits(window=256 * KIB, streams=7))
    connection.send(1, bytes(60 * KIB))  # counted, though nothing bounds it yet
    connection.take()
    connection.receive(data(1, bytes(10 * KIB)))
    connection.consumed(1, 10 * KIB)
    connection.receive(sign)
    assert 4 * KIB <= connection.window(1) <= 4 * KIB + 1
    assert frames(connection.take()) == [
        (SETTINGS, 0, struct.pack(">5I", 2, 4, 7, 7, 256 * KIB)),
        (WINDOW_UPDATE, 0, struct.pack(">II", 0, (10 + 256 - 64) * KIB)),
        (WINDOW_UPDATE, 0, struct.pack(">II", 1, 10 * KIB)),
    ]
    connection.receive(sign)
    assert frames(connection.take()) == []


def test_a_peer_that_went_beyond_our_windows_unseen_gets_no_more_than_one_when_it_shows_its_own() -> None:
    connection, _ = opened(limits=spdy.SpdyLimits(window=64 * KIB))
    connection.receive(data(1, bytes(1000 * KIB)))
    connection.consumed(1, 1000 * KIB)
    connection.receive(words(WINDOW_UPDATE, 1, 1))
    assert _updates(connection.take()) == [(0, 64 * KIB), (1, 64 * KIB)]


def _updates(output: bytes) -> list[tuple[int, int]]:
    return [struct.unpack(">II", body) for kind, _, body in frames(output) if kind == WINDOW_UPDATE]


def _bounded(initial: int = 64 * KIB) -> tuple[spdy.Connection, Peer]:
    connection, peer = opened()
    connection.receive(_entries((7, initial)))
    connection.take()
    return connection, peer


def test_nothing_is_sent_beyond_the_window_but_the_end() -> None:
    connection, _ = _bounded()
    with pytest.raises(spdy.LocalError, match="65537 bytes exceed the window of stream 1"):
        connection.send(1, bytes(64 * KIB + 1))
    connection.send(1, bytes(64 * KIB))
    assert connection.window(1) == 0
    with pytest.raises(spdy.LocalError, match="1 bytes exceed the window"):
        connection.send(1, b"x")
    connection.send(1, b"", end=True)
    assert sum(len(payload) for _, _, payload in frames(connection.take())) == 64 * KIB


def test_the_streams_and_the_connections_window_both_bound() -> None:
    connection, peer = _bounded(40 * KIB)
    connection.receive(peer.syn_stream(3))
    connection.reply(3)
    connection.send(1, bytes(30 * KIB))
    assert (connection.window(1), connection.window(3)) == (10 * KIB, 34 * KIB)
    assert connection.receive(words(WINDOW_UPDATE, 0, 20 * KIB)) == [spdy.WindowGrown(0)]
    assert (connection.window(1), connection.window(3)) == (10 * KIB, 40 * KIB)
    assert connection.receive(words(WINDOW_UPDATE, 1, 100 * KIB)) == [spdy.WindowGrown(1)]
    assert connection.window(1) == 54 * KIB


def test_a_window_is_for_who_may_send() -> None:
    connection, peer = _bounded()
    connection.receive(peer.syn_stream(3))
    assert connection.window(3) == 0  # no reply yet
    assert connection.window(99) == 0
    connection.send(1, b"", end=True)
    assert connection.window(1) == 0


def test_a_smaller_initial_window_can_make_a_window_negative() -> None:
    # The example of section 2.6.8: 60 KB are sent, then the initial window is set to 16 KB.
    connection, _ = _bounded()
    connection.receive(words(WINDOW_UPDATE, 0, spdy.MAX_WINDOW - 64 * KIB))
    connection.send(1, bytes(60 * KIB))
    connection.receive(_entries((7, 16 * KIB)))
    assert connection.window(1) == 0
    connection.receive(words(WINDOW_UPDATE, 1, 44 * KIB))
    assert connection.window(1) == 0
    connection.receive(words(WINDOW_UPDATE, 1, 1))
    assert connection.window(1) == 1
    connection.receive(_entries((7, 64 * KIB)))
    assert connection.window(1) == 48 * KIB + 1


@pytest.mark.parametrize(
    ("delta", "status"),
    [(0, spdy.Status.PROTOCOL_ERROR), (spdy.MAX_WINDOW - 64 * KIB + 1, spdy.Status.FLOW_CONTROL_ERROR)],
)
def test_a_bad_update_of_a_streams_window_resets_it(delta: int, status: spdy.Status) -> None:
    connection, _ = _bounded()
    (event,) = connection.receive(words(WINDOW_UPDATE, 1, delta))
    assert isinstance(event, spdy.Reset)
    assert event.status == status
    assert resets(connection.take()) == [(1, status)]


def test_the_largest_window_is_allowed() -> None:
    connection, _ = _bounded()
    connection.receive(words(WINDOW_UPDATE, 0, spdy.MAX_WINDOW - 64 * KIB))
    connection.receive(words(WINDOW_UPDATE, 1, spdy.MAX_WINDOW - 64 * KIB))
    assert connection.window(1) == spdy.MAX_WINDOW
    connection, _ = _bounded(spdy.MAX_WINDOW)
    connection.receive(words(WINDOW_UPDATE, 0, spdy.MAX_WINDOW - 64 * KIB))
    assert connection.window(1) == spdy.MAX_WINDOW


def test_our_windows_are_given_back_by_halves_as_data_is_consumed() -> None:
    connection, _ = opened(announce=True, limits=spdy.SpdyLimits(window=100_000))
    connection.receive(data(1, bytes(100_000)))
    # The connection's window begins as 65536 bytes and has 34464 more to come, which is less than a half.
    connection.consumed(1, 15_000)
    assert connection.take() == b""
    connection.consumed(1, 1_000)
    assert _updates(connection.take()) == [(0, 34_464 + 16_000)]
    connection.consumed(1, 33_999)
    assert connection.take() == b""
    connection.consumed(1, 1)
    assert _updates(connection.take()) == [(1, 50_000)]
    connection.consumed(1, 15_999)
    assert connection.take() == b""
    connection.consumed(1, 1)
    assert _updates(connection.take()) == [(0, 50_000)]
    connection.consumed(1, 34_000)
    assert _updates(connection.take()) == [(1, 50_000)]
    assert connection.held == 0


def test_what_came_for_a_stream_that_has_ended_is_given_back_to_the_connection_alone() -> None:
    connection, _ = opened(announce=True, limits=spdy.SpdyLimits(window=64 * KIB))
    connection.receive(data(1, bytes(64 * KIB), FIN))
    connection.consumed(1, 64 * KIB)
    assert _updates(connection.take()) == [(0, 64 * KIB)]


def test_data_that_nobody_gets_is_given_back_to_the_connection() -> None:
    connection, _ = opened(announce=True, limits=spdy.SpdyLimits(window=64 * KIB))
    connection.reset(1, spdy.Status.CANCEL)
    connection.take()
    assert connection.receive(data(1, bytes(40 * KIB))) == []
    assert _updates(connection.take()) == [(0, 40 * KIB)]


def test_a_peer_beyond_its_window_is_not_cut_off() -> None:
    connection, _ = opened(announce=True, limits=spdy.SpdyLimits(window=64 * KIB))
    for _ in range(100):
        (event,) = connection.receive(data(1, bytes(64 * KIB)))
        assert isinstance(event, spdy.Data)
    assert connection.held == 6400 * KIB
    assert connection.take() == b""


# What a peer can not make us do.


def test_streams_over_the_bound_are_refused() -> None:
    connection, peer = spdy.Connection(limits=spdy.SpdyLimits(streams=2)), Peer()
    connection.receive(peer.syn_stream(1) + peer.syn_stream(3))
    assert connection.receive(peer.syn_stream(5)) == [spdy.Refused(5, spdy.Status.REFUSED_STREAM, "2 streams are open")]
    assert resets(connection.take()) == [(5, spdy.Status.REFUSED_STREAM)]
    connection.receive(words(RST_STREAM, 1, spdy.Status.CANCEL))
    assert connection.receive(peer.syn_stream(7)) == [spdy.StreamOpened(7, (), False, False)]


@pytest.mark.parametrize(("kind", "head"), [(SYN_STREAM, 10), (SYN_REPLY, 4), (HEADERS, 4), (SETTINGS, 4)])
def test_a_control_frame_over_the_bound_is_refused_before_its_body(kind: int, head: int) -> None:
    connection = spdy.Connection(limits=spdy.SpdyLimits(control=10_000))
    (event,) = connection.receive(control(kind, bytes(10_001))[:8])
    assert isinstance(event, spdy.ConnectionFailed)
    assert "10001 bytes" in event.reason
    assert spdy.Connection(limits=spdy.SpdyLimits(control=10_000)).receive(control(kind, bytes(10_000))[:8]) == []


def test_settings_are_bounded() -> None:
    limits = spdy.SpdyLimits(settings=3)
    assert spdy.Connection(limits=limits).receive(_entries(*[(1, 1)] * 3)) == []
    (event,) = spdy.Connection(limits=limits).receive(_entries(*[(1, 1)] * 4))
    assert event == spdy.ConnectionFailed(spdy.GoAwayStatus.PROTOCOL_ERROR, "4 settings in one frame, more than 3")


def test_a_flood_of_frames_that_demand_answers_ends_the_connection() -> None:
    flood = words(PING, 1) * 50 + data(1) + data(3)
    connection = spdy.Connection(limits=spdy.SpdyLimits(answers=52))
    assert connection.receive(flood) == []
    connection.take()
    assert connection.receive(flood) == []
    (event,) = connection.receive(words(PING, 1) * 1000)
    assert event == spdy.ConnectionFailed(
        spdy.GoAwayStatus.PROTOCOL_ERROR, "more than 52 frames that demand an answer at once"
    )
    assert [kind for kind, _, _ in frames(connection.take())] == [PING] * 50 + [RST_STREAM] * 2 + [GOAWAY]


def test_a_flood_of_headers_ends_the_connection() -> None:
    # The smallest of frames can become large blocks, and all of them are events at once.
    connection, peer = opened(limits=spdy.SpdyLimits(headers=10_000, text=100_000))
    flood = [(b"a", b"b" * (10_000 - 13))]
    for _ in range(2):
        for _ in range(10):
            assert len(connection.receive(peer.headers(1, flood))) == 1
        connection.take()
    events = connection.receive(b"".join(peer.headers(1, flood) for _ in range(11)))
    assert len(events) == 11
    assert events[-1] == spdy.ConnectionFailed(
        spdy.GoAwayStatus.PROTOCOL_ERROR, "more than 100000 bytes of headers at once"
    )


def test_streams_that_are_closed_leave_nothing_behind() -> None:
    connection, peer = spdy.Connection(), Peer()

    def live(streams: range) -> None:
        for stream in streams:
            connection.receive(peer.syn_stream(stream, [(b"streamtype", b"data")]))
            match stream % 3:
                case 0:
                    connection.reply(stream, end=True)
                    connection.receive(data(stream, b"x", FIN))
                    connection.consumed(stream, 1)
                case 1:
                    connection.reset(stream, spdy.Status.CANCEL)
                case _:
                    connection.receive(words(RST_STREAM, stream, spdy.Status.CANCEL))
            connection.receive(data(stream, b"late"))
            connection.take()

    live(range(1, 4001, 2))  # by now the text that zlib may refer to has its full length
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        live(range(4001, 8001, 2))
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert connection.streams == ()
    assert grown < 64 * 1024


# Whatever the chunks.

STREAMS = st.integers(0, 7)
FRAMES = st.one_of(
    st.tuples(st.just("syn_stream"), STREAMS, st.integers(0, 3)),
    st.tuples(st.just("syn_reply"), STREAMS, st.integers(0, 1)),
    st.tuples(st.just("headers"), STREAMS, st.integers(0, 1)),
    st.tuples(st.just("data"), STREAMS, st.integers(0, 1), st.binary(max_size=40)),
    st.tuples(st.just("words"), st.sampled_from([RST_STREAM, WINDOW_UPDATE, GOAWAY]), STREAMS, st.integers(0, 9)),
    st.tuples(st.just("words"), st.just(PING), STREAMS),
    st.tuples(st.just("settings"), st.integers(0, 8), st.integers(0, 100_000)),
    st.tuples(st.just("unknown"), st.integers(10, 12), st.binary(max_size=20)),
    st.tuples(st.just("noise"), st.just(0), st.binary(min_size=1, max_size=12)),
)


def _wire(script: list[tuple[object, ...]]) -> bytes:
    peer = Peer()
    wire = b""
    for what, *rest in script:
        match what, rest:
            case "syn_stream" | "syn_reply" | "headers", [int(stream), int(flags)]:
                wire += getattr(peer, str(what))(stream, [(b"streamtype", b"stdin"), (b"n", b"%d" % stream)], flags)
            case "data", [int(stream), int(flags), bytes(payload)]:
                wire += data(stream, payload, flags)
            case "words", [int(kind), *numbers]:
                wire += words(kind, *numbers)  # type: ignore[arg-type]
            case "settings", [int(key), int(value)]:
                wire += _entries((key, value))
            case "unknown" | "noise", [int(kind), bytes(payload)]:
                wire += control(kind, payload) if what == "unknown" else payload
    return wire


def _read(parts: list[bytes], client: bool) -> tuple[list[spdy.Event], bytes, list[tuple[spdy.Half, spdy.Half]], int]:
    connection = spdy.Connection(client=client)
    for _ in range(2):
        connection.open()
    events = [event for part in parts for event in connection.receive(part)]
    return whole(events), connection.take(), [connection.state(stream) for stream in range(8)], connection.held


@given(st.lists(FRAMES, max_size=30), st.lists(st.integers(0, 1500), max_size=20), st.booleans())
def test_any_chunking_is_read_the_same(script: list[tuple[object, ...]], cuts: list[int], client: bool) -> None:
    wire = _wire(script)
    at_once = _read([wire], client)
    assert _read(chunks(wire, cuts), client) == at_once
    assert _read([bytes([byte]) for byte in wire], client) == at_once


class Pair:
    """A client and a server, and what is on its way between them."""

    def __init__(self, announce: tuple[bool, bool]) -> None:
        limits = spdy.SpdyLimits(window=5000, frame=700, streams=6, answers=10_000)
        self.sides = (
            spdy.Connection(client=True, announce=announce[0], limits=limits),
            spdy.Connection(announce=announce[1], limits=limits),
        )
        self.wires = (bytearray(), bytearray())
        self.sent: tuple[dict[int, bytes], dict[int, bytes]] = ({}, {})
        self.got: tuple[dict[int, bytes], dict[int, bytes]] = ({}, {})
        self.events: tuple[list[spdy.Event], list[spdy.Event]] = ([], [])

    def deliver(self, side: int, count: int) -> bool:
        """Hand up to ``count`` bytes of what a side has sent to the other one; tells whether there were any."""
        wire = self.wires[side]
        wire += self.sides[side].take()
        part = bytes(wire[:count])
        del wire[:count]
        other = 1 - side
        for event in self.sides[other].receive(part):
            self.events[other].append(event)
            if isinstance(event, spdy.Data):
                self.got[other][event.stream] = self.got[other].get(event.stream, b"") + bytes(event.data)
        return bool(part)

    def settle(self) -> None:
        """Let everything arrive, and consume all of it."""
        moved = True
        while moved:
            moved = False
            for side, connection in enumerate(self.sides):
                moved |= self.deliver(side, 1 << 30)
                connection.consumed(0, connection.held)

    def act(self, side: int, what: str, number: int, size: int) -> None:
        connection = self.sides[side]
        streams = connection.streams
        stream = streams[number % len(streams)] if streams else 0
        end = size % 5 == 0
        match what:
            case "open":
                connection.open([("number", str(number))], end=end)
            case "reply":
                connection.reply(stream, [("number", str(number))], end=end)
            case "headers":
                connection.headers(stream, [("number", str(number))], end=end)
            case "send":
                payload = bytes([number % 256]) * min(size, connection.window(stream))
                connection.send(stream, payload, end=end)
                self.sent[side][stream] = self.sent[side].get(stream, b"") + payload
            case "reset":
                connection.reset(stream, 1 + number % 9)
            case "ping":
                connection.ping()
            case "go_away":
                connection.go_away()
            case "consume":
                connection.consumed(stream, min(size, connection.held))
            case "deliver":
                self.deliver(side, size)


ACTIONS = st.tuples(
    st.integers(0, 1),
    st.sampled_from("open reply reply headers send send send consume deliver deliver ping reset go_away".split()),
    st.integers(0, 1000),
    st.integers(0, 4000),
)


@given(st.lists(ACTIONS, max_size=120), st.tuples(st.booleans(), st.booleans()))
def test_two_connections_end_in_the_same_state(
    script: list[tuple[int, str, int, int]], announce: tuple[bool, bool]
) -> None:
    pair = Pair(announce)
    for action in script:
        with suppress(spdy.LocalError):
            pair.act(*action)
    pair.settle()
    client, server = pair.sides
    for stream in range(300):
        assert client.state(stream) == server.state(stream)[::-1]
        for side in (0, 1):
            sent, got = pair.sent[side].get(stream, b""), pair.got[1 - side].get(stream, b"")
            assert sent.startswith(got)
            if client.state(stream) != CLOSED:
                assert sent == got
    for side in (0, 1):
        assert not any(isinstance(event, spdy.ConnectionFailed) for event in pair.events[side])
        # Any other reason would be a fault of the other side's.
        reasons = {event.reason for event in pair.events[side] if isinstance(event, spdy.Reset)}
        assert reasons <= {"", "the peer went away before it took the stream"}
        assert all(
            event.reason == "6 streams are open" for event in pair.events[side] if isinstance(event, spdy.Refused)
        )
        # All pings were answered.
        pongs = sum(isinstance(event, spdy.Pong) for event in pair.events[side])
        assert pongs == sum(1 for who, what, *_ in script if who == side and what == "ping")


@pytest.mark.parametrize("announce", [(False, False), (True, False), (False, True), (True, True)])
def test_large_streams_flow_both_ways_at_once(announce: tuple[bool, bool]) -> None:
    pair = Pair(announce)
    client, server = pair.sides
    streams = [client.open() for _ in range(3)]
    pair.settle()
    for stream in streams:
        server.reply(stream)
    pair.settle()
    goal = 300_000
    for _ in range(10_000):
        for side, connection in enumerate(pair.sides):
            for stream in streams:
                sent = pair.sent[side].get(stream, b"")
                part = bytes([stream]) * min(connection.window(stream), goal - len(sent), 3000)
                if part:
                    connection.send(stream, part)
                    pair.sent[side][stream] = sent + part
            pair.deliver(side, 2500)
        for side, connection in enumerate(pair.sides):
            for stream in streams:
                taken = sum(
                    len(event.data)
                    for event in pair.events[side]
                    if isinstance(event, spdy.Data) and event.stream == stream
                )
                connection.consumed(stream, taken)
            pair.events[side].clear()
        if all(len(got.get(stream, b"")) == goal for got in pair.got for stream in streams):
            return
    raise AssertionError("the streams stand still")
