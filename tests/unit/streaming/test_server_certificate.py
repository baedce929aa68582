"""The streaming server's certificate is replaced while it serves, and clients need one of their own."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
from pathlib import Path

import pytest

from criserver.errors import FailedPreconditionError
from criserver.streaming import server_certificate
from criserver.streaming.server import StreamingServer
from criserver.streaming.server_certificate import ServerCertificate
from tests.support.certificates import Authority, Certificate


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(str(tmp_path_factory.mktemp("authority")))


async def peer(server: StreamingServer, authority: Authority, client: Certificate | None = None) -> str:
    """The name in the server's certificate. Raises OSError if the server does not serve this client."""
    context = ssl.create_default_context(cafile=authority.own.cert)
    if client:
        context.load_cert_chain(client.cert, client.key)
    port = server._listeners[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    if not await reader.read(1):
        raise ConnectionResetError("closed")
    ((_, name),) = writer.get_extra_info("peercert")["subject"][0]
    writer.close()
    return str(name)


def replace(source: str, target: str) -> None:
    """As programs that renew certificates do: the file of this name is a new one."""
    shutil.copy(source, f"{target}.new")
    os.rename(f"{target}.new", target)


async def test_a_renewed_certificate_is_served_to_the_next_client(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(server_certificate.log, "warning", lambda _, error: told.append(error), raising=False)
    first, second = authority.issue("first"), authority.issue("second")
    cert, key = str(tmp_path / "tls.crt"), str(tmp_path / "tls.key")
    replace(first.cert, cert)
    replace(first.key, key)
    server = StreamingServer("127.0.0.1", 0, certificate=ServerCertificate(cert, key), idle=60)
    await server.start()
    try:
        assert await peer(server, authority) == "first"
        replace(second.cert, cert)
        assert await peer(server, authority) == "first", "the key is not there yet"
        assert await peer(server, authority) == "first"
        assert len(told) == 1
        assert "[streaming] tls_cert, tls_key cannot be used" in told[0]
        replace(second.key, key)
        assert await peer(server, authority) == "second"
        os.unlink(cert)
        assert await peer(server, authority) == "second"
        assert cert in told[-1]
    finally:
        await server.stop()


async def test_with_authorities_only_their_clients_are_served(authority: Authority, tmp_path: Path) -> None:
    own = authority.issue("server")
    strangers = Authority(str(tmp_path), "strangers")
    known, stranger = authority.issue("client"), strangers.issue("stranger")
    authorities = str(tmp_path / "ca.pem")
    replace(authority.own.cert, authorities)
    certificate = ServerCertificate(own.cert, own.key, authorities)
    server = StreamingServer("127.0.0.1", 0, certificate=certificate, idle=60)
    await server.start()
    try:
        assert await peer(server, authority, known) == "server"
        for refused in (None, stranger):
            with pytest.raises(OSError):
                await peer(server, authority, refused)
        replace(strangers.own.cert, authorities)
        assert await peer(server, authority, stranger) == "server"
    finally:
        await server.stop()


def test_files_that_cannot_be_used(authority: Authority, tmp_path: Path) -> None:
    own, other = authority.issue("one"), authority.issue("other")
    nowhere = str(tmp_path / "nowhere")
    for files in (
        (own.cert, other.key),
        (nowhere, own.key),
        (own.cert, own.key, nowhere),
        (own.cert, own.key, own.key),
    ):
        with pytest.raises(FailedPreconditionError, match=r"\[streaming\] tls_cert, tls_key"):
            ServerCertificate(*files)
