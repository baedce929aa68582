"""One HTTP/1.1 request that asks for an upgrade to SPDY/3.1 or WebSocket, seen from the server; no I/O.

A connection brings one request and gets one answer: 101, after which it speaks another protocol, or a refusal, after
which it is closed. What a request must look like is RFC 9110, section 7.8, RFC 6455, section 4.2.1, and what the
streaming server of Kubernetes asks of its clients. There is no CORS and no look at Origin: the address has a token in
it that a page cannot guess.
"""

from __future__ import annotations

import base64
import binascii
import enum
import http
from collections.abc import Iterable
from dataclasses import dataclass

import h11
from wsproto.utilities import generate_accept_token

from criserver.numbers import decimal

# Bytes of a request with all its headers; RFC 9110, section 5.4, leaves the number to the server.
_MAX_REQUEST = 16 << 10
_PROTOCOLS = "x-stream-protocol-version"
_WEBSOCKET_PROTOCOLS = "sec-websocket-protocol"
_KEY_LENGTH = 16

Headers = tuple[tuple[str, str], ...]
"""Headers in their order, names in lower case; a name may come more than once."""


class Kind(enum.Enum):
    """What a connection is upgraded to; the value is its name in Upgrade, in lower case."""

    SPDY = "spdy/3.1"
    WEBSOCKET = "websocket"


@dataclass(frozen=True, slots=True)
class Request:
    """A request that may be accepted.

    ``path`` and ``query`` are as they were sent, percent signs and all. ``protocols`` are those that the client
    offers, the one that it likes best first; over SPDY there is one at least.
    """

    method: str
    path: str
    query: str
    headers: Headers
    kind: Kind
    protocols: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that is none of ours: send ``response`` and close."""

    status: int
    text: str
    response: bytes


class Handshake:
    """The server's side of one request of at most ``limit`` bytes."""

    def __init__(self, limit: int = _MAX_REQUEST) -> None:
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=limit)
        self._room = limit
        self._head: Request | None = None  # checked, its body not yet
        self._request: Request | None = None
        self._bodiless = False
        self._refused = False
        self._rest = bytearray()

    @property
    def rest(self) -> bytes:
        """What came behind the request: the first bytes of the other protocol."""
        return bytes(self._rest)

    def receive(self, data: bytes) -> Request | Refusal | None:
        """The request that ``data`` completes, what is wrong with it, or None while more is to come.

        Never raises. After a request, bytes are kept for :attr:`rest`, so stop reading; after a refusal they are
        dropped.
        """
        if self._refused:
            return None
        if self._request is not None:
            self._rest += data
            return None
        # h11 is never given more than a request may have: what it accepts does not depend on how the bytes are cut.
        self._rest += data[self._room :]
        if piece := data[: self._room]:
            self._room -= len(piece)
            self._http.receive_data(piece)
        try:
            return self._read()
        except _RefusedError as e:
            self._refused = True
            self._rest.clear()
            return Refusal(e.status, e.text, self._answer(e.status, e.text, e.headers))

    def accept(self, protocol: str) -> bytes:
        """The 101 response that chooses one of the request's protocols; "" chooses none, for a WebSocket."""
        request = self._request
        assert request is not None, "there is no request to accept"
        assert protocol in request.protocols or (not protocol and request.kind is Kind.WEBSOCKET)
        if request.kind is Kind.SPDY:
            headers = [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), ("X-Stream-Protocol-Version", protocol)]
        else:
            token = generate_accept_token(_values(request.headers, "sec-websocket-key")[0].encode()).decode()
            headers = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Accept", token)]
            if protocol:
                headers.append(("Sec-WebSocket-Protocol", protocol))
        return _response(101, headers)

    def refuse(self, status: int, text: str) -> bytes:
        """The response that says in plain text why not; close the connection behind it."""
        return self._answer(status, text, ())

    def refuse_protocols(self, accepted: Iterable[str]) -> bytes:
        """The response to a client that offers only protocols that the server does not know: 403 with those it does."""
        assert self._request is not None, "there is no request to refuse"
        known = [protocol for protocol in accepted if protocol]
        offered = ", ".join(self._request.protocols) or "none"
        text = f"none of the protocols that the client offers is known ({offered}); use one of {', '.join(known)}"
        headers: list[tuple[str, str]] = []
        if self._request.kind is Kind.SPDY:
            headers = [("X-Accepted-Stream-Protocol-Versions", protocol) for protocol in known]
        return self._answer(403, text, headers)

    def _read(self) -> Request | None:
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as e:
                raise _malformed(e.error_status_hint) from None
            if isinstance(event, h11.Request):
                self._bodiless = event.method == b"HEAD"
                self._head = _checked(event)
            elif isinstance(event, h11.Data):
                raise _RefusedError(413, "a request to upgrade has no body")
            elif isinstance(event, h11.EndOfMessage):
                self._request = self._head
                self._rest[:0] = self._http.trailing_data[0]
                return self._request
            else:  # NEED_DATA
                if not self._room:
                    raise _malformed(431)
                return None

    def _answer(self, status: int, text: str, headers: Iterable[tuple[str, str]]) -> bytes:
        body = text.encode(errors="replace") + b"\n"
        kind = [
            ("Content-Type", "text/plain; charset=utf-8"),
            ("X-Content-Type-Options", "nosniff"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        return _response(status, [*headers, *kind]) + (b"" if self._bodiless else body)


class _RefusedError(Exception):
    def __init__(self, status: int, text: str, headers: Headers = ()) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers


def _malformed(status: int) -> _RefusedError:
    # Nothing of the request is told: how much of it h11 has seen when it gives up depends on how the bytes were cut.
    if status == 431:
        return _RefusedError(431, "the request's headers are too large")
    if status == 501:
        return _RefusedError(501, "the only transfer encoding that is known is chunked")
    return _RefusedError(400, "this is not a request of HTTP/1.1")


def _checked(head: h11.Request) -> Request:
    """Refuse what can be told without the body."""
    if head.http_version != b"1.1":
        raise _RefusedError(505, "only HTTP/1.1 can be upgraded")
    if head.method not in (b"GET", b"POST"):
        raise _RefusedError(405, "the methods are GET and POST", (("Allow", "GET, POST"),))
    request = _read_head(head)
    if request.kind is Kind.WEBSOCKET:
        _check_websocket(request)
    elif not request.protocols:
        raise _RefusedError(400, "unable to upgrade: X-Stream-Protocol-Version is missing or names no protocol")
    lengths = _values(request.headers, "content-length")
    if lengths and decimal(lengths[0], 0) is None:
        raise _RefusedError(413, "a request to upgrade has no body")
    if "100-continue" in _words(request.headers, "expect"):
        raise _RefusedError(417, "a request to upgrade has no body to wait for")
    return request


def _read_head(head: h11.Request) -> Request:
    headers = tuple((name.decode(), value.decode("latin-1")) for name, value in head.headers)
    kind = _kind(headers)
    path, _, query = _origin_form(head.target.decode()).partition("?")
    offered = _listed(headers, _WEBSOCKET_PROTOCOLS if kind is Kind.WEBSOCKET else _PROTOCOLS)
    return Request(head.method.decode(), path, query, headers, kind, offered)


def _origin_form(target: str) -> str:
    """The path and query of a target, which may be a whole URL too (RFC 9112, section 3.2.2)."""
    if not target.startswith("/"):
        scheme, separator, rest = target.partition("://")
        if not separator or scheme.lower() not in ("http", "https"):
            raise _RefusedError(400, "the request's target is not a path")
        _, slash, path = rest.partition("/")
        target = slash + path
        if not slash:
            raise _RefusedError(400, "the request's target has no path")
    return target


def _kind(headers: Headers) -> Kind:
    wanted = _words(headers, "upgrade")
    if "upgrade" in _words(headers, "connection"):
        for word in wanted:
            for kind in Kind:
                if word == kind.value:
                    return kind
    raise _RefusedError(
        400, 'unable to upgrade: "Connection: Upgrade" and "Upgrade: SPDY/3.1" or "Upgrade: websocket" are needed'
    )


def _check_websocket(request: Request) -> None:
    if request.method != "GET":
        raise _RefusedError(405, "a WebSocket is opened by GET", (("Allow", "GET"),))
    if _values(request.headers, "sec-websocket-version") != ["13"]:
        raise _RefusedError(
            400, "unable to upgrade: Sec-WebSocket-Version must be 13", (("Sec-WebSocket-Version", "13"),)
        )
    try:
        (key,) = _values(request.headers, "sec-websocket-key")
        nonce = base64.b64decode(key, validate=True)
    except (ValueError, binascii.Error):
        nonce = b""
    if len(nonce) != _KEY_LENGTH:
        raise _RefusedError(400, "unable to upgrade: Sec-WebSocket-Key must be 16 bytes in base64")


def _values(headers: Headers, name: str) -> list[str]:
    return [value for found, value in headers if found == name]


def _listed(headers: Headers, name: str) -> tuple[str, ...]:
    """The values of headers that are lists, in their order."""
    words = [word.strip(" \t") for value in _values(headers, name) for word in value.split(",")]
    return tuple(word for word in words if word)


def _words(headers: Headers, name: str) -> tuple[str, ...]:
    """The same for headers that make no difference between lower and upper case."""
    return tuple(word.lower() for word in _listed(headers, name))


def _response(status: int, headers: Iterable[tuple[str, str]]) -> bytes:
    lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join((*lines, "", "")).encode("latin-1")
