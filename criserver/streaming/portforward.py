"""Port forwarding: which streams of SPDY belong together, and which channels of a WebSocket; no I/O.

A forwarded connection is a pair: a stream of data, and one that tells the client of an error. Over SPDY a client opens
both with headers (``port``, ``streamType``, ``requestID``) for each connection that it takes; over a plain WebSocket
the pairs are fixed, one for each port of the request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from criserver.errors import AlreadyExistsError, InvalidArgumentError, ResourceExhaustedError
from criserver.streaming.remotecommand import STREAM_TYPE
from criserver.streaming.websocket import TUNNEL_PROTOCOL

PORT = "port"
REQUEST_ID = "requestid"
"""The headers of a stream, as they are on the wire of SPDY."""

SPDY_PROTOCOLS = ("portforward.k8s.io",)
WEBSOCKET_PROTOCOLS = (TUNNEL_PROTOCOL, "v4.channel.k8s.io", "v4.base64.channel.k8s.io", "")

DATA = "data"
ERROR = "error"


@dataclass(frozen=True, slots=True)
class Pair:
    """The streams of one forwarded connection by their ids, None for one that has not come.

    ``port`` is the pod's; the two streams should agree on it, and the one with the data decides.
    """

    key: str
    port: int
    data: int | None = None
    error: int | None = None

    @property
    def complete(self) -> bool:
        return self.data is not None and self.error is not None


class DuplicateStreamError(AlreadyExistsError):
    """A second stream of the same type for a ``pair``, whose error stream can tell the client."""

    def __init__(self, pair: Pair, kind: str) -> None:
        super().__init__(f"the port forward {pair.key[:100]!r} has its {kind} stream already; use another requestID")
        self.pair = pair


class Pairs:
    """The pairs of a SPDY connection of which one stream has not come yet, at most ``limit`` of them."""

    def __init__(self, limit: int = 1000) -> None:
        self._limit = limit
        self._waiting: dict[str, Pair] = {}

    def add(self, stream: int, headers: Iterable[tuple[str, str]]) -> Pair:
        """The pair of a stream that the client has opened: complete, and forgotten here, or the first half of it.

        Names of headers are in lower case. When it raises, the stream is to be reset: InvalidArgumentError for headers
        that are missing or wrong, DuplicateStreamError, ResourceExhaustedError for too many halves.
        """
        port, kind, request = _read(headers)
        # Clients of old send no requestID. They open the error stream first and the stream with the data next, and a
        # client's ids are odd numbers: the id of the error stream names the pair.
        key = request or str(stream - 2 if kind == DATA else stream)
        pair = self._waiting.get(key)
        if pair is None and len(self._waiting) >= self._limit:
            raise ResourceExhaustedError(f"{self._limit} port forwards wait for their second stream; try again later")
        pair = pair or Pair(key, port)
        if (pair.data if kind == DATA else pair.error) is not None:
            raise DuplicateStreamError(pair, kind)
        pair = replace(pair, data=stream, port=port) if kind == DATA else replace(pair, error=stream)
        if pair.complete:
            self._waiting.pop(key, None)
        else:
            self._waiting[key] = pair
        return pair

    def expire(self, pair: Pair) -> bool:
        """Forget a half whose time is up; False if it is complete by now, or another has its key."""
        if self._waiting.get(pair.key) != pair:
            return False
        del self._waiting[pair.key]
        return True


def websocket_channels(ports: Sequence[int]) -> tuple[frozenset[int], frozenset[int]]:
    """The channels that the client may write to, and those that we write to: data 2n and errors 2n + 1 of port n."""
    return frozenset(range(0, 2 * len(ports), 2)), frozenset(range(2 * len(ports)))


def greeting(port: int) -> bytes:
    """The first message on both channels of a port of a plain WebSocket."""
    return port.to_bytes(2, "little")


def _read(headers: Iterable[tuple[str, str]]) -> tuple[int, str, str]:
    """A stream's port, type and requestID, "" without one. Raises InvalidArgumentError."""
    found: dict[str, str] = {}
    for name, value in headers:
        found.setdefault(name, value)
    text = found.get(PORT, "")
    if not text:
        raise InvalidArgumentError("a stream came without the header port; update the client")
    digits = text.lstrip("0")
    if not (text.isascii() and text.isdigit() and len(digits) <= 5 and 0 < int(digits or "0") < 1 << 16):
        raise InvalidArgumentError(f"port {text[:100]!r} is not a number from 1 to 65535")
    kind = found.get(STREAM_TYPE, "")
    if kind not in (DATA, ERROR):
        raise InvalidArgumentError(f"streamType {kind[:100]!r} is neither {DATA} nor {ERROR}; update the client")
    return int(digits), kind, found.get(REQUEST_ID, "")
