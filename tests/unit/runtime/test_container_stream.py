"""Port forwarding: what is said of a port that cannot be reached."""

from __future__ import annotations

import errno
import os
import socket
from typing import cast

import pytest

from criserver.errors import UnavailableError
from criserver.network.pod_socket import stream_socket
from criserver.runtime import container_stream
from criserver.runtime.node import Node


async def test_a_closed_port_of_a_node_without_ipv6_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lack of IPv6, which is no news, does not hide that the port is closed."""

    async def without_ipv6(path: str | None, family: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        return await stream_socket(path, family)

    monkeypatch.setattr(container_stream, "_network_of", lambda *_: None)
    monkeypatch.setattr(container_stream, "stream_socket", without_ipv6)
    with socket.socket() as bound:  # nobody listens, and nobody else gets the port
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        words = "IPv4: Connection refused; IPv6: Address family not supported by protocol"
        with pytest.raises(UnavailableError, match=f"^port {port} of pod sandbox p: {words}$"):
            await container_stream._dial(cast(Node, None), "p", port)
