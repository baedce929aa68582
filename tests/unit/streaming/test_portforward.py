"""Port forwarding on the wire: which streams and channels belong together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criserver.errors import CriError, InvalidArgumentError, ResourceExhaustedError
from criserver.streaming.portforward import (
    SPDY_PROTOCOLS,
    WEBSOCKET_PROTOCOLS,
    DuplicateStreamError,
    StreamPair,
    StreamPairs,
    greeting,
    websocket_channels,
)
from criserver.streaming.remotecommand import negotiate
from criserver.streaming.websocket import TUNNEL_PROTOCOL, Channels


def headers(kind: str | None = "data", port: str | None = "80", request: str | None = None) -> list[tuple[str, str]]:
    given = {"streamtype": kind, "port": port, "requestid": request}
    return [(name, value) for name, value in given.items() if value is not None]


def test_two_streams_of_one_request_are_a_pair() -> None:
    pairs = StreamPairs()
    half = pairs.add(1, headers("error", request="0"))
    assert half == StreamPair("0", 80, data=None, error=1)
    assert not half.complete
    whole = pairs.add(3, headers("data", request="0"))
    assert whole == StreamPair("0", 80, data=3, error=1)
    assert whole.complete


def test_streams_of_several_requests_may_come_in_any_order() -> None:
    pairs = StreamPairs()
    pairs.add(1, headers("data", "80", "a"))
    pairs.add(3, headers("data", "443", "b"))
    assert pairs.add(5, headers("error", "443", "b")) == StreamPair("b", 443, data=3, error=5)
    assert pairs.add(7, headers("error", "80", "a")) == StreamPair("a", 80, data=1, error=7)


def test_a_request_may_come_again_once_its_pair_is_complete() -> None:
    pairs = StreamPairs()
    pairs.add(1, headers("error", request="0"))
    pairs.add(3, headers("data", request="0"))
    assert pairs.add(5, headers("error", request="0")) == StreamPair("0", 80, error=5)


def test_clients_of_old_send_no_request() -> None:
    pairs = StreamPairs()
    assert pairs.add(1, headers("error")).key == "1"
    assert pairs.add(3, headers("data")).complete
    assert pairs.add(5, headers("error", request="")).key == "5"
    assert pairs.add(9, headers("data")).key == "7"  # not the one of 5: this client opened two pairs at once
    assert pairs.add(7, headers("data")) == StreamPair("5", 80, data=7, error=5)


def test_the_stream_with_the_data_decides_the_port() -> None:
    pairs = StreamPairs()
    pairs.add(1, headers("error", "1", "0"))
    assert pairs.add(3, headers("data", "2", "0")).port == 2
    pairs.add(5, headers("data", "2", "1"))
    assert pairs.add(7, headers("error", "1", "1")).port == 2


@pytest.mark.parametrize(("text", "port"), [("1", 1), ("65535", 65535), ("00080", 80), ("000000000080", 80)])
def test_ports(text: str, port: int) -> None:
    assert StreamPairs().add(1, headers(port=text)).port == port


@pytest.mark.parametrize(
    "text",
    ["0", "000", "65536", "99999999999999999999", "-1", "+1", " 80", "8_0", "0x50", "http", "²", "٣", "9" * 5000],
)
def test_what_is_no_port_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="is not a number from 1 to 65535"):
        StreamPairs().add(1, headers(port=text))


@pytest.mark.parametrize("text", ["", None])
def test_a_stream_without_a_port_is_refused(text: str | None) -> None:
    with pytest.raises(InvalidArgumentError, match="without the header port"):
        StreamPairs().add(1, headers(port=text))


@pytest.mark.parametrize("kind", [None, "", "Data", "stdin", "resize"])
def test_a_stream_of_another_type_is_refused(kind: str | None) -> None:
    with pytest.raises(InvalidArgumentError, match="neither data nor error"):
        StreamPairs().add(1, headers(kind))


@pytest.mark.parametrize(("kind", "error"), [("data", None), ("error", 1)])
def test_a_second_stream_of_a_type_is_refused_and_the_first_stays(kind: str, error: int | None) -> None:
    pairs = StreamPairs()
    first = pairs.add(1, headers(kind, request="a"))
    with pytest.raises(DuplicateStreamError, match=f"'a' has its {kind} stream already") as raised:
        pairs.add(3, headers(kind, "81", "a"))
    assert raised.value.pair == first
    assert raised.value.pair.error == error
    other = "error" if kind == "data" else "data"
    assert pairs.add(5, headers(other, request="a")).complete


def test_halves_are_bounded() -> None:
    pairs = StreamPairs(limit=2)
    pairs.add(1, headers("error", request="a"))
    pairs.add(3, headers("error", request="b"))
    with pytest.raises(ResourceExhaustedError, match="2 port forwards wait"):
        pairs.add(5, headers("error", request="c"))
    assert pairs.add(7, headers("data", request="a")).complete
    assert not pairs.add(9, headers("error", request="c")).complete


def test_a_half_whose_time_is_up_is_forgotten() -> None:
    pairs = StreamPairs()
    half = pairs.add(1, headers("error", request="a"))
    assert pairs.expire(half)
    assert not pairs.expire(half)
    assert pairs.add(3, headers("data", request="a")) == StreamPair("a", 80, data=3)


def test_a_pair_that_is_complete_does_not_expire() -> None:
    pairs = StreamPairs()
    half = pairs.add(1, headers("error", request="a"))
    pairs.add(3, headers("data", request="a"))
    again = pairs.add(5, headers("error", request="a"))
    assert not pairs.expire(half)
    assert pairs.expire(again)


@given(
    st.lists(
        st.tuples(st.sampled_from(["data", "error", "x"]), st.sampled_from(["1", "0"]), st.sampled_from(["", "1", "a"]))
    )
)
def test_every_stream_is_in_one_pair_at_most(opened: list[tuple[str, str, str]]) -> None:
    pairs, seen = StreamPairs(limit=2), []
    for number, (kind, port, request) in enumerate(opened):
        try:
            pair = pairs.add(2 * number + 1, headers(kind, port, request))
        except CriError:
            continue
        if pair.complete:
            seen += [pair.data, pair.error]
    assert len(seen) == len(set(seen))


def test_protocols() -> None:
    assert negotiate(["portforward.k8s.io"], SPDY_PROTOCOLS) == "portforward.k8s.io"
    assert negotiate([TUNNEL_PROTOCOL], WEBSOCKET_PROTOCOLS) == "SPDY/3.1+portforward.k8s.io"
    assert negotiate([], WEBSOCKET_PROTOCOLS) == ""
    assert negotiate(["v5.channel.k8s.io"], WEBSOCKET_PROTOCOLS) is None


def test_the_channels_of_a_plain_websocket() -> None:
    readable, writable = websocket_channels([80, 8080])
    assert (set(readable), set(writable)) == ({0, 2}, {0, 1, 2, 3})
    here = Channels("v4.channel.k8s.io", readable=readable, writable=writable)
    here.send(3, greeting(8080))
    assert here.take() == b"\x82\x03\x03\x90\x1f"
