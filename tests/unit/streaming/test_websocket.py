"""Channels and tunnels over WebSocket, with wsproto's client at the other end, and with invalid bytes."""

from __future__ import annotations

import base64
import os
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage
from wsproto.frame_protocol import CloseReason

from criserver.streaming.websocket import (
    BASE64_PROTOCOLS,
    BINARY_PROTOCOLS,
    ChannelClosed,
    ChannelData,
    Channels,
    Closed,
    Tunnel,
    TunnelData,
    channel_limit,
)
from tests.fuzz import websocket as fuzz

V4, V5, V4_BASE64 = "v4.channel.k8s.io", "v5.channel.k8s.io", "v4.base64.channel.k8s.io"
EVERY = sorted(BINARY_PROTOCOLS | BASE64_PROTOCOLS)


def channels(subprotocol: str = V4) -> Channels:
    """As they are for a command with stdin and output."""
    return Channels(subprotocol, readable={0, 4}, writable={1, 3})


def client() -> Connection:
    return Connection(ConnectionType.CLIENT)


def received(by: Connection, data: bytes) -> list[Any]:
    by.receive_data(data)
    return list(by.events())


def frame(first: int, payload: bytes, *, mask: bytes | None = b"\x11\x22\x33\x44", length: int | None = None) -> bytes:
    """A frame by hand: its first byte, and a payload, whose length may be a lie."""
    size = len(payload) if length is None else length
    masked = 0x80 if mask is not None else 0
    if size < 126:
        head = bytes((first, masked | size))
    elif size < 1 << 16:
        head = bytes((first, masked | 126)) + struct.pack("!H", size)
    else:
        head = bytes((first, masked | 127)) + struct.pack("!Q", size)
    if mask is None:
        return head + payload
    return head + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))


TEXT, BINARY, CONTINUED, CLOSE, PING, PONG = 0x81, 0x82, 0x80, 0x88, 0x89, 0x8A


def joined(events: list[Any]) -> list[Any]:
    """The events with what was written to one channel, or the tunnel, in one piece."""
    found: list[Any] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, ChannelData) and isinstance(last, ChannelData) and last.channel == event.channel:
            found[-1] = ChannelData(event.channel, last.data + event.data)
        elif isinstance(event, TunnelData) and isinstance(last, TunnelData):
            found[-1] = TunnelData(last.data + event.data)
        else:
            found.append(event)
    return found


# --- channels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subprotocol", sorted(BINARY_PROTOCOLS))
@pytest.mark.parametrize("size", [0, 1, 124, 125, 65534, 65535, 200_000])
def test_a_binary_message_begins_with_its_channel(subprotocol: str, size: int) -> None:
    data = os.urandom(size)
    here, there = channels(subprotocol), client()
    here.send(1, data)
    (*parts, last) = received(there, here.take())
    assert all(isinstance(part, BytesMessage) for part in (*parts, last))
    assert last.message_finished
    assert b"".join(part.data for part in (*parts, last)) == b"\x01" + data
    assert here.take() == b""

    events = joined(here.receive(there.send(BytesMessage(b"\x00" + data))))
    assert events == ([ChannelData(0, data)] if data else [])


@pytest.mark.parametrize("subprotocol", sorted(BASE64_PROTOCOLS))
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 65535, 200_000])
def test_a_base64_message_begins_with_a_digit(subprotocol: str, size: int) -> None:
    data = os.urandom(size)
    here, there = channels(subprotocol), client()
    here.send(3, data)
    events = received(there, here.take())
    assert all(isinstance(event, TextMessage) for event in events)
    assert "".join(event.data for event in events) == "3" + base64.b64encode(data).decode()

    text = "4" + base64.b64encode(data).decode()
    assert joined(here.receive(there.send(TextMessage(text)))) == ([ChannelData(4, data)] if data else [])


@pytest.mark.parametrize("subprotocol", EVERY)
def test_one_client_and_one_server_of_ours(subprotocol: str) -> None:
    here = channels(subprotocol)
    there = Channels(subprotocol, readable={1, 3}, writable={0, 4}, client=True)
    there.send(0, b"to the server")
    here.send(1, b"to the client")
    assert here.receive(there.take()) == [ChannelData(0, b"to the server")]
    assert there.receive(here.take()) == [ChannelData(1, b"to the client")]


def test_an_empty_message_tells_that_a_command_is_connected() -> None:
    here = channels()
    here.send(1, b"")
    assert here.take() == b"\x82\x01\x01"


def test_parts_of_a_message_are_handed_on_as_they_come() -> None:
    here = channels()
    message = frame(BINARY, b"\0" + b"x" * 1000, mask=b"\0\0\0\0")
    assert here.receive(message[:500]) == [ChannelData(0, b"x" * 491)]
    assert here.receive(message[500:501]) == [ChannelData(0, b"x")]
    assert joined(here.receive(message[501:])) == [ChannelData(0, b"x" * 508)]


def test_a_fragmented_message_keeps_its_channel() -> None:
    here, there = channels(), client()
    first = there.send(BytesMessage(b"\0one", message_finished=False))
    ping = there.send(Ping(b"between"))
    last = there.send(BytesMessage(b"two", message_finished=True))
    assert here.receive(first + ping + last) == [ChannelData(0, b"one"), ChannelData(0, b"two")]
    assert here.receive(there.send(BytesMessage(b"\4three"))) == [ChannelData(4, b"three")]


def test_the_first_byte_of_a_message_may_come_in_a_later_frame() -> None:
    here = channels()
    assert here.receive(frame(0x02, b"") + frame(0x00, b"") + frame(CONTINUED, b"\0a")) == [ChannelData(0, b"a")]


def test_the_remainder_of_base64_does_not_leak_into_the_next_message() -> None:
    here = channels(V4_BASE64)
    assert here.receive(frame(TEXT, b"0YQ==") + frame(TEXT, b"4Yg==")) == [ChannelData(0, b"a"), ChannelData(4, b"b")]


def test_line_breaks_within_base64_count_for_nothing() -> None:
    assert joined(channels(V4_BASE64).receive(frame(TEXT, b"0YW\r\nJj\r\n\r\nZA==\n"))) == [ChannelData(0, b"abcd")]


def test_text_and_binary_messages_are_the_same() -> None:
    assert channels(V4).receive(frame(TEXT, b"\0text")) == [ChannelData(0, b"text")]
    assert channels(V4_BASE64).receive(frame(BINARY, b"0YQ==")) == [ChannelData(0, b"a")]


@pytest.mark.parametrize("channel", [1, 2, 3, 5, 47, 254, 255])
def test_data_for_channels_that_the_client_may_not_write_to_is_dropped(channel: int) -> None:
    here = channels()
    assert here.receive(frame(BINARY, bytes((channel,)) + b"no") + frame(BINARY, b"\0yes")) == [ChannelData(0, b"yes")]
    assert here.open
    here = channels(V4_BASE64)
    text = bytes((48 + channel & 255,)) + b"not base64!"
    assert here.receive(frame(BINARY, text) + frame(TEXT, b"0YQ==")) == [ChannelData(0, b"a")]
    assert here.open


def test_empty_messages_are_dropped() -> None:
    here = channels()
    assert here.receive(frame(BINARY, b"") + frame(BINARY, b"\0")) == []
    assert here.open


def test_what_is_sent_to_a_channel_that_the_client_did_not_ask_for_is_dropped() -> None:
    here = channels()
    here.send(2, b"stderr")
    here.send(0, b"stdin")
    assert here.take() == b""


@pytest.mark.parametrize(
    "text", [b"0YQ=", b"0Y", b"0YQ==YQ==", b"0YQ==\nY", b"0Y!==", b"0====", b"0YWJj=", "0YÄ=".encode()]
)
def test_what_is_not_base64_is_refused(text: bytes) -> None:
    here, there = channels(V4_BASE64), client()
    (*_, closed) = here.receive(frame(TEXT, text))
    assert isinstance(closed, Closed)
    assert closed.code == 1007
    assert [event.code for event in received(there, here.take())] == [1007]


@pytest.mark.parametrize("cut", range(1, 8))
def test_base64_goes_on_after_its_end_in_another_part(cut: int) -> None:
    here = channels(V4_BASE64)
    (*_, closed) = [*here.receive(frame(0x01, b"0YQ==YQ=="[:cut])), *here.receive(frame(CONTINUED, b"0YQ==YQ=="[cut:]))]
    assert closed.code == 1007


def test_channels_have_bounds() -> None:
    assert channel_limit(V4) == 255
    last = Channels(V4, readable=(), writable={254})
    last.send(254, b"x")
    assert last.take() == b"\x82\x02\xfex"
    last = Channels(V4_BASE64, readable={79}, writable={79})
    last.send(79, b"")
    assert last.take() == b"\x81\x01\x7f"
    assert last.receive(frame(TEXT, b"\x7fYQ==")) == [ChannelData(79, b"a")]
    with pytest.raises(ValueError, match="0 to 79"):
        Channels(V4_BASE64, readable={80}, writable=())
    with pytest.raises(ValueError, match="0 to 254"):
        Channels(V4, readable=(), writable={255})


def test_a_sub_protocol_without_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="no sub-protocol with channels"):
        Channels("v3.channel.k8s.io", readable=(), writable=())


# --- the sign of closing a channel ----------------------------------------------------------------------------------


def test_a_client_of_version_5_closes_its_stdin() -> None:
    here = channels(V5)
    there = Channels(V5, readable={1, 3}, writable={0, 4}, client=True)
    there.send(0, b"last")
    there.close(0)
    there.send(0, b"never sent")
    there.close(0)
    assert here.receive(there.take()) == [ChannelData(0, b"last"), ChannelClosed(0)]
    here.send(1, b"output goes on")
    assert there.receive(here.take()) == [ChannelData(1, b"output goes on")]


@pytest.mark.parametrize("size", [1, 2])
def test_the_sign_of_closing_may_be_cut(size: int) -> None:
    here = channels(V5)
    sign = frame(0x02, b"\xff") + frame(CONTINUED, b"\0")
    assert [event for at in range(0, len(sign), size) for event in here.receive(sign[at : at + size])] == [
        ChannelClosed(0)
    ]


def test_a_channel_closes_once_and_takes_nothing_afterwards() -> None:
    here = channels(V5)
    assert here.receive(frame(BINARY, b"\xff\0") * 2 + frame(BINARY, b"\0late")) == [ChannelClosed(0)]
    assert here.receive(frame(BINARY, b"\xff\1")) == []  # a channel that the client does not write to anyway
    assert here.open


@pytest.mark.parametrize("sign", [b"\xff", b"\xff\5", b"\xff\xff", b"\xff\0\0", b"\xff" * 1000])
def test_a_wrong_sign_of_closing_ends_the_connection(sign: bytes) -> None:
    here = channels(V5)
    (closed,) = here.receive(frame(BINARY, sign))
    assert closed.code == 1002
    assert here.ended


@pytest.mark.parametrize("subprotocol", sorted(BINARY_PROTOCOLS - {V5}))
def test_no_other_version_has_a_sign_of_closing(subprotocol: str) -> None:
    here = channels(subprotocol)
    assert here.receive(frame(BINARY, b"\xff\0") + frame(BINARY, b"\0on")) == [ChannelData(0, b"on")]
    there = Channels(subprotocol, readable=(), writable={0}, client=True)
    there.close(0)
    assert there.take() == b""


def test_a_server_closes_a_channel_without_a_sign() -> None:
    here = channels(V5)
    here.close(1)
    here.send(1, b"too late")
    assert here.take() == b""


# --- pings and closing ----------------------------------------------------------------------------------------------


def test_a_ping_is_answered() -> None:
    here, there = channels(), client()
    assert here.receive(there.send(Ping(b"beat"))) == []
    assert received(there, here.take()) == [Pong(b"beat")]


def test_a_pong_that_nobody_asked_for_is_ignored() -> None:
    here = channels()
    assert here.receive(frame(PONG, b"x")) == []
    assert here.take() == b""


def test_a_flood_of_pings_costs_one_pong() -> None:
    here = channels()
    for number in range(1000):
        here.receive(frame(PING, struct.pack("!I", number)))
    assert here.take() == b"\x8a\x04" + struct.pack("!I", 999)


@pytest.mark.parametrize(("code", "reason"), [(1000, "done"), (1001, ""), (3000, "library"), (4999, "own")])
def test_the_client_closes(code: int, reason: str) -> None:
    here, there = channels(), client()
    assert here.receive(there.send(CloseConnection(code, reason)) + frame(BINARY, b"\0after")) == [Closed(code, reason)]
    assert here.ended
    assert not here.open
    here.send(1, b"nobody reads this")
    here.close_all()
    (answer,) = received(there, here.take())
    assert answer.code == code
    assert there.state is ConnectionState.CLOSED
    assert here.receive(frame(PING, b"")) == []
    assert here.take() == b""


def test_the_client_closes_without_a_code() -> None:
    here = channels()
    assert here.receive(frame(CLOSE, b"")) == [Closed(1005, "")]
    assert here.take() == b"\x88\x00"


def test_the_server_closes() -> None:
    here, there = channels(), client()
    here.send(1, b"last words")
    here.close_all(1000, "exited")
    here.close_all(1011)
    here.send(1, b"dropped")
    last, close = received(there, here.take())
    assert last.data == b"\1last words"
    assert (close.code, close.reason) == (1000, "exited")
    assert not here.open
    assert not here.ended

    late = frame(BINARY, b"\0still sending")  # on its way when the close reached the client
    assert here.receive(late + there.send(close.response())) == [Closed(1000, "exited")]
    assert here.ended
    assert here.take() == b""


def test_a_long_reason_is_cut_between_characters() -> None:
    here = channels()
    here.close_all(1011, "ä" * 100)
    (close,) = received(client(), here.take())
    assert close.reason == "ä" * 61


BROKEN = {
    "unmasked": (1002, frame(BINARY, b"\0x", mask=None)),
    "reserved bit": (1002, frame(0xC2, b"\0x")),
    "reserved opcode": (1002, frame(0x83, b"\0x")),
    "reserved control opcode": (1002, frame(0x8B, b"")),
    "fragmented ping": (1002, frame(0x09, b"")),
    "long ping": (1002, frame(PING, b"x" * 126)),
    "long close": (1002, frame(CLOSE, b"\x03\xe8" + b"x" * 124)),
    "continuation of nothing": (1002, frame(CONTINUED, b"x")),
    "message within a message": (1002, frame(0x02, b"\0x") + frame(BINARY, b"\0y")),
    "length in too many bytes": (1002, b"\x82\xfe\x00\x7d"),
    "length in far too many bytes": (1002, b"\x82\xff" + struct.pack("!Q", 65535)),
    "negative length": (1002, b"\x82\xff" + struct.pack("!Q", 1 << 63)),
    "close of one byte": (1002, frame(CLOSE, b"\x03")),
    "close with code 999": (1002, frame(CLOSE, struct.pack("!H", 999))),
    "close with code 1005": (1002, frame(CLOSE, struct.pack("!H", 1005))),
    "close with code 5000": (1002, frame(CLOSE, struct.pack("!H", 5000))),
    "close with bad UTF-8": (1007, frame(CLOSE, b"\x03\xe8\xff")),
    "text with bad UTF-8": (1007, frame(TEXT, b"\0\xff")),
    "text that ends within a character": (1007, frame(TEXT, b"\0\xc3")),
}


@pytest.mark.parametrize("step", [1, 1 << 20])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_ends_the_connection(name: str, step: int) -> None:
    code, data = BROKEN[name]
    data += frame(BINARY, b"\0after")
    here, there = channels(), client()
    events = [event for at in range(0, len(data), step) for event in here.receive(data[at : at + step])]
    assert [event.code for event in events if isinstance(event, Closed)] == [code]
    assert events[-1].code == code
    assert not any(event.data == b"after" for event in events[:-1])
    (close,) = received(there, here.take())
    assert close.code == code
    assert here.ended
    here.send(1, b"dropped")
    assert here.take() == b""


def test_a_broken_rule_after_our_close_is_not_answered() -> None:
    here = channels()
    here.close_all()
    here.take()
    (closed,) = here.receive(frame(0xC2, b""))
    assert closed.code == 1002
    assert here.take() == b""


def test_a_message_that_claims_the_largest_size_is_read_in_parts() -> None:
    here = channels()
    head = frame(BINARY, b"\0", length=(1 << 63) - 1)
    assert here.receive(head) == []
    for _ in range(100):
        (event,) = here.receive(b"x" * 1000)
        assert len(event.data) == 1000
    assert len(here._wire._proto._frame_decoder.buffer) == 0


# --- the tunnel -----------------------------------------------------------------------------------------------------


def test_a_tunnel_is_a_stream_of_bytes() -> None:
    here, there = Tunnel(), client()
    data = os.urandom(100_000)
    sent = there.send(BytesMessage(data[:10], message_finished=False)) + there.send(BytesMessage(data[10:]))
    assert joined(here.receive(sent)) == [TunnelData(data)]
    here.send(data)
    here.send(b"more")
    assert b"".join(event.data for event in received(there, here.take())) == data + b"more"
    assert here.receive(frame(BINARY, b"")) == []
    assert here.receive(there.send(Ping(b"beat"))) == []
    assert received(there, here.take()) == [Pong(b"beat")]
    assert here.receive(there.send(CloseConnection(CloseReason.NORMAL_CLOSURE))) == [Closed(1000, "")]


def test_a_tunnel_takes_no_text() -> None:
    here = Tunnel()
    (closed,) = here.receive(frame(TEXT, b"text"))
    assert closed.code == 1003
    assert received(client(), here.take())[0].code == 1003


def test_both_ends_of_a_tunnel_may_be_ours() -> None:
    here, there = Tunnel(), Tunnel(client=True)
    there.send(bytearray(b"SYN"))
    here.send(memoryview(b"REPLY"))
    assert here.receive(there.take()) == [TunnelData(b"SYN")]
    assert there.receive(here.take()) == [TunnelData(b"REPLY")]


# --- bytes of any kind ----------------------------------------------------------------------------------------------

MASKS = st.sampled_from([b"\0\0\0\0", b"\x11\x22\x33\x44"])
PAYLOADS = st.binary(max_size=12) | st.sampled_from([b"\0data", b"\xff\0", b"0YWJj", b"0YQ==", b"4Yg==", b"\x03\xe8ok"])
FRAMES = st.builds(
    lambda first, payload, mask: frame(first, payload, mask=mask),
    st.sampled_from([0x00, 0x01, 0x02, TEXT, BINARY, BINARY, CONTINUED, PING]) | st.integers(0, 255),
    PAYLOADS,
    MASKS,
)


@given(st.integers(0, 255), st.integers(0, 255), st.lists(FRAMES | st.binary(max_size=6), max_size=6))
def test_no_bytes_raise_and_how_they_are_cut_makes_no_difference(kind: int, size: int, frames: list[bytes]) -> None:
    fuzz.check(bytes((kind, size)) + b"".join(frames))
