"""SPDY's bytes: each type of frame as in the specification, and header blocks compared with zlib."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criserver.streaming import spdy
from criserver.streaming.spdy.headers import DICTIONARY
from tests.support.spdy_peer import HEADERS, SYN_REPLY, SYN_STREAM, Peer, block_text, control, frames, opened

NOTHING = memoryview(b"")


def test_the_dictionary_is_the_one_that_clients_announce() -> None:
    # Each zlib stream of SPDY/3 begins with this checksum of the dictionary.
    assert zlib.adler32(DICTIONARY) == 0xE3C6A7C2
    assert len(DICTIONARY) == 1423


# What moby/spdystream writes for the streams of `kubectl exec`, one of `kubectl port-forward`, and frames on them.
FROM_GO = [
    (
        "80030001 00000029 00000001 00000000 000078f9e3c6a7c26260606004a7b392a2d4c45c6851c29a0a0a6800000000ffff",
        spdy.StreamOpened(1, (("streamtype", "error"),), False, False),
    ),
    (
        "80030001 00000017 00000003 00000000 0000 c22e555c92929907000000ffff",
        spdy.StreamOpened(3, (("streamtype", "stdin"),), False, False),
    ),
    (
        "80030001 00000019 00000005 00000000 0000 c22ac5565c92925f5a02000000ffff",
        spdy.StreamOpened(5, (("streamtype", "stdout"),), False, False),
    ),
    (
        "80030001 00000015 00000007 00000000 0000 c229975a5404000000ffff",
        spdy.StreamOpened(7, (("streamtype", "stderr"),), False, False),
    ),
    (
        "80030001 0000002f 00000009 00000000 0000"
        "0225710c3950c19508a9038ac0d9cdc2c0c280818181b308926632417989d100000000ffff",
        spdy.StreamOpened(9, (("streamtype", "data"), ("port", "8080"), ("requestid", "0")), False, False),
    ),
    ("80030002 0000000e 00000002 6260606000000000ffff", None),  # a reply that nobody asked for
    (
        "80030008 0000001b 00000001 829acd9a5b9a539209ae49f252194acaf301000000ffff",
        spdy.Headers(1, (("multi", "one"), ("multi", "two")), False),
    ),
    ("00000001 00000005 68656c6c6f", spdy.Data(1, memoryview(b"hello"), False)),
    ("00000001 01000000", spdy.Data(1, NOTHING, True)),
    ("80030003 00000008 00000001 00000005", spdy.Reset(1, spdy.Status.CANCEL)),
    ("80030007 00000008 00000002 00000000", spdy.GoneAway(2, spdy.GoAwayStatus.OK)),
]


def test_the_frames_of_a_go_client_are_read() -> None:
    connection = spdy.Connection()
    for frame, event in FROM_GO:
        assert connection.receive(bytes.fromhex(frame)) == ([] if event is None else [event])


# What we send, byte for byte. Header blocks are stored blocks of zlib: 00, length, its complement, the text, and the
# empty block of a flush; the first one begins with zlib's head (78bb) and the dictionary's checksum.
EMPTY = "00 0400 fbff 00000000 00 0000 ffff"
SENT: list[tuple[str, Callable[[spdy.Connection], object], str]] = [
    ("SYN_REPLY", lambda c: c.reply(1), f"80030002 00000018 00000001 78bbe3c6a7c2 {EMPTY}"),
    ("SYN_REPLY with FLAG_FIN", lambda c: c.reply(1, end=True), f"80030002 01000018 00000001 78bbe3c6a7c2 {EMPTY}"),
    (
        "HEADERS",
        lambda c: c.headers(1, [("A", "b")]),
        "80030008 00000022 00000001 78bbe3c6a7c2 00 0e00 f1ff 00000001 00000001 61 00000001 62 00 0000 ffff",
    ),
    (
        "SYN_STREAM",
        lambda c: c.open(),
        f"80030001 0000001e 00000002 00000000 0000 78bbe3c6a7c2 {EMPTY}",
    ),
    (
        "SYN_STREAM with FLAG_FIN",
        lambda c: c.open(end=True),
        f"80030001 0100001e 00000002 00000000 0000 78bbe3c6a7c2 {EMPTY}",
    ),
    ("RST_STREAM", lambda c: c.reset(1, spdy.Status.CANCEL), "80030003 00000008 00000001 00000005"),
    ("PING", lambda c: c.ping(), "80030006 00000004 00000002"),
    ("GOAWAY", lambda c: c.go_away(), "80030007 00000008 00000001 00000000"),
    (
        "GOAWAY with a status",
        lambda c: c.go_away(spdy.GoAwayStatus.INTERNAL_ERROR),
        "80030007 00000008 00000001 00000002",
    ),
]


@pytest.mark.parametrize(("action", "wire"), [case[1:] for case in SENT], ids=[case[0] for case in SENT])
def test_each_kind_of_frame_is_sent_in_its_wire_form(action: Callable[[spdy.Connection], object], wire: str) -> None:
    connection = spdy.Connection()
    connection.receive(Peer().syn_stream(1))
    assert connection.take() == b""
    action(connection)
    assert connection.take() == bytes.fromhex(wire)
    assert connection.take() == b""


def test_data_is_sent_in_its_wire_form() -> None:
    connection, _ = opened()
    connection.send(1, b"hello")
    connection.send(1, b"")
    connection.send(1, b"!", end=True)
    assert connection.take() == bytes.fromhex("00000001 00000005 68656c6c6f  00000001 01000001 21")
    connection, _ = opened()
    connection.send(1, b"", end=True)
    assert connection.take() == bytes.fromhex("00000001 01000000")


def test_windows_are_sent_in_their_wire_form() -> None:
    connection = spdy.Connection(announce=True, limits=spdy.SpdyLimits(window=0x40000, streams=9))
    assert connection.take() == bytes.fromhex(
        "80030004 00000014 00000002  00000004 00000009  00000007 00040000"  # SETTINGS
        "80030009 00000008 00000000 00030000"  # WINDOW_UPDATE of the connection, which SETTINGS cannot change
    )


def test_a_client_speaks_first_with_odd_ids() -> None:
    client = spdy.Connection(client=True)
    assert client.open() == 1
    assert client.open() == 3
    assert client.ping() == 1
    assert client.ping() == 3
    assert [(kind, body[:4].hex()) for kind, _, body in frames(client.take())] == [
        (1, "00000001"),
        (1, "00000003"),
        (6, "00000001"),
        (6, "00000003"),
    ]


RECEIVED: list[tuple[str, str, list[spdy.Event]]] = [
    ("DATA", "00000001 00000003 616263", [spdy.Data(1, memoryview(b"abc"), False)]),
    ("DATA with FLAG_FIN", "00000001 01000001 61", [spdy.Data(1, memoryview(b"a"), True)]),
    ("an empty DATA", "00000001 00000000", []),
    ("an empty DATA with FLAG_FIN", "00000001 01000000", [spdy.Data(1, NOTHING, True)]),
    ("RST_STREAM", "80030003 00000008 00000001 00000003", [spdy.Reset(1, spdy.Status.REFUSED_STREAM)]),
    (
        "RST_STREAM with its unused bit",
        "80030003 00000008 80000001 00000003",
        [spdy.Reset(1, spdy.Status.REFUSED_STREAM)],
    ),
    ("RST_STREAM of another stream", "80030003 00000008 00000003 00000003", []),
    ("GOAWAY", "80030007 00000008 00000000 00000002", [spdy.GoneAway(0, spdy.GoAwayStatus.INTERNAL_ERROR)]),
    ("SETTINGS of no window", "80030004 0000000c 00000001 01000004 00000064", []),
    ("SETTINGS with a window", "80030004 0000000c 00000001 00000007 00020000", [spdy.WindowGrown(0)]),
    ("SETTINGS with the same window", "80030004 0000000c 00000001 00000007 00010000", []),
    ("SETTINGS with a smaller window", "80030004 0000000c 00000001 00000007 00000100", []),
    ("an empty SETTINGS", "80030004 00000004 00000000", []),
    ("WINDOW_UPDATE of a stream", "80030009 00000008 00000001 00000001", [spdy.WindowGrown(1)]),
    ("WINDOW_UPDATE of the connection", "80030009 00000008 00000000 00000001", [spdy.WindowGrown(0)]),
    ("WINDOW_UPDATE of another stream", "80030009 00000008 00000003 00000001", []),
    ("a frame of an unknown type", "8003000a 00000003 616263", []),
    ("an unknown frame without a body", "80030000 00000000", []),
    ("an unknown frame of the largest size", "80030005 00ffffff" + "00" * 0xFFFFFF, []),
]


@pytest.mark.parametrize(("wire", "events"), [case[1:] for case in RECEIVED], ids=[case[0] for case in RECEIVED])
def test_each_kind_of_frame_is_read(wire: str, events: list[spdy.Event]) -> None:
    connection, peer = opened()
    assert connection.receive(bytes.fromhex(wire)) == events
    # The frame has ended where it says so: the next one is read.
    assert connection.receive(peer.syn_stream(3)) == [spdy.StreamOpened(3, (), False, False)]


def test_the_numbers_are_the_specifications() -> None:
    # Sections 2.6.3 and 2.6.6; 10 is not in use any more.
    assert {status.value: status.name for status in spdy.Status} == {
        1: "PROTOCOL_ERROR",
        2: "INVALID_STREAM",
        3: "REFUSED_STREAM",
        4: "UNSUPPORTED_VERSION",
        5: "CANCEL",
        6: "INTERNAL_ERROR",
        7: "FLOW_CONTROL_ERROR",
        8: "STREAM_IN_USE",
        9: "STREAM_ALREADY_CLOSED",
        11: "FRAME_TOO_LARGE",
    }
    assert {status.value: status.name for status in spdy.GoAwayStatus} == {
        0: "OK",
        1: "PROTOCOL_ERROR",
        2: "INTERNAL_ERROR",
        7: "FLOW_CONTROL_ERROR",
    }


@pytest.mark.parametrize(("client", "last", "first"), [(True, 0x7FFFFFFF, 1), (False, 0x7FFFFFFE, 2)])
def test_the_ids_of_pings_begin_again_at_their_end(client: bool, last: int, first: int) -> None:
    connection = spdy.Connection(client=client)
    connection._next_ping = last
    assert [connection.ping(), connection.ping()] == [last, first]


def test_a_reply_is_read() -> None:
    client, peer = spdy.Connection(client=True), Peer()
    client.open()
    client.open()
    assert client.receive(peer.syn_reply(1, [(b"a", b"b")])) == [spdy.Replied(1, (("a", "b"),), False)]
    assert client.receive(peer.syn_reply(3, flags=1)) == [spdy.Replied(3, (), True)]


def test_pings_are_answered_as_they_came_and_answers_matched() -> None:
    connection = spdy.Connection()
    assert connection.receive(bytes.fromhex("80030006 00000004 00000007")) == []
    assert connection.take() == bytes.fromhex("80030006 00000004 00000007")
    ping = connection.ping()
    connection.take()
    answer = bytes.fromhex("80030006 00000004 00000002")
    assert connection.receive(answer) == [spdy.Pong(ping)]
    # An even one that this server did not send, or not again, is ignored (section 2.6.5).
    assert connection.receive(answer) == []
    assert connection.take() == b""


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_data_is_not_copied(kind: Callable[[bytes], bytes]) -> None:
    connection, _ = opened()
    given_bytes = kind(bytes.fromhex("00000001 00000003 616263"))
    (event,) = connection.receive(given_bytes)
    assert isinstance(event, spdy.Data)
    assert event.data.obj is (given_bytes.obj if isinstance(given_bytes, memoryview) else given_bytes)


def test_a_large_frame_is_handed_on_as_it_comes() -> None:
    connection, _ = opened()
    assert connection.receive(bytes.fromhex("00000001 01ffffff")) == []
    for _ in range(255):
        assert connection.receive(bytes(65536)) == [spdy.Data(1, memoryview(bytes(65536)), False)]
    assert connection.receive(bytes(65535)) == [spdy.Data(1, memoryview(bytes(65535)), True)]


def test_what_is_sent_is_cut_into_frames() -> None:
    connection, _ = opened(limits=spdy.SpdyLimits(frame=1000))
    connection.send(1, bytes(range(250)) * 10, end=True)
    assert [(flags, len(payload)) for _, flags, payload in frames(connection.take())] == [
        (0, 1000),
        (0, 1000),
        (1, 500),
    ]
    connection, _ = opened(limits=spdy.SpdyLimits(frame=1000))
    connection.send(1, bytes(2000))
    connection.send(1, bytes(2000), end=True)
    sent = [(flags, len(payload)) for _, flags, payload in frames(connection.take())]
    assert sent == [(0, 1000), (0, 1000), (0, 1000), (1, 1000)]


def test_a_buffer_that_is_sent_may_be_used_again_at_once() -> None:
    connection, _ = opened()
    buffer = bytearray(b"first")
    connection.send(1, buffer)
    buffer[:] = b"again"
    connection.send(1, memoryview(buffer))
    assert [payload for _, _, payload in frames(connection.take())] == [b"first", b"again"]


# Header blocks.

NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20).map(str.lower)
VALUES = st.text(st.characters(min_codepoint=1, max_codepoint=255), min_size=1, max_size=30)
HEADER_LISTS = st.lists(st.tuples(NAMES, VALUES), max_size=8)


def _merged(headers: list[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    values: dict[str, list[str]] = {}
    for name, value in headers:
        values.setdefault(name, []).append(value)
    return [(name.encode(), "\0".join(parts).encode("latin-1")) for name, parts in values.items()]


@given(st.lists(HEADER_LISTS, min_size=1, max_size=8))
def test_zlib_reads_our_blocks_as_one_stream(blocks: list[list[tuple[str, str]]]) -> None:
    connection, peer = spdy.Connection(), Peer()
    connection.receive(peer.syn_stream(1))
    for headers in blocks:
        connection.headers(1, headers)
        ((_, _, body),) = frames(connection.take())
        assert peer.read_block(body[4:]) == block_text(_merged(headers))


def test_zlib_reads_a_block_that_is_larger_than_a_stored_block() -> None:
    connection, _ = opened()
    connection.headers(1, [("a", "b" * 200_000)])
    ((_, _, body),) = frames(connection.take())
    text = Peer().read_block(bytes.fromhex("78bbe3c6a7c2") + body[4:])
    assert text == block_text([(b"a", b"b" * 200_000)])


@given(st.lists(HEADER_LISTS, min_size=1, max_size=8), st.integers(0, 9))
def test_the_blocks_of_any_zlib_are_read_as_one_stream(blocks: list[list[tuple[str, str]]], level: int) -> None:
    connection, peer = spdy.Connection(), Peer(level)
    connection.receive(peer.syn_stream(1))
    for headers in blocks:
        merged = _merged(headers)
        (event,) = connection.receive(peer.headers(1, merged))
        assert isinstance(event, spdy.Headers)
        assert sorted(event.headers) == sorted(headers)


def test_a_stream_of_blocks_longer_than_zlibs_window_is_read() -> None:
    connection, peer = spdy.Connection(), Peer()
    connection.receive(peer.syn_stream(1))
    for turn in range(400):  # 200 KB, with repetitions from near and far for the compressor to refer to
        value = b"%d " % (turn % 37) * 100 + b"%d" % turn
        (event,) = connection.receive(peer.headers(1, [(b"turn", value)]))
        assert event == spdy.Headers(1, (("turn", value.decode()),), False)


def test_a_block_of_a_frame_that_is_refused_is_part_of_the_stream() -> None:
    connection, peer = opened()
    connection.receive(peer.headers(99, [(b"unusual-name", b"unusual-value")]))
    connection.receive(peer.syn_stream(3, text=b"not a header block"))
    connection.go_away()
    connection.receive(peer.syn_stream(5, [(b"ignored", b"after our goaway")]))
    (event,) = connection.receive(peer.headers(1, [(b"unusual-name", b"unusual-value after our goaway")]))
    assert event == spdy.Headers(1, (("unusual-name", "unusual-value after our goaway"),), False)


def test_a_block_without_headers_may_be_left_out() -> None:
    connection, peer = spdy.Connection(), Peer()
    assert connection.receive(control(SYN_STREAM, struct.pack(">IIH", 1, 0, 0))) == [
        spdy.StreamOpened(1, (), False, False)
    ]
    assert connection.receive(control(HEADERS, struct.pack(">I", 1), 1)) == [spdy.Headers(1, (), True)]
    stream = connection.open()
    assert connection.receive(control(SYN_REPLY, struct.pack(">I", stream))) == [spdy.Replied(stream, (), False)]
    assert connection.receive(peer.syn_stream(3, [(b"a", b"b")])) == [spdy.StreamOpened(3, (("a", "b"),), False, False)]


def test_an_empty_value_and_bytes_beyond_ascii_pass() -> None:
    connection, peer = opened()
    (event,) = connection.receive(peer.headers(1, [(b"empty", b""), (b"bytes", b"\xff\x01")]))
    assert event == spdy.Headers(1, (("empty", ""), ("bytes", "\xff\x01")), False)


BAD_TEXTS = {
    "shorter than its count": b"\0\0",
    "more headers than bytes": block_text([], count=2**32 - 1),
    "fewer headers than counted": block_text([(b"name", b"v" * 20)], count=2),
    "bytes after the last header": block_text([(b"a", b"b")]) + b"\0",
    "a name beyond the block": struct.pack(">II", 1, 2**31) + b"abcd",
    "a value beyond the block": struct.pack(">II", 1, 1) + b"a" + struct.pack(">I", 9) + b"short",
    "an empty name": block_text([(b"", b"value")]),
    "a name with capitals": block_text([(b"Name", b"value")]),
    "a name with a NUL": block_text([(b"na\0me", b"value")]),
    "a name with a space": block_text([(b"na me", b"value")]),
    "a name beyond ASCII": block_text([(b"n\xe4me", b"value")]),
    "a name twice": block_text([(b"a", b"b"), (b"a", b"c")]),
    "a NUL before the value": block_text([(b"a", b"\0b")]),
    "a NUL after the value": block_text([(b"a", b"b\0")]),
    "two NULs in a row": block_text([(b"a", b"b\0\0c")]),
    "nothing but a NUL": block_text([(b"a", b"\0")]),
}


@pytest.mark.parametrize("text", BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_a_bad_header_block_is_the_streams_fault_alone(text: bytes) -> None:
    connection, peer = opened()
    (refused,) = connection.receive(peer.syn_stream(3, text=text))
    assert isinstance(refused, spdy.Refused)
    assert (refused.stream, refused.status) == (3, spdy.Status.PROTOCOL_ERROR)
    (reset,) = connection.receive(peer.headers(1, text=text))
    assert isinstance(reset, spdy.Reset)
    assert (reset.stream, reset.status) == (1, spdy.Status.PROTOCOL_ERROR)
    assert reset.reason == refused.reason != ""
    assert connection.receive(peer.syn_stream(5, [(b"a", b"b")])) == [spdy.StreamOpened(5, (("a", "b"),), False, False)]


def _first_block(block: bytes) -> bytes:
    return control(SYN_STREAM, struct.pack(">IIH", 1, 0, 0) + block)


def _zlib(dictionary: bytes, text: bytes, flush: int = zlib.Z_SYNC_FLUSH) -> bytes:
    deflate = zlib.compressobj(zdict=dictionary) if dictionary else zlib.compressobj()
    return deflate.compress(text) + deflate.flush(flush)


BAD_BLOCKS = {
    "no zlib": b"\x00\x00\x00\x00\x00\x00\xff\xff",
    "one byte": b"\x78",
    "zlib without a dictionary": _zlib(b"", block_text([])),
    "zlib with another dictionary": _zlib(b"another", block_text([])),
    "a wrong check of zlib's head": b"\x78\xba" + _zlib(DICTIONARY, block_text([]))[2:],
    "zlib without a flush": _zlib(DICTIONARY, block_text([]))[:-4],
    "zlib that is at its end": _zlib(DICTIONARY, block_text([]), zlib.Z_FINISH),
    "a wrong block of deflate": _zlib(DICTIONARY, block_text([]))[:6] + b"\xff\x00\x00\xff\xff",
    "bytes after the end of deflate": _zlib(DICTIONARY, block_text([]), zlib.Z_FINISH) + b"\x00\x00\xff\xff",
}


@pytest.mark.parametrize("block", BAD_BLOCKS.values(), ids=BAD_BLOCKS)
def test_a_block_that_is_not_spdys_zlib_ends_the_connection(block: bytes) -> None:
    connection = spdy.Connection()
    (event,) = connection.receive(_first_block(block))
    assert isinstance(event, spdy.ConnectionFailed)
    assert event.status == spdy.GoAwayStatus.PROTOCOL_ERROR
    assert connection.take() == bytes.fromhex("80030007 00000008 00000000 00000001")


@pytest.mark.parametrize("length", [1000, 1001, 100_000_000])
def test_a_block_that_swells_is_not_decompressed_beyond_the_bound(length: int) -> None:
    limits = spdy.SpdyLimits(headers=1000, control=1 << 20)
    connection, peer = spdy.Connection(limits=limits), Peer()
    text = block_text([(b"a", b"b" * (length - 13))])
    (event,) = connection.receive(peer.syn_stream(1, text=text))
    if length == 1000:
        assert isinstance(event, spdy.StreamOpened)
    else:
        assert event == spdy.ConnectionFailed(
            spdy.GoAwayStatus.PROTOCOL_ERROR, "a header block has more than 1000 bytes when it is decompressed"
        )


def test_headers_are_bounded_in_number_each_value_counted() -> None:
    connection, peer = spdy.Connection(limits=spdy.SpdyLimits(pairs=3)), Peer()
    names = [(b"%d" % number, b"") for number in range(4)]
    assert isinstance(connection.receive(peer.syn_stream(1, names[:3]))[0], spdy.StreamOpened)
    assert connection.receive(peer.syn_stream(3, names)) == [
        spdy.Refused(3, spdy.Status.FRAME_TOO_LARGE, "4 headers, more than 3")
    ]
    assert isinstance(connection.receive(peer.syn_stream(5, [(b"a", b"1\x002\x003")]))[0], spdy.StreamOpened)
    assert isinstance(connection.receive(peer.syn_stream(7, [(b"a", b"1\x002\x003\x004")]))[0], spdy.Refused)


@pytest.mark.parametrize(
    "header",
    [("", "v"), ("a b", "v"), ("a\0", "v"), ("ä", "v"), ("a", "v\0w"), ("a", "€"), ("a", "v" * (1 << 20))],
    ids=["no name", "space", "NUL in the name", "name beyond ASCII", "NUL", "beyond Latin-1", "too long"],
)
def test_headers_that_cannot_be_sent_are_refused_and_nothing_is_sent(header: tuple[str, str]) -> None:
    connection, peer = spdy.Connection(), Peer()
    connection.receive(peer.syn_stream(1))
    for action in (connection.open, lambda headers: connection.reply(1, headers)):
        with pytest.raises(spdy.LocalError):
            action([("fine", "value"), header])
    assert connection.take() == b""
    connection.reply(1)
    assert connection.open() == 2
    assert [
        peer.read_block(body[at:]) for (_, _, body), at in zip(frames(connection.take()), (4, 10), strict=True)
    ] == [
        block_text([]),
        block_text([]),
    ]


def test_an_empty_value_among_several_cannot_be_sent() -> None:
    connection, _ = opened()
    connection.headers(1, [("a", "")])
    with pytest.raises(spdy.LocalError, match="'a'"):
        connection.headers(1, [("a", ""), ("A", "b")])
