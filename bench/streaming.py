"""Exec and port-forward beside containerd: how soon the first byte comes, how many follow, what stalled clients cost.

usage: python bench/streaming.py [--rounds 20] [--megabytes 1000] [--stalled 10] [--containerd PATH]

Root, Debian's containerd, runc, CNI plugins, catatonit and busybox-static. The client is this program for both: it
opens streams by the project's SPDY, then moves frames without looking into them, so that it is not what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from bench.node import Containerd, Criserver, Node, build_images, memory, scratch
from criserver.streaming import spdy

# As kubectl's copies come: io.Copy's buffer.
CHUNK = 32 << 10
PORT = 8080


class Client:
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
        frame = struct.pack(">II", stream, CHUNK) + bytes(CHUNK)
        batch = frame * 8
        for _ in range(megabytes * 4):
            self.sock.sendall(batch)
        self.sock.sendall(struct.pack(">II", stream, 1 << 24))

    def close(self) -> None:
        self.sock.close()


def command(node: Node, container: str, words: list[str], *streams: str) -> Client:
    """A client of an exec."""
    wanted = dict.fromkeys(streams, True)
    url = node.client.Exec(container_id=container, cmd=words, **wanted).url
    return Client(url, "v4.channel.k8s.io", [{"streamtype": name} for name in ("error", *streams)])


def forward(node: Node, pod: str) -> Client:
    """A client with one forwarded connection."""
    url = node.client.PortForward(pod_sandbox_id=pod).url
    streams = [{"streamtype": kind, "port": str(PORT), "requestid": "1"} for kind in ("error", "data")]
    return Client(url, "portforward.k8s.io", streams)


class Contender:
    """A runtime with one pod; each method is one measurement."""

    def __init__(self, node: Node) -> None:
        self.node = node
        config = node.pod("stream")
        self.pod = node.client.RunPodSandbox(config=config).pod_sandbox_id
        self.container = node.run(self.pod, config, "c")
        server = node.container("server")
        script = f"while true; do nc -l -p {PORT} < /dev/zero > /dev/null; done"
        server.ClearField("command")
        server.command.extend(["sh", "-c", script])
        created = node.client.CreateContainer(pod_sandbox_id=self.pod, config=server, sandbox_config=config)
        node.client.StartContainer(container_id=created.container_id)

    def first_byte(self) -> float:
        """Milliseconds from the call of Exec to the first byte of the command's output."""
        begun = time.perf_counter()
        client = command(self.node, self.container, ["echo", "hello"], "stdout")
        client.first_byte()
        taken = (time.perf_counter() - begun) * 1000
        client.drain()
        client.close()
        return taken

    def out(self, megabytes: int) -> float:
        """MB/s of a command's output."""
        words = ["dd", "if=/dev/zero", "bs=1M", f"count={megabytes}"]
        with self._timed(megabytes) as timed:
            client = command(self.node, self.container, words, "stdout")
            assert client.drain() >= megabytes << 20
            client.close()
        return timed[0]

    def into(self, megabytes: int) -> float:
        """MB/s into a command that reads them."""
        with self._timed(megabytes) as timed:
            client = command(self.node, self.container, ["sh", "-c", "cat >/dev/null; echo done"], "stdin", "stdout")
            client.pour(client.ids[1], megabytes)
            client.drain()
            client.close()
        return timed[0]

    def forwarded(self, megabytes: int) -> float:
        """MB/s from a port of the pod."""
        client = forward(self.node, self.pod)
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

    def stalled(self, clients: int) -> tuple[float, float]:
        """MiB of PSS that the daemon and its helpers use more, for each client that does not read; the daemon alone."""
        before, daemon = self._memory(), memory(self.node.process.pid)
        held = [command(self.node, self.container, ["cat", "/dev/zero"], "stdout") for _ in range(clients)]
        time.sleep(3)
        used, own = self._memory() - before, memory(self.node.process.pid) - daemon
        for client in held:
            client.close()
        return used / clients, own / clients

    def _memory(self) -> float:
        return memory(self.node.process.pid) + sum(memory(pid) for pid in self.node.helpers())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="first bytes of each (default %(default)s)")
    parser.add_argument("--megabytes", type=int, default=1000, help="for each throughput (default %(default)s)")
    parser.add_argument("--stalled", type=int, default=10, help="clients that do not read (default %(default)s)")
    parser.add_argument("--containerd", default="containerd", help="the peer (default %(default)s)")
    options = parser.parse_args()
    with scratch() as base, Criserver(base, 1) as ours, Containerd(base, 2, options.containerd) as peer:
        archives = build_images(base)
        for node in (ours, peer):
            for archive in archives:
                node.load(archive)
            node.await_images()
        print(f"{ours.version()} beside {peer.version()}, load {os.getloadavg()[0]:.2f}")
        contenders = [Contender(ours), Contender(peer)]
        time.sleep(1)
        firsts: list[list[float]] = [[], []]
        for number in range(options.rounds + 1):
            for which in (0, 1) if number % 2 else (1, 0):
                value = contenders[which].first_byte()
                if number:
                    firsts[which].append(value)
        row("exec to first byte, ms", *(statistics.median(values) for values in firsts), better="less")
        for name, measure in (
            ("exec, output, MB/s", "out"),
            ("exec, input, MB/s", "into"),
            ("port-forward, MB/s", "forwarded"),
        ):
            values: list[list[float]] = [[], []]
            for number in range(3):
                for which in (0, 1) if number % 2 else (1, 0):
                    values[which].append(getattr(contenders[which], measure)(options.megabytes))
            row(name, *(statistics.median(found) for found in values), better="more")
        costs = [contender.stalled(options.stalled) for contender in contenders]
        row("PSS a stalled client, MiB", costs[0][0], costs[1][0], better="less")
        row("  of it the daemon's, MiB", costs[0][1], costs[1][1], better="less")


def row(name: str, ours: float, peers: float, *, better: str) -> None:
    """A line of the table."""
    print(f"{name:<28}{ours:>10.1f}{peers:>12.1f}   x{ours / peers:.2f} ({better} is better)", flush=True)


if __name__ == "__main__":
    main()
