"""Any bytes as a request to upgrade, cut anywhere: nothing raises, and answers are bounded."""

from __future__ import annotations

from criserver.streaming.handshake import Handshake, Refusal, Request, Upgrade

LIMITS = (16384, 256, 64)


def check(data: bytes) -> None:
    """The first byte says how large a request may be, the second the size of the pieces; the rest is what comes."""
    if len(data) < 2:
        return
    limit, size, data = LIMITS[data[0] % len(LIMITS)], data[1] % 32 + 1, data[2:]
    whole, cut = Handshake(limit), Handshake(limit)
    result = whole.receive(data)
    found = [found for at in range(0, len(data), size) if (found := cut.receive(data[at : at + size])) is not None]
    assert found == ([] if result is None else [result])
    assert whole.rest == cut.rest
    assert result is None or whole.receive(b"more") is None
    match result:
        case None:
            assert len(data) < limit
        case Refusal(status=status, response=response):
            assert 400 <= status < 600
            assert response.startswith(b"HTTP/1.1 %d " % status)
            assert len(response) < 1024
            assert whole.rest == b""
        case Request() as request:
            check_request(whole, request, data, limit)


def check_request(handshake: Handshake, request: Request, data: bytes, limit: int) -> None:
    assert handshake.rest.endswith(b"more")
    assert data.endswith(handshake.rest[:-4])
    assert len(data) - len(handshake.rest[:-4]) <= limit
    assert request.path.startswith("/")
    assert all(protocol and protocol == protocol.strip(" \t") and "," not in protocol for protocol in request.protocols)
    for protocol in request.protocols or ("",):
        response = handshake.accept(protocol)
        head, end, rest = response.partition(b"\r\n\r\n")
        assert (end, rest) == (b"\r\n\r\n", b"")
        assert head.startswith(b"HTTP/1.1 101 ")
        assert (
            head.count(b"\n") == head.count(b"\r\n") == (4 if request.upgrade is Upgrade.WEBSOCKET and protocol else 3)
        )
    refused = handshake.refuse_protocols(["v4.channel.k8s.io"])
    assert refused.startswith(b"HTTP/1.1 403 ")
    assert len(refused) < limit * 2 + 1024
