"""Which server gets which credentials: challenges, the keyring, tokens, and when they are fetched."""

from __future__ import annotations

import asyncio
import contextlib
import time
import tracemalloc
from dataclasses import replace

import hypothesis
import pytest
from aiohttp import web
from hypothesis import strategies as st
from yarl import URL

from criserver.errors import UnauthenticatedError
from criserver.images import Credentials
from criserver.images.auth import Authorizer, Keyring
from criserver.images.credentials import DockerConfig
from criserver.images.hosts import RegistryHost
from criserver.images.lookups import Lookups
from criserver.images.references import parse
from criserver.images.tokens import Challenge, Token, TokenRequest, fetch_token, parse_challenges, wanted_by
from criserver.images.transport import Transport

HUB = RegistryHost("https://registry-1.docker.io", origin=True)
OWN = RegistryHost("https://r.example:5000", origin=True)
INSIDE = RegistryHost("https://inside.example", namespace="r.example:5000", origin=True)
MIRROR = RegistryHost("https://m.example", namespace="r.example:5000")
PROXY = RegistryHost("https://m.example", path="/v2/cache", namespace="r.example:5000")
HERE = "r.example:5000/team/app:1"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], []),
        (["Basic"], [("basic", {})]),
        (['BASIC realm="x"'], [("basic", {"realm": "x"})]),
        (['Basic Realm="a \\"b\\" \\\\c"'], [("basic", {"realm": 'a "b" \\c'})]),
        (
            ['Bearer realm="https://a/t",service="s", scope="repository:a/b:pull,push x:y:z"'],
            [("bearer", {"realm": "https://a/t", "service": "s", "scope": "repository:a/b:pull,push x:y:z"})],
        ),
        (["Bearer realm=https, error = invalid_token"], [("bearer", {"realm": "https", "error": "invalid_token"})]),
        (['Basic realm="x", Bearer realm="y"'], [("basic", {"realm": "x"}), ("bearer", {"realm": "y"})]),
        (['Basic realm="x"', 'Bearer realm="y"'], [("basic", {"realm": "x"}), ("bearer", {"realm": "y"})]),
        (["Negotiate, Basic"], [("negotiate", {}), ("basic", {})]),
        (["Negotiate abc==, Basic"], [("negotiate", {})]),
        (['Bearer realm="one", realm="two"'], [("bearer", {"realm": "one"})]),
        (['Bearer realm="unended'], [("bearer", {})]),
        (['realm="x"', "=", "", ",,,"], []),
    ],
)
def test_challenges(headers: list[str], expected: list[tuple[str, dict[str, str]]]) -> None:
    assert parse_challenges(headers) == [Challenge(scheme, parameters) for scheme, parameters in expected]


def test_a_header_of_a_megabyte_is_parsed_in_time() -> None:
    began = time.process_time()
    for text in ("a" * 1_000_000, "Bearer " + 'a="' * 300_000, "Bearer " + "a=b," * 250_000, '"\\' * 500_000):
        parse_challenges([text])
    assert time.process_time() - began < 5


@pytest.mark.parametrize("text", ["x", "\\x", 'x\\"'], ids=["plain", "escaped", "quotes"])
def test_a_quoted_text_of_a_megabyte_that_does_not_end_is_left_out_and_takes_little_memory(text: str) -> None:
    header = 'Basic realm="here", Bearer service="s", realm="' + text * (1_000_000 // len(text))
    tracemalloc.start()
    try:
        found = parse_challenges([header])
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert found == [Challenge("basic", {"realm": "here"}), Challenge("bearer", {"service": "s"})]


def test_a_header_of_any_number_of_challenges_is_cut() -> None:
    assert len(parse_challenges(["Basic " * 5000] * 2)) == 1000
    (found,) = parse_challenges(["Bearer " + ",".join(f"p{n}=v" for n in range(5000))])
    assert len(found.parameters) == 999


@hypothesis.given(st.text(alphabet='Bearer basic,="\\realm \t/:ü\n') | st.text())
def test_any_header_is_read(text: str) -> None:
    for challenge in parse_challenges([text]):
        assert challenge.scheme == challenge.scheme.lower()
        with contextlib.suppress(UnauthenticatedError):
            wanted_by(challenge, OWN, ["a"])


@pytest.mark.parametrize(
    ("host", "server_address", "sent"),
    [
        (OWN, "", True),
        (OWN, "r.example:5000", True),
        (OWN, "https://R.example:5000/v2/", True),
        (OWN, "https://r.example", False),
        (OWN, "https://other.example", False),
        (INSIDE, "", True),
        (INSIDE, "r.example:5000", True),
        (INSIDE, "inside.example", True),
        (MIRROR, "", False),
        (MIRROR, "r.example:5000", False),
        (MIRROR, "https://m.example", True),
    ],
)
def test_who_gets_the_kubelets_credentials(host: RegistryHost, server_address: str, sent: bool) -> None:
    given = Credentials("me", "secret", server_address)
    assert (Keyring(parse(HERE), given, None).find(host) == given) is sent


@pytest.mark.parametrize(
    ("server_address", "sent"),
    [("https://index.docker.io/v1/", True), ("docker.io", True), ("", True), ("r.example", False)],
)
def test_docker_hub_has_several_names(server_address: str, sent: bool) -> None:
    given = Credentials("me", "secret", server_address)
    assert (Keyring(parse("busybox"), given, None).find(HUB) == given) is sent


@pytest.mark.parametrize(
    ("host", "entries", "user"),
    [
        (OWN, ["r.example:5000"], "r.example:5000"),
        (OWN, ["r.example"], None),
        (OWN, ["r.example:5000", "r.example:5000/team"], "r.example:5000/team"),
        (OWN, ["r.example:5000/team/app"], "r.example:5000/team/app"),
        (OWN, ["r.example:5000/team/ap", "r.example:5000/te"], None),
        (INSIDE, ["r.example:5000"], "r.example:5000"),
        (INSIDE, ["r.example:5000", "inside.example"], "inside.example"),
        (MIRROR, ["r.example:5000"], None),
        (MIRROR, ["m.example"], "m.example"),
        (PROXY, ["m.example", "m.example/cache"], "m.example/cache"),
    ],
)
def test_who_gets_which_credentials_of_the_file(host: RegistryHost, entries: list[str], user: str | None) -> None:
    file = DockerConfig({entry: Credentials(entry, "secret") for entry in entries}, frozenset())
    found = Keyring(parse(HERE), None, file).find(host)
    assert (found and found.username) == user


def test_the_kubelets_credentials_go_before_the_files() -> None:
    file = DockerConfig({name: Credentials("file", "f") for name in ("r.example:5000", "m.example")}, frozenset())
    keyring = Keyring(parse(HERE), Credentials("kubelet", "k"), file)
    assert keyring.find(OWN).username == "kubelet"
    assert keyring.find(MIRROR).username == "file"


def test_secrets_are_not_shown() -> None:
    shown = repr([Credentials("me", "sec1", "s", "sec2", "sec3"), Token("sec4", 0.0)])
    assert "me" in shown
    assert "sec" not in shown


@pytest.mark.parametrize(
    ("host", "realm", "words"),
    [
        (OWN, None, "no URL"),
        (OWN, "", "no URL"),
        (OWN, "token", "no URL"),
        (OWN, "ftp://a.example/", "no URL"),
        (OWN, "https://user:pass@a.example/", "no URL"),
        (OWN, "https://a.example/" + "a" * 3000, "no URL"),
        (OWN, "http://[::", "no URL"),
        (OWN, "http://a.example:70000/token", "no URL"),
        (OWN, "https://[e2c24:b0]:020240", "no URL"),
        (OWN, "http://a.example:8080/token", "over plain HTTP"),
        (OWN, "http://169.254.169.254:81/latest", "over plain HTTP"),
    ],
)
def test_authorisation_servers_that_nobody_is_sent_to(host: RegistryHost, realm: str | None, words: str) -> None:
    parameters = {} if realm is None else {"realm": realm}
    with pytest.raises(UnauthenticatedError, match=words):
        wanted_by(Challenge("bearer", parameters), host, [])


def test_what_a_challenge_asks_for() -> None:
    challenge = Challenge("bearer", {"realm": "http://a/t?x=1", "service": "s", "scope": "c b a"})
    plain = replace(OWN, url="http://r.example:5000")
    assert wanted_by(challenge, plain, ["b", "d"]) == TokenRequest(URL("http://a/t?x=1"), "s", ("a", "b", "c", "d"))
    endless = Challenge("bearer", {"realm": "https://a/t", "scope": " ".join(map(str, range(10_000)))})
    assert len(wanted_by(endless, OWN, []).scopes) == 20


@pytest.mark.parametrize(
    ("realm", "asked"),
    [
        ("http://a.example/token?x=1", "https://a.example/token?x=1"),
        ("http://a.example:80/token", "https://a.example/token"),
        ("http://r.example:5000/token", "https://r.example:5000/token"),
    ],
)
def test_a_realm_of_plain_http_is_asked_over_tls(realm: str, asked: str) -> None:
    assert wanted_by(Challenge("bearer", {"realm": realm}), OWN, []).realm == URL(asked)


class Tokens:
    """An authorisation server that numbers its tokens and remembers who asked for what."""

    def __init__(self, lifetime: float = 60.0) -> None:
        self.lifetime = lifetime
        self.asked: list[tuple[TokenRequest, Credentials | None]] = []

    async def __call__(self, host: RegistryHost, wanted: TokenRequest, credentials: Credentials | None) -> Token:
        self.asked.append((wanted, credentials))
        number = len(self.asked)
        await asyncio.sleep(0)
        return Token(str(number), time.monotonic() + self.lifetime)


def authorizer(tokens: Tokens, credentials: Credentials | None = None) -> Authorizer:
    return Authorizer(Keyring(parse(HERE), credentials, None), tokens, "repository:team/app:pull")


BEARER = 'Bearer realm="https://a.example/token",service="s"'


async def test_nothing_is_sent_before_it_is_asked_for() -> None:
    assert await authorizer(Tokens(), Credentials("me", "secret")).header(OWN) == ""


@pytest.mark.parametrize(
    ("given", "challenge", "header"),
    [
        (Credentials("me", "secret"), "Basic", "Basic bWU6c2VjcmV0"),
        (Credentials("me", "ü:"), "Basic", "Basic bWU6w7w6"),
        (Credentials("me"), "Basic", "Basic bWU6"),
        (Credentials("me", "secret"), f"Basic, {BEARER}", "Bearer 1"),
        (Credentials("me", "secret"), BEARER, "Bearer 1"),
        (None, BEARER, "Bearer 1"),
        (Credentials(registry_token="r"), BEARER, "Bearer r"),
        (Credentials("me", "secret", identity_token="i"), BEARER, "Bearer 1"),
        (Credentials("me", "secret", identity_token="i"), "Basic", "Basic bWU6c2VjcmV0"),
    ],
)
async def test_answers(given: Credentials | None, challenge: str, header: str) -> None:
    who = authorizer(Tokens(), given)
    assert await who.answer(OWN, [challenge], "")
    assert await who.header(OWN) == header
    assert await who.header(MIRROR) == ""


@pytest.mark.parametrize(
    ("given", "challenge"),
    [
        (None, "Basic"),
        (Credentials(identity_token="i"), "Basic"),
        (Credentials(registry_token="r"), "Basic"),
        (Credentials("me", "secret"), "Digest"),
        (Credentials("me", "secret"), ""),
    ],
)
async def test_challenges_without_an_answer(given: Credentials | None, challenge: str) -> None:
    assert not await authorizer(Tokens(), given).answer(OWN, [challenge], "")


@pytest.mark.parametrize("given", [Credentials("me", "secret"), Credentials(registry_token="r")])
async def test_what_was_refused_is_not_sent_again(given: Credentials) -> None:
    who = authorizer(Tokens(), given)
    challenge = BEARER if given.registry_token else "Basic"
    assert await who.answer(OWN, [challenge], "")
    assert not await who.answer(OWN, [challenge], await who.header(OWN))


async def test_an_expired_token_is_replaced_before_it_is_used() -> None:
    tokens = Tokens(lifetime=0)
    who = authorizer(tokens)
    await who.answer(OWN, [BEARER], "")
    assert [await who.header(OWN), await who.header(OWN)] == ["Bearer 2", "Bearer 3"]
    tokens.lifetime = 60
    assert [await who.header(OWN), await who.header(OWN)] == ["Bearer 4", "Bearer 4"]


async def test_a_refused_token_is_replaced_once_for_all_who_had_it() -> None:
    tokens = Tokens()
    who = authorizer(tokens)
    assert all(await asyncio.gather(*(who.answer(OWN, [BEARER], "") for _ in range(5))))
    assert len(tokens.asked) == 1
    assert all(await asyncio.gather(*(who.answer(OWN, [BEARER], "Bearer 1") for _ in range(5))))
    assert len(tokens.asked) == 2
    assert await who.header(OWN) == "Bearer 2"


async def test_scopes_add_up() -> None:
    tokens = Tokens()
    who = authorizer(tokens)
    await who.answer(OWN, [f'{BEARER},scope="repository:team/app:pull"'], "")
    await who.answer(OWN, [f'{BEARER},scope="repository:other:pull",error="insufficient_scope"'], "Bearer 1")
    await who.answer(OWN, [BEARER], "Bearer 2")
    own, other = "repository:team/app:pull", "repository:other:pull"
    assert [wanted.scopes for wanted, _ in tokens.asked] == [(own,), (other, own), (other, own)]


@pytest.mark.parametrize("host", [PROXY, replace(PROXY, origin=True), MIRROR.redirected_to("https://other.example")])
async def test_where_the_repository_may_have_another_name_the_challenge_says_the_scope(host: RegistryHost) -> None:
    tokens = Tokens()
    who = authorizer(tokens)
    await who.answer(host, [f'{BEARER},scope="repository:cache/team/app:pull"'], "")
    await who.answer(MIRROR, [f'{BEARER},scope="repository:other:pull"'], "")
    mirrored = ("repository:other:pull", "repository:team/app:pull")
    assert [wanted.scopes for wanted, _ in tokens.asked] == [("repository:cache/team/app:pull",), mirrored]


async def test_a_challenge_without_a_scope_is_answered_with_the_references_everywhere() -> None:
    tokens = Tokens()
    await authorizer(tokens).answer(PROXY, [BEARER], "")
    assert [wanted.scopes for wanted, _ in tokens.asked] == [("repository:team/app:pull",)]


async def test_a_mirrors_token_is_asked_for_as_nobody() -> None:
    tokens = Tokens()
    who = authorizer(tokens, Credentials("me", "secret"))
    await who.answer(MIRROR, [BEARER], "")
    await who.answer(OWN, [BEARER], "")
    assert [credentials and credentials.username for _, credentials in tokens.asked] == [None, "me"]


@pytest.mark.parametrize("given", [Credentials("u", "p"), None])
async def test_an_authorisation_server_that_is_the_registry_gets_one_authorization(given: Credentials | None) -> None:
    """The pull's where there is one, as for the registry's own requests; else the operator's."""
    seen: list[list[str]] = []

    async def issue(request: web.BaseRequest) -> web.Response:
        seen.append(request.headers.getall("Authorization", []))
        return web.json_response({"token": "t"})

    runner = web.ServerRunner(web.Server(issue))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host = RegistryHost(f"http://127.0.0.1:{runner.addresses[0][1]}", headers=(("Authorization", "Basic operator"),))
    try:
        async with Transport(Lookups()) as transport:
            await fetch_token(transport, host, TokenRequest(URL(f"{host.url}/token"), "s", ("a",)), given)
    finally:
        await runner.cleanup()
    assert seen == [[given.basic if given else "Basic operator"]]
