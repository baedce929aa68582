"""Services in a pod's network namespace, for port forwarding."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import threading
from collections.abc import Callable


class Services:
    """Servers that listen in the network of a pod, each connection in a thread of its own."""

    def __init__(self, network: str) -> None:
        self.listeners: list[socket.socket] = []
        # A thread of its own: it does not come back from the pod's network, the sockets do.
        thread = threading.Thread(target=self._listen, args=(network,))
        thread.start()
        thread.join()

    def _listen(self, network: str) -> None:
        with open(network) as f:
            assert ctypes.CDLL(None).setns(f.fileno(), 0) == 0
        for family, host, port, serve in SERVICES:
            self.add(family, host, port, serve)

    def add(self, family: int, host: str, port: int, serve: Callable[[socket.socket], None]) -> None:
        listener = socket.create_server((host, port), family=family, backlog=200)
        self.listeners.append(listener)
        threading.Thread(target=self._accept, args=(listener, serve), daemon=True).start()

    def _accept(self, listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._serve, args=(connection, serve), daemon=True).start()

    def _serve(self, connection: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        with connection, contextlib.suppress(OSError):
            serve(connection)

    def close(self) -> None:
        for listener in self.listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()


def fetched(port: int) -> bytes:
    """All that comes from a port of this host."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        found = b""
        while piece := sock.recv(4096):
            found += piece
        return found


def echo(connection: socket.socket) -> None:
    while data := connection.recv(1 << 16):
        connection.sendall(data)


def count(connection: socket.socket) -> None:
    """Answers once it has read to the end."""
    size = 0
    while data := connection.recv(1 << 16):
        size += len(data)
    connection.sendall(str(size).encode())


def silent(connection: socket.socket) -> None:
    connection.recv(1)


def say(words: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(words)


SERVICES: list[tuple[int, str, int, Callable[[socket.socket], None]]] = [
    (socket.AF_INET, "127.0.0.1", 7001, echo),
    (socket.AF_INET, "127.0.0.1", 7002, say(b"hello from the pod")),
    (socket.AF_INET, "127.0.0.1", 7003, count),
    (socket.AF_INET, "127.0.0.1", 7004, silent),
    (socket.AF_INET6, "::1", 7006, say(b"hello over IPv6")),
    (socket.AF_INET, "127.0.0.1", 7007, say(bytes(10_000_000))),
]
