"""Any bytes on a WebSocket, cut anywhere: nothing raises, and memory is bounded."""

from __future__ import annotations

from criserver.streaming.websocket import (
    BASE64_PROTOCOLS,
    BINARY_PROTOCOLS,
    ChannelClosed,
    ChannelData,
    Channels,
    Closed,
    Event,
    Tunnel,
    TunnelData,
)

PROTOCOLS = [*sorted(BINARY_PROTOCOLS | BASE64_PROTOCOLS), "tunnel"]


def check(data: bytes) -> None:
    """The first byte says which sub-protocol, the second the size of the pieces; the rest is what the client sends.

    The second byte also says whether we have closed before it does.
    """
    if len(data) < 2:
        return
    kind, size, closing, data = data[0], data[1] % 32 + 1, data[1] > 127, data[2:]
    whole, cut = connection(kind), connection(kind)
    if closing:
        whole.close_all()
        cut.close_all()
    events = whole.receive(data)
    pieces = []
    for at in range(0, len(data), size):
        pieces += cut.receive(data[at : at + size])
        # A frame's head, or a ping or close as a whole, is all that is ever kept of it.
        assert len(cut._wire._proto._frame_decoder.buffer) < 14 + 125
    assert whole.open is cut.open is not (whole.ended or closing)
    assert whole.ended is cut.ended is bool(events and isinstance(events[-1], Closed))
    assert not any(isinstance(event, Closed) for event in events[:-1] + pieces[:-1])

    # Of text that turns out to be none, more may have been handed on before it did; and a tunnel wants no text at all.
    refused = whole.ended and {events[-1].code, pieces[-1].code} <= {1003, 1007}
    if not refused:
        assert written(events) == written(pieces)
        assert [event for event in events if not isinstance(event, ChannelData | TunnelData)] == [
            event for event in pieces if not isinstance(event, ChannelData | TunnelData)
        ]
    assert sum(len(part) for part in written(events).values()) <= (0 if closing else len(data))

    answer = whole.take()
    assert refused or answer == cut.take()
    assert len(answer) <= 2 * 127  # a pong and a close
    if whole.ended:
        assert whole.receive(data) == []
    whole.close_all()
    assert not whole.open


def connection(kind: int) -> Channels | Tunnel:
    name = PROTOCOLS[kind % len(PROTOCOLS)]
    return Tunnel() if name == "tunnel" else Channels(name, readable={0, 4}, writable={1, 3})


def written(events: list[Event]) -> dict[int, bytes]:
    """What was written to each channel; to the tunnel is -1."""
    found: dict[int, bytes] = {}
    for event in events:
        match event:
            case ChannelData(channel=channel, data=data):
                assert channel in (0, 4)
                assert data
                found[channel] = found.get(channel, b"") + data
            case TunnelData(data=data):
                assert data
                found[-1] = found.get(-1, b"") + data
            case ChannelClosed(channel=channel):
                assert channel in (0, 4)
    return found
