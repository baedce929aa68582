"""The server's side of one HTTP/1.1 request for an upgrade to SPDY/3.1 or WebSocket; no I/O.

A connection has one request and one answer: 101, after which it uses the other protocol, or a refusal, after which it
is closed. The rules for a request are in RFC 9110, section 7.8, in RFC 6455, section 4.2.1, and in the streaming server
of Kubernetes. The server has no CORS and does not read Origin: the address has a token that a web page cannot guess.
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

# Bytes of a request with all its headers. The server chooses the limit (RFC 9110, section 5.4).
_MAX_REQUEST = 16 << 10
_PROTOCOLS = "x-stream-protocol-version"
_WEBSOCKET_PROTOCOLS = "sec-websocket-protocol"
_KEY_LENGTH = 16

Headers = tuple[tuple[str, str], ...]
"""Headers in their order, names in lower case; a name may come more than once."""


class Upgrade(enum.Enum):
    """The protocol that a connection is upgraded to; the value is its name in the header Upgrade, in lower case."""

    SPDY = "spdy/3.1"
    WEBSOCKET = "websocket"


@dataclass(frozen=True, slots=True)
class Request:
    """A request that may be accepted.

    ``path`` and ``query`` are still percent-encoded. ``protocols`` are those that the client offers, the best one for
    it first. Over SPDY there is at least one.
    """

    method: str
    path: str
    query: str
    headers: Headers
    upgrade: Upgrade
    protocols: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that is refused: send ``response`` and close."""

    status: int
    text: str
    response: bytes


class Handshake:
    """The server's side of one request of at most ``limit`` bytes."""

    def __init__(self, limit: int = _MAX_REQUEST) -> None:
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=limit)
        self._room = limit
        self._head: Request | None = None  # its head is checked, its body not yet
        self._request: Request | None = None
        self._bodiless = False
        self._refused = False
        self._rest = bytearray()

    @property
    def rest(self) -> bytes:
        """The bytes behind the request: the first ones of the other protocol."""
        return bytes(self._rest)

    def receive(self, data: bytes) -> Request | Refusal | None:
        """The request that ``data`` completes, or its refusal; None where more has to come.

        Never raises. After a request all bytes are kept for :attr:`rest`, so the caller must stop reading. After a
        refusal they are dropped.
        """
        if self._refused:
            return None
        if self._request is not None:
            self._rest += data
            return None
        # h11 never gets more bytes than a request may have. So it does not matter how the client splits its bytes.
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
        assert protocol in request.protocols or (not protocol and request.upgrade is Upgrade.WEBSOCKET)
        if request.upgrade is Upgrade.SPDY:
            headers = [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), ("X-Stream-Protocol-Version", protocol)]
        else:
            token = generate_accept_token(_values(request.headers, "sec-websocket-key")[0].encode()).decode()
            headers = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Accept", token)]
            if protocol:
                headers.append(("Sec-WebSocket-Protocol", protocol))
        return _response(101, headers)

    def refuse(self, status: int, text: str) -> bytes:
        """The response that tells the reason in plain text. Close the connection after it."""
        return self._answer(status, text, ())

    def refuse_protocols(self, accepted: Iterable[str]) -> bytes:
        """The response to a client whose protocols are all unknown here: 403, with the known ones."""
        assert self._request is not None, "there is no request to refuse"
        known = [protocol for protocol in accepted if protocol]
        offered = ", ".join(self._request.protocols) or "none"
        text = f"the server knows none of the client's protocols ({offered}); use one of {', '.join(known)}"
        headers: list[tuple[str, str]] = []
        if self._request.upgrade is Upgrade.SPDY:
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
    # The text quotes nothing of the request: how much of it h11 has read depends on how the client splits its bytes.
    if status == 431:
        return _RefusedError(431, "the request's headers are too large")
    if status == 501:
        return _RefusedError(501, "the only supported transfer encoding is chunked")
    return _RefusedError(400, "this is not an HTTP/1.1 request")


def _checked(head: h11.Request) -> Request:
    """The request of a head, after all checks that do not need the body."""
    if head.http_version != b"1.1":
        raise _RefusedError(505, "only HTTP/1.1 can be upgraded")
    if head.method not in (b"GET", b"POST"):
        raise _RefusedError(405, "the methods are GET and POST", (("Allow", "GET, POST"),))
    request = _read_head(head)
    if request.upgrade is Upgrade.WEBSOCKET:
        _check_websocket(request)
    elif not request.protocols:
        raise _RefusedError(400, "unable to upgrade: X-Stream-Protocol-Version is missing or names no protocol")
    lengths = _values(request.headers, "content-length")
    if lengths and decimal(lengths[0], 0) is None:
        raise _RefusedError(413, "a request to upgrade has no body")
    if "100-continue" in _lowercase_list(request.headers, "expect"):
        raise _RefusedError(417, "a request to upgrade has no body to wait for")
    return request


def _read_head(head: h11.Request) -> Request:
    headers = tuple((name.decode(), value.decode("latin-1")) for name, value in head.headers)
    upgrade = _upgrade(headers)
    path, _, query = _origin_form(head.target.decode()).partition("?")
    offered = _listed(headers, _WEBSOCKET_PROTOCOLS if upgrade is Upgrade.WEBSOCKET else _PROTOCOLS)
    return Request(head.method.decode(), path, query, headers, upgrade, offered)


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


def _upgrade(headers: Headers) -> Upgrade:
    if "upgrade" in _lowercase_list(headers, "connection"):
        for protocol in _lowercase_list(headers, "upgrade"):
            for upgrade in Upgrade:
                if protocol == upgrade.value:
                    return upgrade
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
    return [value for key, value in headers if key == name]


def _listed(headers: Headers, name: str) -> tuple[str, ...]:
    """The entries of a header that is a list, over all its values, in their order."""
    entries = [entry.strip(" \t") for value in _values(headers, name) for entry in value.split(",")]
    return tuple(entry for entry in entries if entry)


def _lowercase_list(headers: Headers, name: str) -> tuple[str, ...]:
    """The entries in lower case, for a header in which case does not matter."""
    return tuple(entry.lower() for entry in _listed(headers, name))


def _response(status: int, headers: Iterable[tuple[str, str]]) -> bytes:
    lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join((*lines, "", "")).encode("latin-1")
