"""Registries that ask for credentials: by user and password, or by tokens of a server that checks scopes."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from criserver.errors import (
    CriError,
    InvalidArgumentError,
    UnauthenticatedError,
    UnavailableError,
)
from criserver.images import Credentials
from tests.support.authserver import AuthServer
from tests.support.certificates import Authority
from tests.support.imagebuilder import BuiltImage
from tests.support.ownregistry import Server, image, refused, rooms, server, serving
from tests.support.registry import HTPASSWD, Registry, registry, running
from tests.support.rooms import Rooms

__all__ = ["image", "registry", "rooms", "server"]

ME = Credentials("me", "secret")


def write_docker_config(rooms: Rooms, **entries: dict[str, str]) -> None:
    """Give the node a docker config file with these entries; underscores stand for what names cannot have."""
    path = os.path.join(rooms.root, "docker.json")
    with open(path, "w") as f:
        json.dump({"auths": entries}, f)
    rooms.change(auth_file=path)


# docker-registry with TLS, user and password


@pytest.fixture(scope="module")
def basic(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry with TLS that knows one user; its certificates are beside its log."""
    directory = tmp_path_factory.mktemp("basic")
    (directory / "htpasswd").write_text(HTPASSWD)
    server = Authority(str(directory)).issue("server")
    auth = {"htpasswd": {"realm": "here", "path": str(directory / "htpasswd")}}
    tls = {"certificate": server.cert, "key": server.key}
    with running(str(directory), storage=registry, auth=auth, tls=tls) as found:
        yield found


async def test_docker_registry_with_tls_and_basic_authentication(
    basic: Registry, registry: Registry, rooms: Rooms, image: BuiltImage
) -> None:
    registry.push(image, "private:1")
    name = f"{basic.address}/private:1"
    rooms.configure(basic.address, f'server = "https://{basic.address}"\nca = "{os.path.dirname(basic.log)}/ca.pem"')
    await refused(rooms, name, UnauthenticatedError, "401", "check the pull secret")
    await refused(rooms, name, UnauthenticatedError, "401", credentials=Credentials("me", "wrong"))
    assert (await rooms.images.pull(name, ME)).id == image.id


@pytest.mark.parametrize(
    "entry", [{"auth": base64.b64encode(b"me:secret").decode()}, {"username": "me", "password": "secret"}]
)
async def test_the_nodes_own_credentials(
    basic: Registry, registry: Registry, rooms: Rooms, image: BuiltImage, entry: dict[str, str]
) -> None:
    registry.push(image, "private:2")
    name = f"{basic.address}/private:2"
    rooms.configure(basic.address, f'server = "https://{basic.address}"\nca = "{os.path.dirname(basic.log)}/ca.pem"')
    write_docker_config(rooms, **{f"https://{basic.address}": entry})
    assert (await rooms.images.pull(name)).id == image.id
    await rooms.images.remove(name)
    write_docker_config(rooms, **{"https://other.example": entry})
    await refused(rooms, name, UnauthenticatedError)
    # A missing file means that the node has no credentials: an image that anyone may pull is pulled.
    rooms.change(auth_file="/no/such/file")
    await refused(rooms, name, UnauthenticatedError)
    assert (await rooms.images.pull(registry.push(image, "public:2"))).id == image.id


# docker-registry with an authorisation server


@dataclass
class Guarded:
    """A real registry, and the authorisation server that it sends its clients to."""

    plain: Registry  # the same storage, for pushing
    registry: Registry
    authority: AuthServer

    def push(self, image: BuiltImage, name: str) -> str:
        self.plain.push(image, name)
        return f"{self.registry.address}/{name}"


@pytest.fixture
async def guarded(registry: Registry, tmp_path: Path, rooms: Rooms) -> AsyncIterator[Guarded]:
    authority = AuthServer(
        Authority(str(tmp_path)).issue("signer", key="rsa"),
        allowed={"": frozenset({"public"}), "me": frozenset({"public", "team/private"}), "you": frozenset()},
        passwords={"me": "secret", "you": "secret"},
        identities={"identity of me": "me"},
    )
    async with authority.running():
        with running(str(tmp_path / "guarded"), storage=registry, auth=authority.registry_options()) as found:
            rooms.configure(found.address, f'server = "http://{found.address}"')
            yield Guarded(registry, found, authority)


def pull_of(repository: str) -> list[dict[str, Any]]:
    return [{"type": "repository", "name": repository, "actions": ["pull"]}]


async def test_what_is_public_needs_no_credentials(guarded: Guarded, rooms: Rooms, image: BuiltImage) -> None:
    name = guarded.push(image, "public:1")
    assert (await rooms.images.pull(name)).id == image.id
    assert guarded.authority.granted == [pull_of("public")]  # one token for manifest, configuration and layers
    (request,) = guarded.authority.requests
    assert "Authorization" not in request.headers


@pytest.mark.parametrize(
    "given",
    [
        ME,
        Credentials(identity_token="identity of me"),
        Credentials("0000", "", identity_token="identity of me"),
        Credentials("me", "secret", server_address="HERE"),
    ],
)
async def test_what_is_private_takes_a_token_for_the_repository(
    guarded: Guarded, rooms: Rooms, image: BuiltImage, given: Credentials
) -> None:
    name = guarded.push(image, "team/private:1")
    given = Credentials(
        given.username, given.password, given.server_address.replace("HERE", guarded.registry.address),
        given.identity_token,
    )  # fmt: skip
    assert (await rooms.images.pull(name, given)).id == image.id
    assert guarded.authority.granted == [pull_of("team/private")]


async def test_a_registry_token_is_sent_as_it_is(guarded: Guarded, rooms: Rooms, image: BuiltImage) -> None:
    name = guarded.push(image, "team/private:2")
    token = guarded.authority._sign("me", pull_of("team/private"))
    assert (await rooms.images.pull(name, Credentials(registry_token=token))).id == image.id
    await rooms.images.remove(name)
    await refused(rooms, name, UnauthenticatedError, "401", credentials=Credentials(registry_token=token[:-8]))
    assert guarded.authority.requests == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "401"),
        (Credentials("you", "secret"), "401"),
        (Credentials("me", "secret", server_address="other.example"), "401"),
        (Credentials("me", "wrong"), "the server refuses the credentials"),
        (Credentials(identity_token="unknown"), "the server refuses the credentials"),
    ],
)
async def test_what_is_private_is_refused_to_others(
    guarded: Guarded, rooms: Rooms, image: BuiltImage, given: Credentials | None, words: str
) -> None:
    name = guarded.push(image, "team/private:3")
    await refused(rooms, name, UnauthenticatedError, words, "check the pull secret", credentials=given)
    assert len(guarded.authority.requests) <= 2


async def test_the_file_may_hold_an_identity_token(guarded: Guarded, rooms: Rooms, image: BuiltImage) -> None:
    name = guarded.push(image, "team/private:4")
    entry = {"auth": base64.b64encode(b"0000:").decode(), "identitytoken": "identity of me"}
    write_docker_config(rooms, **{f"{guarded.registry.address}/team": entry})
    assert (await rooms.images.pull(name)).id == image.id


async def test_an_authorisation_server_with_tls_of_the_registrys_own_authority(
    registry: Registry, rooms: Rooms, image: BuiltImage, tmp_path: Path
) -> None:
    own = Authority(str(tmp_path))
    certificate = own.issue("server", key="rsa")
    authority = AuthServer(certificate, {"": frozenset({"public"})})
    tls = {"certificate": certificate.cert, "key": certificate.key}
    registry.push(image, "public:tls")
    async with authority.running(certificate.server_context()):
        options = {"auth": authority.registry_options(), "tls": tls}
        with running(str(tmp_path / "guarded"), storage=registry, **options) as found:
            text = f'server = "https://{found.address}"\n'
            rooms.configure(found.address, f'{text}ca = "{own.own.cert}"\n[header]\nX-Node = "us"')
            assert (await rooms.images.pull(f"{found.address}/public:tls")).id == image.id
            assert "X-Node" not in authority.requests[0].headers  # for the registry, and not for others


# What no real registry does


class Gate:
    """Lets only the newest token of its own through to a server; ``revoke`` ends that one's time."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.tokens: list[str] = []
        self.realm = ""
        self.challenge = 'Bearer realm="{realm}",service="s",scope="repository:app:pull"'

    def revoke(self) -> None:
        self.tokens.append("revoked")

    async def issue(self, request: web.Request) -> web.Response:
        self.tokens.append(f"token-{len(self.tokens)}")
        return web.json_response({"token": self.tokens[-1]})

    async def check(self, request: web.Request) -> web.StreamResponse:
        if not self.tokens or request.headers.get("Authorization") != f"Bearer {self.tokens[-1]}":
            self.server.requests.append(request)
            return web.Response(status=401, headers={"WWW-Authenticate": self.challenge.format(realm=self.realm)})
        return await self.server.handle(request)


@pytest.fixture
async def gate(image: BuiltImage, rooms: Rooms) -> AsyncIterator[Gate]:
    """A gate before a server of ``image``; what issues its tokens is another server."""
    found = Gate(Server(image))

    async def issue(request: web.Request) -> web.Response:
        return await found.issue(request)

    async with serving(issue) as issuer, serving(found.check) as address:
        found.server.address = address
        found.realm = f"http://{issuer}/token"
        rooms.configure(address, f'server = "http://{address}"')
        yield found


async def test_a_token_that_is_revoked_half_way_is_replaced(gate: Gate, rooms: Rooms, image: BuiltImage) -> None:
    layer = image.manifest["layers"][0]["digest"]
    asked = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        if not asked.is_set():
            asked.set()
            gate.revoke()
            return web.Response(status=503)
        return gate.server.serve(request)

    gate.server.answers[layer] = answer
    assert (await rooms.images.pull(f"{gate.server.address}/app:1")).id == image.id
    assert gate.tokens == ["token-0", "revoked", "token-2"]


async def test_a_registry_that_takes_no_token_at_all(gate: Gate, rooms: Rooms) -> None:
    async def issue(request: web.Request) -> web.Response:
        gate.tokens.append("another")
        return web.json_response({"token": "useless"})

    gate.issue = issue
    await refused(rooms, f"{gate.server.address}/app:1", UnauthenticatedError, "401")
    assert len(gate.server.requests) == 3


async def test_a_busy_authorisation_server_is_asked_again(gate: Gate, rooms: Rooms, image: BuiltImage) -> None:
    issue, statuses = gate.issue, iter([503, 429, 200])

    async def busy(request: web.Request) -> web.Response:
        status = next(statuses)
        return await issue(request) if status == 200 else web.Response(status=status)

    gate.issue = busy
    assert (await rooms.images.pull(f"{gate.server.address}/app:1")).id == image.id


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (lambda: web.Response(body=b"<html>"), UnavailableError, "no JSON object"),
        (lambda: web.Response(body=b"[" * 100_000), UnavailableError, "no JSON object"),
        (lambda: web.json_response([]), UnavailableError, "no JSON object"),
        (lambda: web.json_response({}), UnavailableError, "has no token"),
        (lambda: web.json_response({"token": 1}), UnavailableError, "has no token"),
        (lambda: web.json_response({"token": "a\r\nX-Evil: b"}), UnavailableError, "has no token"),
        (lambda: web.json_response({"token": "a" * 100_000}), UnavailableError, "has no token"),
        (lambda: web.Response(body=b" " * (2 << 20)), InvalidArgumentError, "is larger than 1048576 bytes"),
        (lambda: web.Response(status=404), UnavailableError, "404"),
        (lambda: web.Response(status=307), UnavailableError, "307"),
        (lambda: web.Response(status=403), UnauthenticatedError, "403"),
        (lambda: web.Response(status=500), UnavailableError, "500"),
    ],
)
async def test_answers_that_are_no_token(
    gate: Gate, rooms: Rooms, answer: Callable[[], web.Response], error: type[CriError], words: str
) -> None:
    async def issue(request: web.Request) -> web.Response:
        return answer()

    gate.issue = issue
    await refused(rooms, f"{gate.server.address}/app:1", error, f"token from {gate.realm[:-6]}", words)


async def test_the_fields_of_a_tokens_answer_have_no_case(gate: Gate, rooms: Rooms, image: BuiltImage) -> None:
    async def issue(request: web.Request) -> web.Response:
        gate.tokens.append("one")
        return web.json_response({"Token": "one", "Expires_In": 300})

    gate.issue = issue
    assert (await rooms.images.pull(f"{gate.server.address}/app:1")).id == image.id


async def test_an_authorisation_server_that_redirects_at_home_gets_the_credentials(
    gate: Gate, rooms: Rooms, image: BuiltImage
) -> None:
    issue = gate.issue
    asked: list[web.Request] = []

    async def moved(request: web.Request) -> web.Response:
        asked.append(request)
        if request.path == "/token":
            return web.Response(status=301, headers={"Location": f"/new/token?{request.query_string}"})
        return await issue(request)

    gate.issue = moved
    await rooms.images.pull(f"{gate.server.address}/app:1", ME)
    assert [request.path for request in asked] == ["/token", "/new/token"]
    assert asked[0].query == asked[1].query
    assert asked[0].headers["Authorization"] == asked[1].headers["Authorization"] == ME.basic


async def test_an_authorisation_server_that_redirects_to_another_gives_it_no_credentials(
    gate: Gate, rooms: Rooms, image: BuiltImage
) -> None:
    asked: list[web.Request] = []

    async def elsewhere(request: web.Request) -> web.Response:
        asked.append(request)
        return web.json_response({"token": gate.tokens[-1]})

    async with serving(elsewhere) as address:

        async def issue(request: web.Request) -> web.Response:
            gate.tokens.append("anonymous")
            return web.Response(status=307, headers={"Location": f"http://{address}/token"})

        gate.issue = issue
        name = f"{gate.server.address}/app:1"
        await rooms.images.pull(name, ME)
        assert [request.headers.get("Authorization") for request in asked] == [None]
        await rooms.images.remove(name)
        identity = Credentials(identity_token="identity")
        await refused(rooms, name, UnauthenticatedError, "307", address, "identity token", credentials=identity)
        assert len(asked) == 1


async def test_an_authorisation_server_that_redirects_without_end(gate: Gate, rooms: Rooms) -> None:
    async def issue(request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": "/token"})

    gate.issue = issue
    await refused(rooms, f"{gate.server.address}/app:1", UnavailableError, "more than 10 redirects")


async def test_nobody_at_the_authorisation_server(gate: Gate, rooms: Rooms) -> None:
    gate.realm = "http://127.0.0.1:1/token"
    await refused(
        rooms, f"{gate.server.address}/app:1", UnavailableError, "token from http://127.0.0.1:1: cannot connect"
    )


async def test_credentials_do_not_go_from_tls_to_plain_http(rooms: Rooms, image: BuiltImage, tmp_path: Path) -> None:
    certificate = Authority(str(tmp_path)).issue("server")
    found = Gate(Server(image))
    issued: list[web.Request] = []

    async def issue(request: web.Request) -> web.Response:
        issued.append(request)
        return web.json_response({"token": "x"})

    async with serving(issue) as issuer, serving(found.check, certificate.server_context()) as address:
        found.realm = f"http://{issuer}/token"
        rooms.configure(address, f'server = "https://{address}"\nskip_verify = true')
        await refused(rooms, f"{address}/app:1", UnauthenticatedError, "over plain HTTP", credentials=ME)
    assert issued == []


async def test_a_registry_that_does_not_know_of_its_tls(rooms: Rooms, image: BuiltImage, tmp_path: Path) -> None:
    """As behind a proxy: it gives its own address for tokens, with the wrong scheme."""
    certificate = Authority(str(tmp_path)).issue("server")
    found = Gate(Server(image))

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.path == "/token":
            assert request.headers["Authorization"] == ME.basic
            return await found.issue(request)
        return await found.check(request)

    async with serving(handle, certificate.server_context()) as address:
        found.realm = f"http://{address}/token"
        rooms.configure(address, f'server = "https://{address}"\nskip_verify = true')
        assert (await rooms.images.pull(f"{address}/app:1", ME)).id == image.id


async def test_basic_authentication(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    server.password = "secret"
    name = f"{server.address}/app:1"
    await refused(rooms, name, UnauthenticatedError, "401", "check the pull secret")
    await refused(rooms, name, UnauthenticatedError, "401", credentials=Credentials("me", "wrong"))
    elsewhere = Credentials("me", "secret", server_address="https://other.example")
    await refused(rooms, name, UnauthenticatedError, "401", credentials=elsewhere)
    here = Credentials("me", "secret", server_address=f"http://{server.address}")
    assert (await rooms.images.pull(name, here)).id == image.id
    assert "secret" not in repr(here)


async def test_a_pull_without_credentials_does_not_join_one_with(server: Server, rooms: Rooms) -> None:
    server.password = "secret"
    name = f"{server.address}/app:1"
    good, bad = await asyncio.gather(
        rooms.images.pull(name, Credentials("me", "secret")), rooms.images.pull(name), return_exceptions=True
    )
    assert good.repo_tags == (name,)
    assert isinstance(bad, UnauthenticatedError)


async def test_credentials_go_to_no_mirror(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    async with Server(image, password="secret").running() as mirror:
        rooms.configure("r.example", f'server = "http://{server.address}"\n[host."http://{mirror.address}"]')
        await rooms.images.pull("r.example/app:1", Credentials("me", "secret"))
        assert mirror.requests
        assert all("Authorization" not in request.headers for request in mirror.requests)


async def test_redirects_carry_nothing_that_identifies_us(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    server.password = "secret"
    layer = image.manifest["layers"][0]["digest"]
    async with Server(image).running() as storage:
        target = f"http://{storage.address}/signed/{layer}?sig=a%2Fb"
        server.answers[layer] = lambda _: web.Response(status=307, headers={"Location": target})
        text = f'server = "http://{server.address}"\n[header]\nX-Node = "us"'
        rooms.configure(server.address, text)
        await rooms.images.pull(f"{server.address}/app:1", Credentials("me", "secret"))
        (request,) = storage.requests
        assert request.raw_path == f"/signed/{layer}?sig=a%2Fb"
        assert "Authorization" not in request.headers
        assert "X-Node" not in request.headers
        assert {r.headers["X-Node"] for r in server.requests} == {"us"}


async def test_a_mirror_is_asked_with_the_credentials_that_the_file_has_for_it(
    server: Server, rooms: Rooms, image: BuiltImage
) -> None:
    async with Server(image, password="secret").running() as mirror:
        rooms.configure("r.example", f'server = "http://{server.address}"\n[host."http://{mirror.address}"]')
        entry = {"auth": base64.b64encode(b"me:secret").decode()}
        write_docker_config(rooms, **{mirror.address: entry})
        await rooms.images.pull("r.example/app:1", Credentials("other", "other"))
        assert server.requests == []


async def test_a_token_is_not_carried_along_a_redirect(gate: Gate, rooms: Rooms, image: BuiltImage) -> None:
    layer = image.manifest["layers"][0]["digest"]
    async with Server(image).running() as storage:
        target = f"http://{storage.address}/{layer}"
        gate.server.answers[layer] = lambda _: web.Response(status=307, headers={"Location": target})
        await rooms.images.pull(f"{gate.server.address}/app:1", ME)
        (request,) = storage.requests
        assert "Authorization" not in request.headers


async def test_an_authorization_of_the_operators_own(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    server.password = "secret"
    header = f"Basic {base64.b64encode(b'me:secret').decode()}"
    rooms.configure(server.address, f'server = "http://{server.address}"\n[header]\nauthorization = "{header}"')
    assert (await rooms.images.pull(f"{server.address}/app:1")).id == image.id
    assert all(request.headers.getall("Authorization") == [header] for request in server.requests)


async def test_a_registry_that_redirects_to_tls_at_its_own_name_gets_the_credentials(
    rooms: Rooms, image: BuiltImage, tmp_path: Path
) -> None:
    certificate = Authority(str(tmp_path)).issue("server")
    seen: list[str | None] = []

    async with Server(image, password="secret").running(certificate.server_context()) as own:

        async def upgrade(request: web.BaseRequest) -> web.Response:
            seen.append(request.headers.get("Authorization"))
            return web.Response(status=301, headers={"Location": f"https://{own.address}{request.path_qs}"})

        async with serving(upgrade) as address:
            text = f'server = "http://{address}"\nskip_verify = true\n[header]\nX-Node = "us"'
            rooms.configure("r.example", text)
            assert (await rooms.images.pull("r.example/app:1", Credentials("me", "secret"))).id == image.id
    assert seen
    assert set(seen) == {None}
    assert {request.headers["X-Node"] for request in own.requests} == {"us"}


@pytest.mark.parametrize("target", ["https://localhost:{port}{path}", "https://127.0.0.1:{port}/other{path}"])
async def test_a_registry_that_redirects_to_tls_elsewhere_gives_it_no_credentials(
    rooms: Rooms, image: BuiltImage, tmp_path: Path, target: str
) -> None:
    certificate = Authority(str(tmp_path)).issue("server")
    async with Server(image, password="secret").running(certificate.server_context()) as other:
        port = other.address.rpartition(":")[2]

        async def lead(request: web.BaseRequest) -> web.Response:
            return web.Response(status=301, headers={"Location": target.format(port=port, path=request.path_qs)})

        async with serving(lead) as address:
            rooms.configure("r.example", f'server = "http://{address}"\nskip_verify = true')
            await refused(rooms, "r.example/app:1", UnauthenticatedError, "401", credentials=ME)
    assert all("Authorization" not in request.headers for request in other.requests)
