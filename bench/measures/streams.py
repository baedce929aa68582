"""Exec and port-forward over SPDY: how soon the first byte comes, how many follow, what stalled clients cost.

The client opens streams by the project's SPDY. Then it moves frames without reading their contents, so that its own
work is small.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from bench.lives import Pod
from bench.nodes import Node
from bench.processes import memory
from bench.run import Run
from criserver.streaming import spdy

_CHUNK = 32 << 10  # io.Copy's buffer, as kubectl sends
_PORT = 8080
_FIRSTS = 4
_SETTLES = 2.0


def measure(run: Run) -> None:
    """Each contender in turn with one pod; the clients that do not read come last."""
    megabytes = run.sizes.stream_megabytes
    with run.nodes() as nodes:
        contenders = [_Contender(node) for node in nodes]
        time.sleep(1)
        for number, contender in run.turns(contenders, warm_up=True):
            samples = [("first-byte", contender.first_byte()) for _ in range(_FIRSTS)]
            samples += [("exec-output", contender.out(megabytes)), ("exec-input", contender.into(megabytes))]
            samples += [("port-forward", contender.forwarded(megabytes))]
            for row, value in samples if number else ():
                run.add(row, contender.node.name, value)
        for contender in contenders:
            run.add("stalled", contender.node.name, contender.stalled(run.sizes.stalled))


class _Stream:
    """A connection whose streams have been opened, and accepted."""

    def __init__(self, url: str, protocol: str, streams: list[dict[str, str]]) -> None:
        parts = urlsplit(url)
        self.sock = socket.create_connection((parts.hostname, parts.port), timeout=300)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lines = [f"POST {parts.path} HTTP/1.1", f"Host: {parts.netloc}", "Connection: Upgrade", "Upgrade: SPDY/3.1"]
        self.sock.sendall("\r\n".join((*lines, f"X-Stream-Protocol-Version: {protocol}", "", "")).encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += self.sock.recv(4096)
        assert b" 101 " in head, head
        self.spdy = spdy.Connection(client=True)
        self.early: list[Any] = []
        self.ids = [self.spdy.open(tuple(headers.items())) for headers in streams]
        self.sock.sendall(self.spdy.take())
        self.replied = 0
        self._take(head.partition(b"\r\n\r\n")[2])
        while self.replied < len(streams):
            self._take(self.sock.recv(4096))

    def _take(self, data: bytes) -> None:
        for event in self.spdy.receive(data):
            if isinstance(event, spdy.Replied):
                self.replied += 1
            else:
                self.early.append(event)

    def first_byte(self) -> None:
        """Wait for data on any stream."""
        while not any(isinstance(event, spdy.Data) and len(event.data) for event in self.early):
            data = self.sock.recv(4096)
            assert data
            self._take(data)

    def drain(self, enough: float = float("inf")) -> int:
        """Bytes that come, frames' heads among them, to the end of the connection or until there are enough."""
        buffer, size = bytearray(1 << 20), 0
        while size < enough and (count := self.sock.recv_into(buffer)):
            size += count
        return size

    def pour(self, stream: int, megabytes: int) -> None:
        """Send as kubectl does, and end the stream."""
        frame = struct.pack(">II", stream, _CHUNK) + bytes(_CHUNK)
        batch = frame * 8
        for _ in range(megabytes * 4):
            self.sock.sendall(batch)
        self.sock.sendall(struct.pack(">II", stream, 1 << 24))

    def close(self) -> None:
        self.sock.close()


def _command(node: Node, container: str, words: list[str], *streams: str) -> _Stream:
    """A client of an exec."""
    wanted = dict.fromkeys(streams, True)
    url = node.client.Exec(container_id=container, cmd=words, **wanted).url
    return _Stream(url, "v4.channel.k8s.io", [{"streamtype": name} for name in ("error", *streams)])


def _forward(node: Node, pod: str) -> _Stream:
    """A client with one forwarded connection."""
    url = node.client.PortForward(pod_sandbox_id=pod).url
    streams = [{"streamtype": kind, "port": str(_PORT), "requestid": "1"} for kind in ("error", "data")]
    return _Stream(url, "portforward.k8s.io", streams)


class _Contender:
    """A runtime with one pod; each method is one measurement."""

    def __init__(self, node: Node) -> None:
        self.node = node
        pod = Pod(node, "stream")
        pod.up()
        self.pod, self.container = pod.id, pod.container
        script = f"while true; do nc -l -p {_PORT} < /dev/zero > /dev/null; done"
        server = node.container("server", command=["sh", "-c", script])
        created = node.client.CreateContainer(pod_sandbox_id=self.pod, config=server, sandbox_config=pod.config)
        node.client.StartContainer(container_id=created.container_id)

    def first_byte(self) -> float:
        """Milliseconds from the call of Exec to the first byte of the command's output."""
        begun = time.perf_counter()
        client = _command(self.node, self.container, ["echo", "hello"], "stdout")
        client.first_byte()
        taken = (time.perf_counter() - begun) * 1000
        client.drain()
        client.close()
        return taken

    def out(self, megabytes: int) -> float:
        """MB/s of a command's output."""
        words = ["dd", "if=/dev/zero", "bs=1M", f"count={megabytes}"]
        with self._timed(megabytes) as timed:
            client = _command(self.node, self.container, words, "stdout")
            assert client.drain() >= megabytes << 20
            client.close()
        return timed[0]

    def into(self, megabytes: int) -> float:
        """MB/s into a command that reads them."""
        with self._timed(megabytes) as timed:
            client = _command(self.node, self.container, ["sh", "-c", "cat >/dev/null; echo done"], "stdin", "stdout")
            client.pour(client.ids[1], megabytes)
            client.drain()
            client.close()
        return timed[0]

    def forwarded(self, megabytes: int) -> float:
        """MB/s from a port of the pod."""
        client = _forward(self.node, self.pod)
        client.first_byte()
        with self._timed(megabytes) as timed:
            client.drain(megabytes << 20)
        client.close()
        time.sleep(0.3)  # the pod's server begins to listen again
        return timed[0]

    @contextlib.contextmanager
    def _timed(self, megabytes: int) -> Iterator[list[float]]:
        found: list[float] = []
        begun = time.perf_counter()
        yield found
        found.append(megabytes / (time.perf_counter() - begun))

    def stalled(self, clients: int) -> float:
        """MiB of PSS that the daemon and its helpers use more, for each client that does not read."""
        before = self._memory()
        held = [_command(self.node, self.container, ["cat", "/dev/zero"], "stdout") for _ in range(clients)]
        time.sleep(_SETTLES)
        used = self._memory() - before
        for client in held:
            client.close()
        return used / clients

    def _memory(self) -> float:
        return memory(self.node.process.pid) + sum(memory(pid) for pid in self.node.helpers())
