"""Requests to upgrade a connection, cut anywhere: which are accepted, and which are refused."""

from __future__ import annotations

import base64
import itertools
import re

import h11
import pytest
import wsproto
from hypothesis import given
from hypothesis import strategies as st
from wsproto.events import AcceptConnection

from criserver.streaming.handshake import Handshake, Refusal, Request, Upgrade

SPDY = (
    b"POST /exec/abc?x=%20 HTTP/1.1\r\nHost: node\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nContent-Length: 0\r\n"
    b"X-Stream-Protocol-Version: v5.channel.k8s.io\r\nX-Stream-Protocol-Version: "
    b"v4.channel.k8s.io, v3.channel.k8s.io\r\n\r\n"
)
WEBSOCKET = (
    b"GET /exec/abc HTTP/1.1\r\nHost: node\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Protocol: v5.channel.k8s.io, v4.channel.k8s.io\r\n\r\n"
)
KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="


def request(data: bytes) -> Request:
    found = Handshake().receive(data)
    assert isinstance(found, Request)
    return found


def refusal(data: bytes) -> Refusal:
    found = Handshake().receive(data)
    assert isinstance(found, Refusal)
    return found


def run(handshake: Handshake, pieces: list[bytes]) -> Request | Refusal | None:
    """The one result of a handshake that gets the pieces; there must be no second."""
    found = [result for piece in pieces if (result := handshake.receive(piece)) is not None]
    assert len(found) <= 1
    return found[0] if found else None


def status_and_headers(response: bytes) -> tuple[int, dict[str, list[str]], bytes]:
    """A response as a client of h11 reads it."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "node"), ("Upgrade", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(response)
    head = client.next_event()
    assert isinstance(head, h11.Response | h11.InformationalResponse)
    body = b""
    if isinstance(head, h11.Response):
        while isinstance(part := client.next_event(), h11.Data):
            body += part.data
        assert isinstance(part, h11.EndOfMessage)
        assert client.their_state is h11.MUST_CLOSE
    headers: dict[str, list[str]] = {}
    for name, value in head.headers:
        headers.setdefault(name.decode(), []).append(value.decode())
    return head.status_code, headers, body


def test_a_request_to_speak_spdy() -> None:
    found = request(SPDY)
    assert (found.method, found.path, found.query, found.upgrade) == ("POST", "/exec/abc", "x=%20", Upgrade.SPDY)
    assert found.protocols == ("v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io")
    assert ("host", "node") in found.headers


def test_spdy_is_accepted_with_the_chosen_protocol() -> None:
    handshake = Handshake()
    handshake.receive(SPDY)
    assert handshake.accept("v4.channel.k8s.io") == (
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
        b"X-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n"
    )


def test_a_request_to_open_a_websocket() -> None:
    found = request(WEBSOCKET)
    assert (found.method, found.path, found.query, found.upgrade) == ("GET", "/exec/abc", "", Upgrade.WEBSOCKET)
    assert found.protocols == ("v5.channel.k8s.io", "v4.channel.k8s.io")


def test_the_answer_to_the_key_is_that_of_rfc_6455() -> None:
    handshake = Handshake()
    handshake.receive(WEBSOCKET)
    status, headers, _ = status_and_headers(handshake.accept("v4.channel.k8s.io"))
    assert status == 101
    assert headers["sec-websocket-accept"] == ["s3pPLMBiTxaQ9kYGzzhZRbK+xOo="]  # the example of section 1.3
    assert headers["sec-websocket-protocol"] == ["v4.channel.k8s.io"]
    assert "sec-websocket-extensions" not in headers


@pytest.mark.parametrize("protocols", [["v5.channel.k8s.io", "v4.channel.k8s.io"], []])
def test_a_client_of_wsproto_is_content_with_the_answer(protocols: list[str]) -> None:
    client = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
    handshake = Handshake()
    asked = client.send(wsproto.events.Request(host="node", target="/attach/t?a=b", subprotocols=protocols))
    found = handshake.receive(asked)
    assert isinstance(found, Request)
    assert list(found.protocols) == protocols
    client.receive_data(handshake.accept(protocols[-1] if protocols else ""))
    (event,) = client.events()
    assert isinstance(event, AcceptConnection)
    assert event.subprotocol == (protocols[-1] if protocols else None)


def test_what_comes_behind_the_request_is_handed_on() -> None:
    handshake = Handshake()
    assert handshake.receive(SPDY + b"\x80\x03rest") is not None
    assert handshake.receive(b" and more") is None
    assert handshake.rest == b"\x80\x03rest and more"


def test_an_empty_chunked_body_is_read_away() -> None:
    head = SPDY.replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    handshake = Handshake()
    assert handshake.receive(head) is None
    assert isinstance(handshake.receive(b"0\r\n\r\nrest"), Request)
    assert handshake.rest == b"rest"


def test_the_target_may_be_a_whole_url() -> None:
    assert request(SPDY.replace(b"/exec/abc?", b"HTTP://node:1/exec/abc?")).path == "/exec/abc"


@pytest.mark.parametrize("data", [SPDY, WEBSOCKET], ids=["spdy", "websocket"])
def test_byte_by_byte(data: bytes) -> None:
    handshake = Handshake()
    for at in range(len(data) - 1):
        assert handshake.receive(data[at : at + 1]) is None
    assert handshake.receive(data[-1:]) == request(data)


@pytest.mark.parametrize(
    ("status", "words", "data"),
    [
        (400, "not an HTTP/1.1 request", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),  # TLS
        (400, "not an HTTP/1.1 request", b"GET / HTTP/1.1\r\n\r\n"),  # no Host
        (400, "not an HTTP/1.1 request", b"GET\r\n\r\n"),
        (400, "not an HTTP/1.1 request", SPDY.replace(b"Content-Length: 0", b"Content-Length: -1")),
        (400, "are needed", b"GET /exec/abc HTTP/1.1\r\nHost: node\r\n\r\n"),
        (400, "are needed", SPDY.replace(b"Connection: Upgrade", b"Connection: close")),
        (400, "are needed", SPDY.replace(b"Upgrade: SPDY/3.1", b"Upgrade: h2c")),
        (400, "X-Stream-Protocol-Version", SPDY.replace(b"X-Stream-Protocol-Version", b"X-Other")),
        (400, "X-Stream-Protocol-Version", re.sub(rb"v\d.channel.k8s.io", b"", SPDY)),
        (400, "not a path", SPDY.replace(b"/exec/abc?x=%20", b"*")),
        (400, "not a path", SPDY.replace(b"/exec/abc", b"ftp://node/exec/abc")),
        (400, "no path", SPDY.replace(b"/exec/abc?x=%20", b"http://node")),
        (400, "Sec-WebSocket-Version", WEBSOCKET.replace(b"Version: 13", b"Version: 8")),
        (400, "Sec-WebSocket-Version", WEBSOCKET.replace(b"Sec-WebSocket-Version: 13\r\n", b"")),
        (400, "Sec-WebSocket-Key", WEBSOCKET.replace(b"Sec-WebSocket-Key", b"X-Key")),
        (400, "Sec-WebSocket-Key", WEBSOCKET.replace(b"Key: dGhl", b"Key: ")),
        (400, "Sec-WebSocket-Key", WEBSOCKET.replace(b"Key: dGhl", b"Key: d\xffhl")),
        (400, "Sec-WebSocket-Key", WEBSOCKET.replace(KEY, KEY + b"\r\n" + KEY)),
        (405, "GET and POST", SPDY.replace(b"POST", b"PUT")),
        (405, "by GET", WEBSOCKET.replace(b"GET", b"POST")),
        (413, "no body", SPDY.replace(b"Content-Length: 0", b"Content-Length: 5")),
        (413, "no body", SPDY.replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"1\r\nx"),
        (417, "wait", SPDY.replace(b"Content-Length: 0", b"Transfer-Encoding: chunked\r\nExpect: 100-continue")),
        (501, "chunked", SPDY.replace(b"Content-Length: 0", b"Transfer-Encoding: gzip")),
        (505, "HTTP/1.1", SPDY.replace(b"HTTP/1.1", b"HTTP/1.0")),
    ],
)  # fmt: skip
def test_refused(status: int, words: str, data: bytes) -> None:
    found = refusal(data)
    assert found.status == status
    assert words in found.text
    got, headers, body = status_and_headers(found.response)
    assert got == status
    assert body.decode() == found.text + "\n"
    assert headers["connection"] == ["close"]
    assert headers["content-type"] == ["text/plain; charset=utf-8"]
    assert not any(name.startswith("access-control") for name in headers)


def test_refusals_name_the_methods_and_the_version_that_are_known() -> None:
    assert b"\r\nAllow: GET, POST\r\n" in refusal(SPDY.replace(b"POST", b"PUT")).response
    assert b"\r\nAllow: GET\r\n" in refusal(WEBSOCKET.replace(b"GET", b"POST")).response
    assert b"\r\nSec-WebSocket-Version: 13\r\n" in refusal(WEBSOCKET.replace(b": 13", b": 12")).response


def test_the_refusal_of_a_head_request_has_no_body() -> None:
    assert refusal(SPDY.replace(b"POST", b"HEAD")).response.endswith(b"\r\n\r\n")


def test_nothing_comes_after_a_refusal() -> None:
    handshake = Handshake()
    assert isinstance(handshake.receive(b"\0"), Refusal)
    assert handshake.receive(SPDY) is None
    assert handshake.rest == b""


@pytest.mark.parametrize("step", [1, 7, 1000, 1 << 20])
def test_a_request_is_bounded_exactly(step: int) -> None:
    handshake = Handshake(limit=len(SPDY))
    found = run(handshake, [(SPDY + b"rest")[at : at + step] for at in range(0, len(SPDY) + 4, step)])
    assert isinstance(found, Request)
    assert handshake.rest == b"rest"

    found = run(Handshake(limit=len(SPDY) - 1), [SPDY[at : at + step] for at in range(0, len(SPDY), step)])
    assert isinstance(found, Refusal)
    assert found.status == 431


def test_a_request_without_an_end_is_refused_at_16_kib() -> None:
    handshake = Handshake()
    assert handshake.receive(b"GET / HTTP/1.1\r\nX: " + b"a" * (16384 - 20)) is None
    found = handshake.receive(b"aa")
    assert isinstance(found, Refusal)
    assert found.status == 431


@pytest.mark.parametrize(("data", "listed"), [(SPDY, ["v9.a", "v8.b"]), (WEBSOCKET, None)], ids=["spdy", "websocket"])
def test_unknown_protocols_are_refused_with_those_that_are_known(data: bytes, listed: list[str] | None) -> None:
    handshake = Handshake()
    handshake.receive(data)
    status, headers, body = status_and_headers(handshake.refuse_protocols(["v9.a", "v8.b", ""]))
    assert status == 403
    assert headers.get("x-accepted-stream-protocol-versions") == listed
    assert b"v5.channel.k8s.io, v4.channel.k8s.io" in body
    assert b"use one of v9.a, v8.b\n" in body


def test_refused_by_the_caller() -> None:
    handshake = Handshake()
    handshake.receive(SPDY)
    status, headers, body = status_and_headers(handshake.refuse(404, "kein Schlüssel \ud800"))
    assert (status, body) == (404, "kein Schlüssel ?\n".encode())
    assert headers["content-length"] == [str(len(body))]


ODDITIES = st.sampled_from(
    [b"\r", b"\n", b" ", b"\t", b":", b"\0", b"\xff", b"1", b"0\r\n\r\n", b"Upgrade", b"chunked"]
)


@given(
    st.sampled_from(
        [SPDY, WEBSOCKET, SPDY.replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"0\r\n\r\n"]
    ),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3), ODDITIES | st.binary(max_size=4)), max_size=3),
    st.binary(max_size=20),
    st.lists(st.integers(0, 450), max_size=6),
    st.sampled_from([16384, 200, 150]),
)
def test_how_the_bytes_are_cut_makes_no_difference(
    data: bytes, changes: list[tuple[int, int, bytes]], rest: bytes, cuts: list[int], limit: int
) -> None:
    for at, size, new in changes:
        data = data[:at] + new + data[at + size :]
    data += rest
    whole, cut = Handshake(limit), Handshake(limit)
    edges = [0, *sorted(cuts), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    assert run(whole, [data]) == run(cut, pieces)
    assert whole.rest == cut.rest


def test_a_key_of_another_length_is_refused() -> None:
    key = base64.b64encode(b"x" * 15)
    assert refusal(WEBSOCKET.replace(b"dGhlIHNhbXBsZSBub25jZQ==", key)).status == 400
