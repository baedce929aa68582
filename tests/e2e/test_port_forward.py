"""Port forwarding: connections to a pod's ports over SPDY, over SPDY in a WebSocket, and over plain WebSockets."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterator

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.streaming import websocket
from tests.support.node import Node, refused, rss
from tests.support.pods import shared
from tests.support.services import Services
from tests.support.streaming_client import Refused, Spdy, WebSocket, connect_websocket
from tests.support.waiting import eventually


class Tunnel(Spdy):
    """A client whose SPDY travels in the binary messages of a WebSocket."""

    def __init__(self, url: str) -> None:
        self.tunnel = websocket.Tunnel(client=True)
        self.prepare()
        self.sock, self.head, rest = connect_websocket(url, websocket.TUNNEL_PROTOCOL)
        self.receive(rest)

    def receive(self, data: bytes) -> None:
        for event in self.tunnel.receive(data):
            if isinstance(event, websocket.TunnelData):
                super().receive(event.data)

    def wrapped(self, data: bytes) -> bytes:
        self.tunnel.send(data)
        return self.tunnel.take()


@pytest.fixture
def pod(node: Node) -> Iterator[str]:
    pod = node.run_pod()
    services = Services(f"{node.state}/ns/{pod}/net")
    yield pod
    services.close()


def forward(node: Node, pod: str, *ports: int) -> str:
    return node.client.PortForward(pod_sandbox_id=pod, port=ports).url


def spdy(node: Node, pod: str) -> Spdy:
    return Spdy(forward(node, pod), "portforward.k8s.io")


def tunnel(node: Node, pod: str) -> Spdy:
    return Tunnel(forward(node, pod))


either = pytest.mark.parametrize("client_of", [spdy, tunnel])


def open_port(client: Spdy, name: str, port: int | str) -> None:
    """Open a connection as kubectl does: the error stream, whose own side is closed at once, and the data stream."""
    headers = {"port": str(port), "requestid": name}
    client.open(f"{name}.error", streamtype="error", **headers)
    client.send(f"{name}.error", b"", end=True)
    client.open(name, streamtype="data", **headers)


def until_ended(client: Spdy, name: str) -> bytes:
    while name not in client.ended:
        assert client.read()
    return bytes(client.got[name])


@either
def test_a_service_that_speaks_first(node: Node, pod: str, client_of: Callable[[Node, str], Spdy]) -> None:
    client = client_of(node, pod)
    for number in range(3):
        open_port(client, f"r{number}", 7002)
        assert until_ended(client, f"r{number}") == b"hello from the pod"
        assert client.got[f"r{number}.error"] == b""
    client.close()


@either
def test_both_directions_at_once(node: Node, pod: str, client_of: Callable[[Node, str], Spdy]) -> None:
    client = client_of(node, pod)
    open_port(client, "echo", 7001)
    for word in (b"one", b"two" * 10000, b"three"):
        client.send("echo", word)
        client.until("echo", word)
    client.send("echo", b"", end=True)
    assert until_ended(client, "echo") == b"one" + b"two" * 10000 + b"three"


@either
def test_the_half_close_reaches_the_service(node: Node, pod: str, client_of: Callable[[Node, str], Spdy]) -> None:
    client = client_of(node, pod)
    open_port(client, "count", 7003)
    client.send("count", b"x" * 1_234_567)
    client.send("count", b"", end=True)
    assert until_ended(client, "count") == b"1234567"


def test_a_service_on_ipv6_alone(node: Node, pod: str) -> None:
    client = spdy(node, pod)
    open_port(client, "six", 7006)
    assert until_ended(client, "six") == b"hello over IPv6"


@either
def test_a_closed_port_is_told_on_the_error_stream_and_others_go_on(
    node: Node, pod: str, client_of: Callable[[Node, str], Spdy]
) -> None:
    client = client_of(node, pod)
    open_port(client, "open", 7001)
    open_port(client, "closed", 7999)
    assert b"port 7999 of pod sandbox" in until_ended(client, "closed.error")
    assert b"Connection refused" in client.got["closed.error"]
    client.send("open", b"still here")
    client.until("open", b"still here")


def test_many_connections_at_once(node: Node, pod: str) -> None:
    client = spdy(node, pod)
    names = [f"r{number}" for number in range(20)]
    for name in names:
        open_port(client, name, 7007)
    digest = hashlib.sha256(bytes(10_000_000)).digest()
    for name in names:
        assert hashlib.sha256(until_ended(client, name)).digest() == digest
    assert not client.reset.keys() & {f"{name}.error" for name in names if client.got[f"{name}.error"]}


def test_finished_connections_cost_nothing(node: Node, pod: str) -> None:
    client = spdy(node, pod)
    assert node.process is not None
    for number in range(600):
        open_port(client, f"r{number}", 7002)
        until_ended(client, f"r{number}")
        client.send(f"r{number}", b"", end=True)
        if number == 100:
            before = rss(node.process.pid)
    # Five hundred of them. What else the daemon does meanwhile may cost a page too.
    assert rss(node.process.pid) - before < 2 << 20
    assert node.streams() < 60


def test_a_client_that_goes_closes_its_connections(node: Node, pod: str) -> None:
    client = spdy(node, pod)
    open_port(client, "silent", 7004)
    open_port(client, "echo", 7001)
    client.send("echo", b"here")
    client.until("echo", b"here")
    count = node.streams()
    client.close()
    eventually(lambda: node.streams() <= count - 3)  # and those of an earlier test, which may be closing


def test_streams_with_headers_that_are_missing_or_wrong(node: Node, pod: str) -> None:
    client = spdy(node, pod)
    client.open("portless", streamtype="data", requestid="1")
    client.open("typeless", port="7001", requestid="2")
    client.open("no-port", streamtype="data", port="0", requestid="3")
    client.open("no-number", streamtype="data", port="http", requestid="4")
    client.open("strange", streamtype="resize", port="7001", requestid="5")
    client.open("first", streamtype="data", port="7001", requestid="6")
    client.open("twin", streamtype="data", port="7001", requestid="6")
    open_port(client, "right", 7002)
    assert until_ended(client, "right") == b"hello from the pod"
    assert set(client.reset) >= {"portless", "typeless", "no-port", "no-number", "strange", "twin"}
    assert "first" not in client.reset


def test_ports_by_channel_over_a_plain_websocket(node: Node, pod: str) -> None:
    client = WebSocket(forward(node, pod, 7001, 7002, 7999), "v4.channel.k8s.io")
    client.until(2, b"hello from the pod")
    client.send(0, b"echoed")
    client.until(0, b"echoed")
    client.until(5, b"Connection refused")
    assert [bytes(client.got[channel][:2]) for channel in range(6)] == [
        port.to_bytes(2, "little") for port in (7001, 7001, 7002, 7002, 7999, 7999)
    ]
    client.close()


def test_a_pod_on_the_nodes_network(node: Node) -> None:
    pod = node.run_pod("host", linux=shared(network=cri.NODE))
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = spdy(node, pod)
        open_port(client, "node", server.getsockname()[1])
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"from the node")
            client.until("node", b"from the node")


def test_a_port_that_comes_later(node: Node, pod: str) -> None:
    """An address is of the pod, not of what listens there just now."""
    client = spdy(node, pod)
    open_port(client, "early", 7100)
    assert b"refused" in until_ended(client, "early.error")
    container = node.run(pod, "late", ["sh", "-c", "echo late | nc -l -p 7100"])
    eventually(lambda: ":7100" in node.sh(container, "netstat -ltn"))
    open_port(client, "late", 7100)
    client.until("late", b"late\n")


def test_upload_and_download_at_once(node: Node, pod: str) -> None:
    client = spdy(node, pod)
    open_port(client, "echo", 7001)
    piece = os.urandom(1_000_000)
    received = bytearray()

    def feed() -> None:
        frame = client.ids["echo"].to_bytes(4, "big") + len(piece).to_bytes(4, "big") + piece
        for _ in range(30):
            client.sock.sendall(frame)

    feeder = threading.Thread(target=feed)
    feeder.start()
    while len(received) < 30 * len(piece):
        assert client.read()
        received += client.got["echo"]
        client.got["echo"].clear()
    feeder.join()
    assert received == piece * 30


def test_what_is_refused(node: Node, pod: str) -> None:
    with refused(grpc.StatusCode.NOT_FOUND, "does not exist"):
        forward(node, "f" * 64)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "port = 70000"):
        forward(node, pod, 70000)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "41 ports"):
        forward(node, pod, *range(1, 42))
    with pytest.raises(Refused) as e:
        Spdy(forward(node, pod), "v4.channel.k8s.io")
    assert e.value.status == 403
    node.client.StopPodSandbox(pod_sandbox_id=pod)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "not-ready"):
        forward(node, pod)
