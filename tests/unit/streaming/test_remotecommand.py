"""Exec and attach on the wire: versions, streams, statuses and terminal sizes."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criserver.errors import InvalidArgumentError
from criserver.streaming.remotecommand import (
    SPDY_PROTOCOLS,
    WEBSOCKET_PROTOCOLS,
    ProtocolFeatures,
    RequestedStreams,
    ResizeDecoder,
    StreamType,
    TerminalSize,
    exit_message,
    failure_message,
    negotiate,
    stream_type,
)
from criserver.streaming.websocket import BASE64_PROTOCOLS, BINARY_PROTOCOLS

V1, V2, V3, V4, V5 = ("channel.k8s.io", *(f"v{number}.channel.k8s.io" for number in (2, 3, 4, 5)))
TEXT, STATUS = ProtocolFeatures(resize=True, status=False), ProtocolFeatures(resize=True, status=True)


# --- versions and streams -------------------------------------------------------------------------------------------


def test_the_versions_over_spdy() -> None:
    assert list(SPDY_PROTOCOLS) == [V4, V3, V2, V1]
    assert [features.resize for features in SPDY_PROTOCOLS.values()] == [True, True, False, False]
    assert [features.status for features in SPDY_PROTOCOLS.values()] == [True, False, False, False]


def test_every_version_over_websocket_is_one_that_a_connection_speaks() -> None:
    assert set(WEBSOCKET_PROTOCOLS) == BINARY_PROTOCOLS | BASE64_PROTOCOLS
    assert all(features.resize for features in WEBSOCKET_PROTOCOLS.values())
    assert {name for name, features in WEBSOCKET_PROTOCOLS.items() if features.status} == {
        V5,
        V4,
        "v4.base64.channel.k8s.io",
    }


@pytest.mark.parametrize(
    ("offered", "accepted", "chosen"),
    [
        ((V5, V4, V3, V2, V1), SPDY_PROTOCOLS, V4),  # kubectl over SPDY
        ((V5,), WEBSOCKET_PROTOCOLS, V5),  # kubectl and crictl over WebSocket
        ((V1, V4), SPDY_PROTOCOLS, V1),  # the client's order counts
        ((V5,), SPDY_PROTOCOLS, None),
        ((V2, V3), WEBSOCKET_PROTOCOLS, None),
        (("V4.CHANNEL.K8S.IO",), SPDY_PROTOCOLS, None),
        ((), WEBSOCKET_PROTOCOLS, ""),
        ((), SPDY_PROTOCOLS, None),
    ],
)
def test_the_first_protocol_of_the_client_that_is_known(
    offered: tuple[str, ...], accepted: dict[str, ProtocolFeatures], chosen: str | None
) -> None:
    assert negotiate(offered, accepted) == chosen


def test_streams_and_their_channels() -> None:
    assert [(stream.header, int(stream)) for stream in StreamType] == [
        ("stdin", 0), ("stdout", 1), ("stderr", 2), ("error", 3), ("resize", 4),
    ]  # fmt: skip
    for stream in StreamType:
        assert stream_type([("other", "x"), ("streamtype", stream.header), ("streamtype", "later")]) is stream


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ([], "without the header"),
        ([("streamtype", "")], "without the header"),
        ([("streamtype", "STDIN")], "'STDIN' is none"),
    ],
)
def test_streams_of_no_known_type_are_refused(headers: list[tuple[str, str]], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        stream_type(headers)


def test_the_streams_that_a_client_opens_over_spdy() -> None:
    error, resize = StreamType.ERROR, StreamType.RESIZE
    shell = RequestedStreams(stdin=True, stdout=True, stderr=False, tty=True)
    assert shell.spdy_streams(SPDY_PROTOCOLS[V4]) == {StreamType.STDIN, StreamType.STDOUT, error, resize}
    assert shell.spdy_streams(SPDY_PROTOCOLS[V2]) == {StreamType.STDIN, StreamType.STDOUT, error}
    output = RequestedStreams(stdin=False, stdout=True, stderr=True, tty=False)
    assert output.spdy_streams(SPDY_PROTOCOLS[V4]) == {StreamType.STDOUT, StreamType.STDERR, error}


def test_the_channels_of_a_websocket() -> None:
    output = RequestedStreams(stdin=False, stdout=False, stderr=True, tty=False)
    assert output.websocket_channels() == (frozenset(), frozenset({StreamType.STDERR, StreamType.ERROR}))
    assert output.greeting_channel() is StreamType.STDERR
    assert RequestedStreams(stdin=True, stdout=True, stderr=True, tty=False).greeting_channel() is StreamType.STDOUT
    stdin = RequestedStreams(stdin=True, stdout=False, stderr=False, tty=False)
    assert stdin.websocket_channels() == (frozenset({StreamType.STDIN}), frozenset({StreamType.ERROR}))
    assert stdin.greeting_channel() is StreamType.ERROR


# --- statuses -------------------------------------------------------------------------------------------------------


def test_success() -> None:
    assert exit_message(0, STATUS) == b'{"status":"Success"}'
    assert exit_message(0, TEXT) == b""


def test_an_exit_code_is_a_cause() -> None:
    assert json.loads(exit_message(137, STATUS)) == {
        "status": "Failure",
        "message": "command terminated with non-zero exit code: 137",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": "137"}]},
    }
    assert exit_message(137, TEXT) == b"command terminated with non-zero exit code: 137"


def test_an_internal_error() -> None:
    assert json.loads(failure_message('no "sh" \ud800', STATUS)) == {
        "status": "Failure",
        "message": 'Internal error occurred: no "sh" \ud800',
        "reason": "InternalError",
        "code": 500,
    }
    assert failure_message("no sh \ud800", TEXT) == b"Internal error occurred: no sh ?"


# --- terminal sizes -------------------------------------------------------------------------------------------------


def sizes(pieces: list[bytes]) -> list[TerminalSize]:
    decoder = ResizeDecoder()
    return [size for piece in pieces if (size := decoder.feed(piece)) is not None]


def test_a_size() -> None:
    decoder = ResizeDecoder()
    assert decoder.feed(b'{"Width":80,"Height":24}\n') == TerminalSize(80, 24)
    assert decoder.feed(b"") is None
    assert not decoder.ended


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (b'{"Height":24,"Width":80}', TerminalSize(80, 24)),
        (b' \t\r\n{ "width" : 80 , "HEIGHT" : 24 }', TerminalSize(80, 24)),
        (b'{"Width":80}', TerminalSize(80, 0)),
        (b"{}", TerminalSize(0, 0)),
        (b'{"Width":65535,"Height":65535,"Depth":["a"]}', TerminalSize(65535, 65535)),
    ],
)
def test_sizes_in_other_words(text: bytes, size: TerminalSize) -> None:
    assert ResizeDecoder().feed(text) == size


def test_the_last_of_several_sizes_counts() -> None:
    assert ResizeDecoder().feed(
        b'{"Width":1,"Height":2}{"Width":3,"Height":4}\n{"Width":5,"Height":6}{"Wi'
    ) == TerminalSize(5, 6)


def test_byte_by_byte() -> None:
    text = b'{"Width":1,"Height":2}{"Width":3,"Height":4}'
    assert sizes([text[at : at + 1] for at in range(len(text))]) == [TerminalSize(1, 2), TerminalSize(3, 4)]


@pytest.mark.parametrize(
    "garbage",
    [
        b"80x24",
        b"null",
        b"[]",
        b"}",
        b"{{",
        b"{]}",
        b'{"Width":{"a":1}}',
        b'{"Width":"80"}',
        b'{"Width":80.0}',
        b'{"Width":true}',
        b'{"Width":null}',
        b'{"Width":-1}',
        b'{"Width":65536}',
        b'{"Width":NaN}',
        b'{"Width":1e1}',
        b'{"a":"}{"}',
        b'{"a":"\xff"}',
        b'{"\0":1',
        b'{"Width":' + b"9" * 900 + b"}",
        b'{"a":' + b"[" * 1015 + b"}",
        b'{"a":"' + b"x" * 1020 + b'"}',
        b'{"a":"' + b"x" * 1020,
        b"\xef\xbb\xbf{}",
    ],
    ids=range(23),
)
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_garbage_ends_the_stream(garbage: bytes, step: int) -> None:
    text = b'{"Width":1,"Height":2}' + garbage + b'}{"Width":3,"Height":4}'
    decoder = ResizeDecoder()
    found = [decoder.feed(text[at : at + step]) for at in range(0, len(text), step)]
    assert [size for size in found if size] == [TerminalSize(1, 2)]
    assert decoder.ended
    assert decoder.feed(b"{}") is None


def test_what_is_kept_is_bounded() -> None:
    decoder = ResizeDecoder()
    for _ in range(10):
        assert decoder.feed(b" " * 100_000) is None
    assert not decoder.ended
    assert decoder.feed(b'{"a' + b" " * 1021) is None
    assert not decoder.ended
    assert decoder.feed(b" ") is None
    assert decoder.ended


TOKENS = st.sampled_from(
    [b"{", b"}", b'"Width"', b'"height"', b":", b",", b"1", b"80", b" ", b'{"Width":1}', b"{}", b"\xff", b'"']
)


@given(st.lists(TOKENS, max_size=12), st.lists(st.integers(0, 60), max_size=6))
def test_how_the_bytes_are_cut_makes_no_difference(tokens: list[bytes], cuts: list[int]) -> None:
    data = b"".join(tokens)
    whole, cut = ResizeDecoder(), ResizeDecoder()
    edges = [0, *sorted(cuts), len(data)]
    last = whole.feed(data)
    found = [size for a, b in itertools.pairwise(edges) if (size := cut.feed(data[a:b])) is not None]
    assert last == (found[-1] if found else None)
    assert whole.ended == cut.ended
