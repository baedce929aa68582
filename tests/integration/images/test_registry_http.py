"""HTTP as Go's client takes it, by a server that sends its responses byte by byte as they are written here."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import zlib
from collections.abc import AsyncIterator, Callable

import pytest

from criserver.errors import (
    CriError,
    DataLossError,
    InvalidArgumentError,
    UnauthenticatedError,
    UnavailableError,
)
from criserver.images import Credentials
from tests.support.imagebuilder import BuiltImage, add_blob
from tests.support.ownregistry import image, refused, rooms
from tests.support.rooms import Rooms

__all__ = ["image", "rooms"]

Respond = Callable[[bytes, str], bytes]  # the body and its media type, as a whole response


def response(body: bytes, kind: str, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def sized(body: bytes, kind: str, *headers: str, status: str = "200 OK") -> bytes:
    return response(body, kind, f"Content-Length: {len(body)}", *headers, status=status)


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


class RawServer:
    """Serves one image as ``app:1``. ``requests`` are the heads that came; ``respond`` makes each response."""

    def __init__(self, image: BuiltImage, respond: Respond) -> None:
        self.image = image
        self.respond = respond
        self.special: Callable[[str, str], bytes | None] = lambda _path, _head: None
        self.requests: list[str] = []
        self.address = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.requests.append(head)
                writer.write(self.answer(head.split()[1], head))
                await writer.drain()
        writer.close()

    def answer(self, path: str, head: str) -> bytes:
        if (special := self.special(path, head)) is not None:
            return special
        name = path.partition("?")[0].rpartition("/")[2]
        wanted = self.image.digest if name == "1" else name
        kind = str(self.image.descriptor["mediaType"]) if "/manifests/" in path else "application/octet-stream"
        return self.respond(self.image.blobs[wanted], kind)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[RawServer]:
        listening = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            listening.close()


TAKEN: dict[str, Respond] = {
    "203": lambda body, kind: sized(body, kind, status="203 Non-Authoritative Information"),
    "201": lambda body, kind: sized(body, kind, status="201 Created"),
    "206 of the whole": lambda body, kind: sized(body, kind, status="206 Partial Content"),
    "206 that says so": lambda body, kind: sized(
        body, kind, f"Content-Range: bytes 0-{len(body) - 1}/{len(body)}", status="206 Partial Content"
    ),
    "no reason": lambda body, kind: sized(body, kind, status="200"),
    "a header of 100 KB": lambda body, kind: sized(body, kind, "X-Long: " + "x" * 100_000),
    "a header of 1 MB": lambda body, kind: sized(body, kind, "X-Long: " + "x" * 1_000_000),
    "300 headers": lambda body, kind: sized(body, kind, *(f"X-{n}: {n}" for n in range(300))),
    "2000 headers": lambda body, kind: sized(body, kind, *(f"X-{n}: {n}" for n in range(2000))),
    "the length twice": lambda body, kind: sized(body, kind, f"content-length:  {len(body)} "),
    "the length three times": lambda body, kind: sized(body, kind, *[f"Content-Length: {len(body)}"] * 2),
    "a length beside chunks": lambda body, kind: sized(chunked(body), kind, "Transfer-Encoding: chunked"),
    "a wrong length beside chunks": lambda body, kind: response(
        chunked(body), kind, "Content-Length: 3", "Transfer-Encoding: Chunked"
    ),
    "space before a colon": lambda body, kind: sized(body, kind, "X-Old : y"),
    "space before the colon of the length": lambda body, kind: response(body, kind, f"Content-Length\t : {len(body)}"),
    "more than the length": lambda body, kind: sized(body, kind) + b"\r\n<html>",
    "an early hint": lambda body, kind: b"HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\n" + sized(body, kind),
    "five early hints": lambda body, kind: b"HTTP/1.1 103 Early Hints\r\n\r\n" * 5 + sized(body, kind),
    "an early hint and the length twice": lambda body, kind: (
        b"HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\n" + sized(body, kind, f"Content-Length: {len(body)}")
    ),
    "gzip": lambda body, kind: sized(gzip.compress(body), kind, "Content-Encoding: gzip"),
    "gzip in chunks": lambda body, kind: response(
        chunked(gzip.compress(body)), kind, "Content-Encoding: gzip", "Transfer-Encoding: chunked"
    ),
    "x-gzip": lambda body, kind: sized(gzip.compress(body), kind, "Content-Encoding: x-gzip"),
    "deflate": lambda body, kind: sized(zlib.compress(body), kind, "Content-Encoding: deflate"),
    "gzip that is only said": lambda body, kind: sized(body, kind, "Content-Encoding: gzip"),
    "gzip in chunks that is only said": lambda body, kind: response(
        chunked(body), kind, "Content-Encoding: gzip", "Transfer-Encoding: chunked"
    ),
    "identity": lambda body, kind: sized(body, kind, "Content-Encoding: identity"),
}


@pytest.mark.parametrize("name", TAKEN)
async def test_an_image_is_pulled(rooms: Rooms, image: BuiltImage, name: str) -> None:
    async with RawServer(image, TAKEN[name]).running() as server:
        rooms.configure(server.address, f'server = "http://{server.address}"')
        assert (await rooms.images.pull(f"{server.address}/app:1")).id == image.id


REFUSED: dict[str, tuple[Respond, str]] = {
    "two lengths": (lambda body, kind: sized(body, kind, "Content-Length: 3"), "cannot read the HTTP response"),
    "no HTTP": (lambda body, _: b"SSH-2.0-OpenSSH\r\n\r\n" + body, "cannot read the HTTP response"),
    "six early hints": (
        lambda body, kind: b"HTTP/1.1 103 Early Hints\r\n\r\n" * 6 + sized(body, kind),
        "(more than 5 informational responses)",
    ),
    "a head without an end": (lambda body, kind: sized(body, kind, "X: " + "x" * 3_000_000), "cannot read the HTTP"),
    "a head of many long headers": (
        lambda body, kind: sized(body, kind, *[f"X: {'x' * 900_000}"] * 4),
        "(a head of more than 2097152 bytes)",
    ),
    "a head of many lines": (lambda body, kind: sized(body, kind, *["X:"] * 20_001), "cannot read the HTTP"),
    "no length that is a number": (
        lambda body, kind: response(body, kind, "Content-Length: many"),
        "cannot read the HTTP response",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_no_response_is_told_as_ours(rooms: Rooms, image: BuiltImage, name: str) -> None:
    respond, words = REFUSED[name]
    async with RawServer(image, respond).running() as server:
        rooms.configure(server.address, f'server = "http://{server.address}"')
        await refused(rooms, f"{server.address}/app:1", UnavailableError, words)


ENDLESS: dict[str, tuple[bytes, bytes, float, type[CriError], str]] = {
    # A head is no progress, and an encoded body without content is none either.
    "head": (b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.02, UnavailableError, "no progress"),
    "body": (
        response(gzip.compress(b"")[:10], "text/plain", "Content-Encoding: gzip"),
        b"\0\0\0\xff\xff" * 10_000,  # an empty block
        0,
        DataLossError,
        "longer than",
    ),
}


@pytest.mark.parametrize("name", ENDLESS)
async def test_a_blob_that_does_not_end_is_given_up(rooms: Rooms, image: BuiltImage, name: str) -> None:
    first, more, pause, error, words = ENDLESS[name]

    class Endless(RawServer):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"/manifests/" in head:
                writer.write(self.answer(head.decode().split()[1], head.decode()))
            else:
                writer.write(first)
                with contextlib.suppress(ConnectionError):
                    while not writer.is_closing():
                        writer.write(more)
                        await writer.drain()
                        await asyncio.sleep(pause)
            writer.close()

    rooms.change(progress_timeout=0.9 if error is UnavailableError else 60)
    async with Endless(image, lambda body, kind: sized(body, kind, "Connection: close")).running() as server:
        rooms.configure(server.address, f'server = "http://{server.address}"')
        await refused(rooms, f"{server.address}/app:1", error, words)


@pytest.mark.parametrize("count", [1, 9, 10])
async def test_ten_redirects_are_followed(rooms: Rooms, image: BuiltImage, count: int) -> None:
    async with RawServer(image, sized).running() as server:

        def redirect(path: str, _: str) -> bytes | None:
            at = int(path.partition("?n=")[2] or 0)
            return sized(b"", "text/plain", f"Location: ?n={at + 1}", status="307 No") if at < count else None

        server.special = redirect
        rooms.configure(server.address, f'server = "http://{server.address}"')
        assert (await rooms.images.pull(f"{server.address}/app:1")).id == image.id


@pytest.mark.parametrize(
    ("location", "asked"),
    [
        ("/a b/data?x=a b", "/a%20b/data?x=a%20b"),
        ("/\u00fc/data?sig=a%2Fb%3D&x=y+z|", "/%C3%BC/data?sig=a%2Fb%3D&x=y+z|"),
    ],
)
async def test_a_redirect_to_what_is_no_url(rooms: Rooms, image: BuiltImage, location: str, asked: str) -> None:
    async with RawServer(image, sized).running() as server:
        layer = image.manifest["layers"][0]["digest"]

        def redirect(path: str, _: str) -> bytes | None:
            if path == asked:
                return sized(image.blobs[layer], "application/octet-stream")
            wanted = path.endswith(layer)
            return sized(b"", "text/plain", f"Location: {location}", status="307 No") if wanted else None

        server.special = redirect
        rooms.configure(server.address, f'server = "http://{server.address}"')
        assert (await rooms.images.pull(f"{server.address}/app:1")).id == image.id


@pytest.mark.parametrize("location", ["https://", "http://r.example:70000/a", "http://[::1/a", "https://a:%/"])
async def test_a_redirect_to_nowhere_is_told(rooms: Rooms, image: BuiltImage, location: str) -> None:
    async with RawServer(image, sized).running() as server:
        moved = sized(b"", "text/plain", f"Location: {location}", status="307 Temporary Redirect")
        server.special = lambda _path, _head: moved
        rooms.configure(server.address, f'server = "http://{server.address}"')
        await refused(rooms, f"{server.address}/app:1", UnavailableError, "307 redirects to what is no URL of a server")


async def test_a_name_that_is_no_domain_is_told(rooms: Rooms) -> None:
    await refused(rooms, "xn--a.example/app:1", UnavailableError, "cannot connect")


def wants_token(realm: str, granted: dict[str, str]) -> Callable[[str, str], bytes | None]:
    """A registry's gate and its token server, under one address. ``granted`` has the tokens by scope."""

    def answer(path: str, head: str) -> bytes | None:
        if path.startswith("/token"):
            scope = path.partition("scope=")[2]
            token = granted[scope.replace("%3A", ":").replace("%2F", "/")]
            return sized(b'{"token": "%s"}' % token.encode(), "application/json", status="201 Created")
        if any(f"Authorization: Bearer {token}" in head for token in granted.values()):
            return None
        wanted = f'WWW-Authenticate: Bearer realm="http://{realm}/token",scope="{next(iter(granted))}"'
        return sized(b"", "text/plain", wanted, status="401 Unauthorized")

    return answer


async def test_a_registry_behind_a_redirect_is_asked_with_an_anonymous_token(rooms: Rooms, image: BuiltImage) -> None:
    """The facade knows the pull secret, and the registry behind it gets none."""
    async with RawServer(image, sized).running() as facade, RawServer(image, sized).running() as behind:
        behind.special = wants_token(behind.address, {"repository:real/app:pull": "anonymous"})

        def redirect(path: str, head: str) -> bytes | None:
            if "Authorization: Basic" not in head:
                return sized(b"", "text/plain", 'WWW-Authenticate: Basic realm="facade"', status="401 No")
            target = f"http://{behind.address}{path.replace('/app/', '/real/app/')}"
            return sized(b"", "text/plain", f"Location: {target}", status="307 Temporary Redirect")

        facade.special = redirect
        rooms.configure(facade.address, f'server = "http://{facade.address}"\n[header]\nX-Secret = "ours"')
        secret = Credentials("me", "secret")
        assert (await rooms.images.pull(f"{facade.address}/app:1", secret)).id == image.id
        assert sum(head.startswith("GET /token") for head in behind.requests) == 1
        for head in behind.requests:
            assert "Basic" not in head
            assert "X-Secret" not in head
            assert ("Authorization" in head) <= ("Bearer anonymous" in head)
        assert not any("anonymous" in head for head in facade.requests)


@pytest.mark.parametrize("challenge", ['Basic realm="behind"', "Negotiate", 'Bearer realm="http://{}/no"'])
async def test_a_registry_behind_a_redirect_that_wants_a_secret_is_told(
    rooms: Rooms, image: BuiltImage, challenge: str
) -> None:
    async with RawServer(image, sized).running() as facade, RawServer(image, sized).running() as behind:
        said = f"WWW-Authenticate: {challenge.format(behind.address)}"
        behind.special = lambda _path, _head: sized(b"", "text/plain", said, status="401 Unauthorized")
        location = f"Location: http://{behind.address}/v2/app/manifests/1"
        facade.special = lambda _path, _head: sized(b"", "text/plain", location, status="307 Away")
        rooms.configure(facade.address, f'server = "http://{facade.address}"')
        secret = Credentials("me", "secret")
        await refused(
            rooms, f"{facade.address}/app:1", UnauthenticatedError, behind.address, "redirect", credentials=secret
        )
        assert not any("Authorization" in head for head in behind.requests)


@pytest.mark.parametrize(
    "body", [b"<html>Log in</html>", b'{"errors": [{"code": "UNAUTHORIZED"}]}', b"", b"[]", b"other"]
)
async def test_a_mirror_that_sends_no_manifest_for_a_tag_is_passed_over(
    rooms: Rooms, image: BuiltImage, body: bytes
) -> None:
    async with RawServer(image, sized).running() as registry, RawServer(image, sized).running() as mirror:
        mirror.special = lambda path, _: sized(body, "text/html") if "/manifests/" in path else None
        mirrors = f'[host."http://{mirror.address}"]'
        rooms.configure("r.example", f'server = "http://{registry.address}"\n{mirrors}')
        assert (await rooms.images.pull("r.example/app:1")).id == image.id
        assert len(registry.requests) == 1
        rooms.configure("r.example", f'server = "http://{mirror.address}"')
        await rooms.images.remove("r.example/app:1")
        await refused(rooms, "r.example/app:1", InvalidArgumentError, f"http://{mirror.address}: manifest sha256")


async def test_a_mirror_with_another_platforms_image_is_passed_over(rooms: Rooms, image: BuiltImage) -> None:
    blobs = dict(image.blobs)
    config = add_blob(blobs, image.manifest["config"]["mediaType"], blobs[image.id].replace(b"linux", b"plan9"))
    top = add_blob(blobs, str(image.descriptor["mediaType"]), json.dumps({**image.manifest, "config": config}).encode())
    other = BuiltImage(blobs, top)
    async with RawServer(image, sized).running() as registry, RawServer(other, sized).running() as mirror:
        text = f'server = "http://{registry.address}"\n[host."http://{mirror.address}"]'
        rooms.configure("r.example", text)
        assert (await rooms.images.pull("r.example/app:1")).id == image.id
        assert registry.requests
