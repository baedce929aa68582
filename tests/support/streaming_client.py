"""Clients of the streaming server: SPDY/3.1 and WebSocket on a blocking socket, so that the test sets the pace."""

from __future__ import annotations

import base64
import json
import os
import select
import socket
import ssl
from typing import Any
from urllib.parse import urlsplit

from criserver.streaming import spdy, websocket
from tests.support.waiting import SLOWNESS

STREAMS = ("stdin", "stdout", "stderr", "error", "resize")


class Refused(Exception):
    """The server's answer was not 101."""

    def __init__(self, head: str, body: str) -> None:
        super().__init__(head.splitlines()[0] + "\n" + body)
        self.status = int(head.split()[1])
        self.head = head
        self.body = body


def connect(url: str, headers: dict[str, str], tls: ssl.SSLContext | None = None) -> tuple[socket.socket, str, bytes]:
    """Ask for an upgrade: the socket, the head of the answer, and what came behind it. Raises Refused."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    sock = socket.create_connection((parts.hostname, parts.port), timeout=30 * SLOWNESS)
    # Go's clients do so too. Without it a second small frame waits 40 ms for the answer to the first.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if parts.scheme == "https":
        assert tls is not None
        sock = tls.wrap_socket(sock, server_hostname=parts.hostname)
    lines = [f"POST {parts.path} HTTP/1.1" if "Sec-WebSocket-Key" not in headers else f"GET {parts.path} HTTP/1.1"]
    lines += [f"Host: {parts.netloc}", "Connection: Upgrade", *(f"{k}: {v}" for k, v in headers.items())]
    sock.sendall("\r\n".join((*lines, "", "")).encode())
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        if not piece:
            break
        data += piece
    head, _, rest = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 101"):
        while piece := sock.recv(65536):
            rest += piece
        sock.close()
        raise Refused(head.decode(), rest.decode())
    return sock, head.decode(), rest


def connect_websocket(url: str, protocol: str, tls: ssl.SSLContext | None = None) -> tuple[socket.socket, str, bytes]:
    """As :func:`connect`, for a WebSocket of a sub-protocol, "" for none."""
    key = base64.b64encode(os.urandom(16)).decode()
    headers = {"Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": key}
    return connect(url, {**headers, "Sec-WebSocket-Protocol": protocol} if protocol else headers, tls)


class Spdy:
    """A client over SPDY: ``got`` collects what comes on each stream, by the name that it was opened with."""

    def __init__(self, url: str, protocol: str = "v4.channel.k8s.io", tls: ssl.SSLContext | None = None) -> None:
        self.prepare()
        headers = {"Upgrade": "SPDY/3.1", "X-Stream-Protocol-Version": protocol}
        self.sock, self.head, rest = connect(url, headers, tls)
        self.receive(rest)

    def prepare(self) -> None:
        self.spdy = spdy.Connection(client=True)
        self.ids: dict[str, int] = {}
        self.got: dict[str, bytearray] = {}
        self.ended: set[str] = set()
        self.reset: dict[str, int] = {}
        self.gone = False

    def open(self, name: str, **headers: str) -> None:
        """Open a stream."""
        self.ids[name] = self.spdy.open([*headers.items()])
        self.got[name] = bytearray()
        self._flush()

    def open_command(self, *names: str) -> Spdy:
        """Open the streams of a command."""
        for name in names:
            self.open(name, streamtype=name)
        return self

    def send(self, name: str, data: bytes, *, end: bool = False) -> None:
        self.spdy.send(self.ids[name], data, end=end)
        self._flush()

    def read(self, seconds: float = 30) -> bool:
        """Take what comes next; False when the connection is at its end."""
        if not isinstance(self.sock, ssl.SSLSocket):
            poll = select.poll()  # select takes no descriptor above 1023
            poll.register(self.sock, select.POLLIN)
            assert poll.poll(seconds * SLOWNESS * 1000), f"nothing comes; so far {_tails(self.got)}"
        try:
            data = self.sock.recv(1 << 18)
        except ConnectionResetError:
            data = b""
        self.receive(data)
        self._flush()
        return bool(data)

    def until(self, name: str, wanted: bytes) -> bytes:
        """What has come on a stream once ``wanted`` is in it."""
        while wanted not in self.got[name]:
            assert self.read(), f"{_tails(self.got)} has no {wanted!r}"
        return bytes(self.got[name])

    def finish(self) -> dict[str, Any]:
        """Read to the end of the connection; the status on the error stream."""
        while self.read():
            pass
        self.sock.close()
        return json.loads(bytes(self.got["error"]) or b"{}")

    def close(self) -> None:
        """Go away without a word."""
        self.sock.close()

    def receive(self, data: bytes) -> None:
        names = {number: name for name, number in self.ids.items()}
        for event in self.spdy.receive(data):
            match event:
                case spdy.Data(stream=number, data=piece, ended=ended):
                    self.got[names[number]] += piece
                    self.spdy.consumed(number, len(piece))
                    if ended:
                        self.ended.add(names[number])
                case spdy.Reset(stream=number, status=status):
                    self.reset[names[number]] = status
                case spdy.GoneAway():
                    self.gone = True
                case spdy.ConnectionFailed():
                    raise AssertionError(event)

    def wrapped(self, data: bytes) -> bytes:
        """What travels in place of the connection's bytes."""
        return data

    def _flush(self) -> None:
        if data := self.spdy.take():
            try:
                self.sock.sendall(self.wrapped(data))
            except (BrokenPipeError, ConnectionResetError):
                pass  # what there is to read tells more


class WebSocket:
    """A client over WebSocket: ``got`` collects what comes on each channel, by number."""

    def __init__(self, url: str, protocol: str = "v5.channel.k8s.io", tls: ssl.SSLContext | None = None) -> None:
        self.sock, self.head, rest = connect_websocket(url, protocol, tls)
        everything = range(80)
        self.channels = websocket.Channels(protocol, readable=everything, writable=everything, client=True)
        self.got: dict[int, bytearray] = {number: bytearray() for number in everything}
        self.closed: websocket.Closed | None = None
        self._events(rest)

    def send(self, channel: int, data: bytes) -> None:
        self.channels.send(channel, data)
        self._flush()

    def end(self, channel: int) -> None:
        """Say that no more is written to a channel."""
        self.channels.close(channel)
        self._flush()

    def read(self) -> bool:
        """Take what comes next; False when the connection is at its end."""
        try:
            data = self.sock.recv(1 << 18)
        except ConnectionResetError:
            data = b""
        self._events(data)
        self._flush()
        return bool(data)

    def until(self, channel: int, wanted: bytes) -> bytes:
        """What has come on a channel once ``wanted`` is in it."""
        while wanted not in self.got[channel]:
            assert self.read(), f"{_tails(self.got)} has no {wanted!r}"
        return bytes(self.got[channel])

    def finish(self) -> dict[str, Any]:
        """Read to the end of the connection; the status on the error channel."""
        while self.read():
            pass
        self.sock.close()
        return json.loads(bytes(self.got[3]) or b"{}")

    def close(self) -> None:
        """Go away without a word."""
        self.sock.close()

    def _events(self, data: bytes) -> None:
        for event in self.channels.receive(data):
            match event:
                case websocket.ChannelData(channel=number, data=piece):
                    self.got[number] += piece
                case websocket.Closed():
                    self.closed = event

    def _flush(self) -> None:
        if data := self.channels.take():
            try:
                self.sock.sendall(data)
            except (BrokenPipeError, ConnectionResetError):
                pass


def _tails(got: dict[Any, bytearray]) -> dict[Any, bytes]:
    return {name: bytes(data[-100:]) for name, data in got.items() if data}
