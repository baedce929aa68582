"""Registries with TLS: authorities of their own, client certificates, the keys of hosts.toml; and proxies."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from criserver.errors import FailedPreconditionError, UnavailableError
from criserver.images import Credentials
from tests.support.certificates import Authority, Certificate
from tests.support.imagebuilder import BuiltImage
from tests.support.ownregistry import Server, image, refused, rooms, server
from tests.support.registry import Registry, free_port, registry, running
from tests.support.rooms import Rooms
from tests.support.waiting import eventually

__all__ = ["image", "registry", "rooms", "server"]


@dataclass(frozen=True)
class Secure:
    """A docker-registry with TLS that wants to see a client certificate, and all the certificates that there are."""

    registry: Registry
    authority: Authority
    client: Certificate

    @property
    def server(self) -> str:
        """The line of a hosts.toml that names it."""
        return f'server = "https://{self.registry.address}"\n'

    @property
    def ca(self) -> str:
        return f'ca = "{self.authority.own.cert}"\n'

    @property
    def pair(self) -> str:
        return f'client = [["{self.client.cert}", "{self.client.key}"]]\n'


@pytest.fixture(scope="module")
def secure(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    directory = str(tmp_path_factory.mktemp("secure"))
    authority = Authority(directory)
    own, client = authority.issue("server"), authority.issue("client")
    tls = {"certificate": own.cert, "key": own.key, "clientcas": [authority.own.cert]}
    with running(directory, storage=registry, tls=tls) as found:
        yield Secure(found, authority, client)


@pytest.fixture
def name(registry: Registry, image: BuiltImage) -> str:
    """The image in the registry, by a name that says nothing of where that is."""
    registry.push(image, "tls:1")
    return "r.example/tls:1"


async def test_an_own_authority_and_a_client_certificate(
    secure: Secure, rooms: Rooms, image: BuiltImage, name: str
) -> None:
    rooms.configure("r.example", secure.server + secure.ca + secure.pair)
    assert (await rooms.images.pull(name)).id == image.id


async def test_skip_verify(secure: Secure, rooms: Rooms, image: BuiltImage, name: str) -> None:
    rooms.configure("r.example", secure.server + secure.pair + "skip_verify = true")
    assert (await rooms.images.pull(name)).id == image.id


@pytest.mark.parametrize("trust", ["", "skip_verify = false\n"])
async def test_an_unknown_authority(secure: Secure, rooms: Rooms, name: str, trust: str) -> None:
    rooms.configure("r.example", secure.server + secure.pair + trust)
    await refused(rooms, name, UnavailableError, "cannot connect", "certificate verify failed")


async def test_without_the_client_certificate(secure: Secure, rooms: Rooms, name: str) -> None:
    rooms.configure("r.example", secure.server + secure.ca)
    await refused(rooms, name, UnavailableError, secure.registry.address)


async def test_another_name(secure: Secure, rooms: Rooms, name: str) -> None:
    text = secure.server.replace("127.0.0.1", "127.0.0.2")
    async with relay("127.0.0.2", secure.registry.address):
        rooms.configure("r.example", text + secure.ca + secure.pair)
        await refused(rooms, name, UnavailableError, "cannot connect", "IP address mismatch")


@pytest.mark.parametrize("key", ["ca", "client"])
async def test_a_certificate_file_that_is_missing_or_broken_is_named(
    secure: Secure, rooms: Rooms, name: str, key: str
) -> None:
    Path(rooms.root, "broken.pem").write_text("no certificate")
    for path in (f"{rooms.root}/missing.pem", f"{rooms.root}/broken.pem"):
        rooms.configure("r.example", f'{secure.server}{key} = "{path}"\n')
        await refused(rooms, name, FailedPreconditionError, f"certificate file {path}")


async def test_a_client_certificate_with_its_key_in_one_file_and_an_intermediate_authority(
    secure: Secure, rooms: Rooms, image: BuiltImage, name: str
) -> None:
    with open(f"{rooms.root}/both.pem", "w") as f:
        f.writelines(Path(path).read_text() for path in (secure.client.cert, secure.client.key))
    rooms.configure("r.example", f'{secure.server}{secure.ca}client = "{rooms.root}/both.pem"\n')
    assert (await rooms.images.pull(name)).id == image.id


async def test_a_servers_own_certificate_may_be_its_authority(rooms: Rooms, image: BuiltImage, tmp_path: Path) -> None:
    certificate = Authority(str(tmp_path)).issue("server")
    async with Server(image).running(certificate.server_context()) as own:
        rooms.configure(own.address, f'server = "https://{own.address}"\nca = "{certificate.cert}"')
        assert (await rooms.images.pull(f"{own.address}/app:1")).id == image.id


async def test_certificates_without_a_hosts_toml(secure: Secure, rooms: Rooms, image: BuiltImage, name: str) -> None:
    address = secure.registry.address
    directory = os.path.join(rooms.certs, address)
    os.makedirs(directory)
    shutil.copy(secure.authority.own.cert, f"{directory}/own.crt")
    await refused(rooms, f"{address}/tls:1", UnavailableError)
    shutil.copy(secure.client.cert, f"{directory}/client.cert")
    shutil.copy(secure.client.key, f"{directory}/client.key")
    assert (await rooms.images.pull(f"{address}/tls:1")).id == image.id


async def test_the_second_of_two_directories(secure: Secure, rooms: Rooms, image: BuiltImage, name: str) -> None:
    os.makedirs(f"{rooms.root}/docker/r.example")
    with open(f"{rooms.root}/docker/r.example/hosts.toml", "w") as f:
        f.write(secure.server + secure.ca + secure.pair)
    rooms.change(config_path=f"{rooms.certs}:{rooms.root}/docker")
    assert (await rooms.images.pull(name)).id == image.id


async def test_a_registry_of_the_loopback_interface_needs_no_authority(
    rooms: Rooms, image: BuiltImage, tmp_path: Path
) -> None:
    certificate = Authority(str(tmp_path)).issue("server")
    async with Server(image).running(certificate.server_context()) as own:
        assert (await rooms.images.pull(f"{own.address}/app:1")).id == image.id


async def test_tls_settings_at_an_http_address_go_back_to_http_where_there_is_no_tls(
    server: Server, rooms: Rooms, image: BuiltImage
) -> None:
    rooms.configure("r.example", f'server = "http://{server.address}"\nskip_verify = true')
    assert (await rooms.images.pull("r.example/app:1")).id == image.id


async def test_no_credentials_go_out_in_plain_text_because_a_certificate_is_bad(
    rooms: Rooms, image: BuiltImage, tmp_path: Path
) -> None:
    certificate = Authority(str(tmp_path)).issue("server")
    other = Authority(str(tmp_path), "other")
    firsts: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        firsts.append(await reader.read(1))
        await _join(reader, writer, own.address, firsts[-1])

    async with (
        Server(image).running(certificate.server_context()) as own,
        await asyncio.start_server(listen, "127.0.0.1", 0) as listener,
    ):
        address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        rooms.configure("r.example", f'server = "http://{address}"\nca = "{other.own.cert}"')
        await refused(rooms, "r.example/app:1", UnavailableError, "verify failed", credentials=Credentials("a", "b"))
    assert set(firsts) == {b"\x16"}  # a TLS handshake, and no request


async def test_what_a_registry_leads_to_is_trusted_as_it_is_and_does_not_see_the_client_certificate(
    secure: Secure, rooms: Rooms, image: BuiltImage, tmp_path: Path
) -> None:
    storage_tls = secure.authority.issue("storage").server_context()
    storage_tls.load_verify_locations(secure.authority.own.cert)
    storage_tls.verify_mode = ssl.CERT_OPTIONAL
    own_tls = secure.authority.issue("own").server_context(secure.authority.own)
    layer = image.manifest["layers"][0]["digest"]
    async with Server(image).running(storage_tls) as storage, Server(image).running(own_tls) as own:
        target = f"https://{storage.address}/{layer}"
        seen = {}

        async def answer(request: web.Request) -> web.StreamResponse:
            seen["storage"] = request.transport.get_extra_info("peercert")
            return storage.serve(request)

        async def redirect(request: web.Request) -> web.StreamResponse:
            seen["own"] = request.transport.get_extra_info("peercert")
            return web.Response(status=307, headers={"Location": target})

        storage.answers[layer] = answer
        own.answers[layer] = redirect
        rooms.configure(own.address, f'server = "https://{own.address}"\n{secure.ca}{secure.pair}')
        assert (await rooms.images.pull(f"{own.address}/app:1")).id == image.id
    assert seen["own"]["subject"] == ((("commonName", "client"),),)
    assert not seen["storage"]


async def test_a_tag_is_not_resolved_over_plain_http_by_a_redirect(
    server: Server, rooms: Rooms, image: BuiltImage, tmp_path: Path
) -> None:
    certificate = Authority(str(tmp_path)).issue("server")
    async with Server(image).running(certificate.server_context()) as own:
        target = f"http://{server.address}/v2/app/manifests/1"
        own.answers["1"] = lambda _: web.Response(status=307, headers={"Location": target})
        rooms.configure(own.address, f'server = "https://{own.address}"\nskip_verify = true')
        await refused(rooms, f"{own.address}/app:1", UnavailableError, "redirects from https to http")
        assert server.requests == []


# Proxies


@dataclass
class Proxy:
    """A proxy that connects everybody to ``target``, whatever they ask for, and remembers what that was."""

    target: str
    answer: bytes = b""
    lines: list[str] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    address: str = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Proxy]:
        listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        async with listener:
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.lines.append(head.decode().splitlines()[0])
        self.headers += head.decode().splitlines()[1:]
        if self.answer:
            writer.write(self.answer)
            writer.close()
            return
        if head.startswith(b"CONNECT "):
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            head = b""
        await _join(reader, writer, self.target, head)


async def _join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: str, first: bytes = b"") -> None:
    host, _, port = target.partition(":")
    far_reader, far_writer = await asyncio.open_connection(host, int(port))
    far_writer.write(first)
    await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer), return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


@asynccontextmanager
async def relay(host: str, target: str) -> AsyncIterator[None]:
    """The same port at another address of the loopback interface."""
    port = int(target.rpartition(":")[2])
    async with await asyncio.start_server(lambda r, w: _join(r, w, target), host, port):
        yield


async def test_a_registry_behind_a_proxy(
    secure: Secure, rooms: Rooms, image: BuiltImage, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f'server = "https://registry.example"\n{secure.pair}skip_verify = true'
    rooms.configure("r.example", text)
    async with Proxy(secure.registry.address).running() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:secret@{proxy.address}")
        assert (await rooms.images.pull(name)).id == image.id
        assert set(proxy.lines) == {"CONNECT registry.example:443 HTTP/1.1"}
        assert "Proxy-Authorization: Basic bWU6c2VjcmV0" in proxy.headers
        assert not any(header.startswith("Authorization") for header in proxy.headers)


async def test_a_registry_without_tls_behind_a_proxy(
    server: Server, rooms: Rooms, image: BuiltImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms.configure("r.example", 'server = "http://registry.example"')
    async with Proxy(server.address).running() as proxy:
        monkeypatch.setenv("http_proxy", proxy.address)
        assert (await rooms.images.pull("r.example/app:1")).id == image.id
        assert proxy.lines[0] == "GET http://registry.example/v2/app/manifests/1?ns=r.example HTTP/1.1"


@asynccontextmanager
async def socks_proxy(*options: str) -> AsyncIterator[str]:
    """The address of a SOCKS proxy, for which registry.example is the loopback address."""
    with tempfile.NamedTemporaryFile("w") as hosts:
        hosts.write("127.0.0.1 registry.example\n")
        hosts.flush()
        port = free_port()
        command = f'mount --bind {hosts.name} /etc/hosts; exec microsocks -i 127.0.0.1 -p {port} "$@"'
        words = ["unshare", "--mount", "sh", "-c", command, "sh", *options]
        proxy = await asyncio.create_subprocess_exec(*words, stderr=asyncio.subprocess.DEVNULL)
        try:
            await asyncio.to_thread(eventually, lambda: listens(port))
            yield f"127.0.0.1:{port}"
        finally:
            proxy.kill()
            await proxy.wait()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
async def test_a_registry_behind_a_socks_proxy(
    secure: Secure, rooms: Rooms, image: BuiltImage, name: str, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """With a user and a password. The proxy resolves the registry's name."""
    port = secure.registry.address.rpartition(":")[2]
    async with socks_proxy("-u", "me", "-P", "sec:ret") as address:
        monkeypatch.setenv("HTTPS_PROXY", f"{scheme}://me:sec%3Aret@{address}")
        rooms.configure("r.example", 'server = "https://registry.example:1"')
        await refused(rooms, name, UnavailableError, "cannot connect: the proxy: ")
        rooms.configure("r.example", f'server = "https://registry.example:{port}"')
        await refused(rooms, name, UnavailableError, "certificate")
        rooms.configure("r.example", f'server = "https://registry.example:{port}"\n{secure.pair}skip_verify = true')
        monkeypatch.setenv("HTTPS_PROXY", f"{scheme}://me:wrong@{address}")
        await refused(rooms, name, UnavailableError, "cannot connect: the proxy: ")
        monkeypatch.setenv("HTTPS_PROXY", f"{scheme}://me:sec%3Aret@{address}")
        assert (await rooms.images.pull(name)).id == image.id


async def test_a_registry_without_tls_behind_a_socks_proxy(
    server: Server, rooms: Rooms, image: BuiltImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms.configure("r.example", f'server = "http://registry.example:{server.address.rpartition(":")[2]}"')
    async with socks_proxy() as address:
        monkeypatch.setenv("HTTP_PROXY", "socks5://127.0.0.1:1")
        await refused(rooms, "r.example/app:1", UnavailableError, "cannot connect: the proxy: Connection refused")
        monkeypatch.setenv("HTTP_PROXY", "socks5://no-such-host.invalid")
        await refused(rooms, "r.example/app:1", UnavailableError, "cannot connect: the proxy: ", "ame")
        monkeypatch.setenv("HTTP_PROXY", f"socks5://{address}")
        assert (await rooms.images.pull("r.example/app:1")).id == image.id


async def test_no_proxy(server: Server, rooms: Rooms, image: BuiltImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8,.example")
    rooms.configure("r.example", 'server = "http://registry.invalid"')
    await refused(rooms, "r.example/app:1", UnavailableError, "cannot connect: the proxy: Connection refused")
    rooms.configure("r.example", 'server = "http://no-such-host.example"')
    await refused(rooms, "r.example/app:1", UnavailableError, "http://no-such-host.example: cannot connect: ")
    assert (await rooms.images.pull(f"{server.address}/app:1")).id == image.id  # a loopback address


async def test_a_proxy_that_refuses(rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms.configure("r.example", 'server = "https://registry.example"')
    answer = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
    async with Proxy("", answer).running() as proxy:
        monkeypatch.setenv("https_proxy", proxy.address)
        await refused(rooms, "r.example/app:1", UnavailableError, "cannot connect: the proxy answers 407")


async def test_a_netrc_is_not_read(
    server: Server, rooms: Rooms, image: BuiltImage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    await rooms.images.pull(f"{server.address}/app:1")
    assert all("Authorization" not in request.headers for request in server.requests)
