"""Port forwarding: which streams of SPDY, and which channels of a WebSocket, belong together; no I/O.

A forwarded connection is a pair of streams: one for the data, and one for an error message to the client. Over SPDY the
client opens both, with the headers ``port``, ``streamType`` and ``requestID``. Over a plain WebSocket the pairs are
fixed, one for each port of the request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from criserver.errors import AlreadyExistsError, InvalidArgumentError, ResourceExhaustedError
from criserver.streaming.remotecommand import STREAM_TYPE
from criserver.streaming.websocket import TUNNEL_PROTOCOL

PORT = "port"
REQUEST_ID = "requestid"
"""The headers of a stream, in lower case as SPDY sends them."""

SPDY_PROTOCOLS = ("portforward.k8s.io",)
WEBSOCKET_PROTOCOLS = (TUNNEL_PROTOCOL, "v4.channel.k8s.io", "v4.base64.channel.k8s.io", "")

DATA = "data"
ERROR = "error"


@dataclass(frozen=True, slots=True)
class StreamPair:
    """The streams of one forwarded connection by their IDs, None for one that the client has not opened yet.

    ``port`` is the pod's. Both streams should name the same port; the data stream decides.
    """

    key: str
    port: int
    data: int | None = None
    error: int | None = None

    @property
    def complete(self) -> bool:
        return self.data is not None and self.error is not None


class DuplicateStreamError(AlreadyExistsError):
    """A second stream of the same type for ``pair``. Its error stream can tell the client."""

    def __init__(self, pair: StreamPair, stream_type: str) -> None:
        super().__init__(
            f"the port forward {pair.key[:100]!r} has its {stream_type} stream already; use another requestID"
        )
        self.pair = pair


class StreamPairs:
    """The incomplete pairs of a SPDY connection: one stream of each is open. There are ``limit`` at most."""

    def __init__(self, limit: int = 1000) -> None:
        self._limit = limit
        self._waiting: dict[str, StreamPair] = {}

    def add(self, stream: int, headers: Iterable[tuple[str, str]]) -> StreamPair:
        """The pair of a stream that the client has opened. A pair that is complete is forgotten here.

        Names of headers are in lower case. Raises InvalidArgumentError for headers that are missing or wrong,
        DuplicateStreamError, and ResourceExhaustedError for too many incomplete pairs. The caller then resets the
        stream.
        """
        port, stream_type, request = _read(headers)
        # Old clients send no requestID. They open the error stream first and the data stream next. A client's IDs are
        # odd numbers, so the data stream's ID less 2 is the error stream's. The error stream's ID names the pair.
        key = request or str(stream - 2 if stream_type == DATA else stream)
        pair = self._waiting.get(key)
        if pair is None and len(self._waiting) >= self._limit:
            raise ResourceExhaustedError(f"{self._limit} port forwards wait for their second stream; try again later")
        pair = pair or StreamPair(key, port)
        if (pair.data if stream_type == DATA else pair.error) is not None:
            raise DuplicateStreamError(pair, stream_type)
        pair = replace(pair, data=stream, port=port) if stream_type == DATA else replace(pair, error=stream)
        if pair.complete:
            self._waiting.pop(key, None)
        else:
            self._waiting[key] = pair
        return pair

    def expire(self, pair: StreamPair) -> bool:
        """Forget an incomplete pair after its time; False where it is complete by now, or another pair has its key."""
        if self._waiting.get(pair.key) != pair:
            return False
        del self._waiting[pair.key]
        return True


def websocket_channels(ports: Sequence[int]) -> tuple[frozenset[int], frozenset[int]]:
    """The channels that the client writes to, and those that the server writes to: data 2n, errors 2n + 1 of port n."""
    return frozenset(range(0, 2 * len(ports), 2)), frozenset(range(2 * len(ports)))


def greeting(port: int) -> bytes:
    """The first message on both channels of a port of a plain WebSocket."""
    return port.to_bytes(2, "little")


def _read(headers: Iterable[tuple[str, str]]) -> tuple[int, str, str]:
    """A stream's port, type and requestID, "" without one. Raises InvalidArgumentError."""
    first: dict[str, str] = {}
    for name, value in headers:
        first.setdefault(name, value)
    text = first.get(PORT, "")
    if not text:
        raise InvalidArgumentError("a stream came without the header port; update the client")
    digits = text.lstrip("0")
    if not (text.isascii() and text.isdigit() and len(digits) <= 5 and 0 < int(digits or "0") < 1 << 16):
        raise InvalidArgumentError(f"port {text[:100]!r} is not a number from 1 to 65535")
    stream_type = first.get(STREAM_TYPE, "")
    if stream_type not in (DATA, ERROR):
        raise InvalidArgumentError(f"streamType {stream_type[:100]!r} is neither {DATA} nor {ERROR}; update the client")
    return int(digits), stream_type, first.get(REQUEST_ID, "")
