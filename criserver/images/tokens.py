"""The challenges in a registry's 401, and the tokens that its authorisation server gives.

Sources: RFC 9110, section 11.6.1, for the header; distribution's "Token Authentication Specification", and its OAuth2
variant for identity tokens.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import aiohttp
from yarl import URL

from criserver.errors import UnauthenticatedError, UnavailableError
from criserver.images.credentials import Credentials
from criserver.images.go_json import folded
from criserver.images.hosts import RegistryHost
from criserver.images.redirects import MAX_REDIRECTS, is_redirect, is_same_server, names_server, redirected
from criserver.images.retries import TEMPORARY, TryAgainError, retry_after
from criserver.images.transport import Transport, read_bounded

_ACCEPT = ("Accept", "application/json")
_IDLE = 30.0
_MAX_ANSWER = 1 << 20
_MAX_REALM = 2048
_MAX_ITEMS = 1000  # schemes and parameters in all challenges of a 401
_MAX_HEADER = 64 << 10  # characters
_MAX_SCOPES = 20
_LIFETIME = 60  # seconds, where the answer says none
_CLIENT_ID = "criserver"

_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# The search keeps a state for each escaped character alone.
_QUOTED = r'[^"\\]*+(?:\\.[^"\\]*+)*'
_ITEM = re.compile(
    rf'[\s,]*(?:(?P<name>{_WORD})\s*=\s*(?:"(?P<quoted>{_QUOTED})"|(?P<value>{_WORD}))|(?P<scheme>{_WORD})(?=\s|,|\Z))'
)
_TOKEN = re.compile(r"[!-~]{1,65536}")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge of a 401; the scheme and the parameters' names are lowercase."""

    scheme: str
    parameters: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """The token that a challenge asks for, and the URL of its server. ``scopes`` are sorted."""

    realm: URL
    service: str
    scopes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token. It is not used after ``expires``, a time of the monotonic clock."""

    text: str = field(repr=False)
    expires: float


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """The challenges of WWW-Authenticate headers; a header may have several. Invalid ones are left out.

    What comes after _MAX_ITEMS items, or after _MAX_HEADER characters of a header, is left out too: a header may have
    megabytes.
    """
    found: list[Challenge] = []
    count = itertools.count()
    for header in headers:
        parameters: dict[str, str] | None = None
        for item in _items(header[:_MAX_HEADER]):
            if next(count) >= _MAX_ITEMS:
                return found
            if item["scheme"]:
                parameters = {}
                found.append(Challenge(item["scheme"].lower(), parameters))
            elif parameters is not None:
                quoted = item["quoted"]
                value = item["value"] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
                parameters.setdefault(item["name"].lower(), value)
    return found


def _items(header: str) -> Iterable[re.Match[str]]:
    position = 0
    while item := _ITEM.match(header, position):
        yield item
        position = item.end()


def wanted_by(challenge: Challenge, host: RegistryHost, scopes: Iterable[str]) -> TokenRequest:
    """The token that a host's bearer challenge asks for, with ``scopes`` beside the challenge's.

    A realm of plain HTTP is asked over HTTPS if the host has TLS: a registry behind a proxy often does not know that
    its clients use TLS. Raises UnauthenticatedError for a realm that is no URL of a server, or that has another port
    for plain HTTP.
    """
    text = challenge.parameters.get("realm", "")
    try:
        realm = URL(text)
        is_server = realm.scheme in ("https", "http") and realm.host and names_server(realm)
        valid = is_server and realm.user is None and len(text) <= _MAX_REALM
    except ValueError:
        valid = False
    if not valid:
        raise UnauthenticatedError(f"wants a token from {text[:_MAX_REALM]!r}, which is no URL of a server")
    if realm.scheme == "http" and not host.url.startswith("http:"):
        secure = (realm.with_port(None) if realm.is_default_port() else realm).with_scheme("https")
        if not secure.is_default_port() and secure.authority != host.authority:
            raise UnauthenticatedError(
                f"wants a token from {text!r}, over plain HTTP, although the registry itself has TLS: correct the "
                "realm in the registry's configuration"
            )
        realm = secure
    asked = challenge.parameters.get("scope", "").split()[:_MAX_SCOPES]
    return TokenRequest(realm, challenge.parameters.get("service", ""), tuple(sorted({*scopes, *asked})))


async def fetch_token(
    transport: Transport, host: RegistryHost, wanted: TokenRequest, credentials: Credentials | None
) -> Token:
    """Ask for a token, with ``credentials`` or anonymously.

    A redirect is followed, with the credentials as long as it stays at one server, and then without them. Raises
    UnauthenticatedError if the server refuses the token or redirects an identity token to another server,
    TryAgainError, UnavailableError.
    """
    began = time.monotonic()
    url, headers, form = _request(host, wanted, credentials)
    identified = True
    for _ in range(MAX_REDIRECTS + 1):
        what = f"token from {url.origin()}"
        async with transport.send(
            host, url, headers, what, identified=identified, idle=_IDLE, total=2 * _IDLE, form=form
        ) as response:
            if not is_redirect(response):
                _check(response, what, host, credentials if identified else None)
                return _token(await read_bounded(response, _MAX_ANSWER, what), began, what)
            target = redirected(url, response, trusted=True)
        if not is_same_server(url, target):
            if form is not None:
                raise UnauthenticatedError(
                    f"{what}: {response.status} redirects to {target.origin()}, which must not get the identity token: "
                    "correct the realm in the registry's configuration"
                )
            headers, identified = [_ACCEPT], False
        url = target
    raise UnavailableError(f"{what}: more than {MAX_REDIRECTS} redirects")


def _request(
    host: RegistryHost, wanted: TokenRequest, credentials: Credentials | None
) -> tuple[URL, list[tuple[str, str]], Mapping[str, str] | None]:
    """The URL, the headers and the form of a request for a token; no form for a GET."""
    headers = [_ACCEPT]
    if wanted.realm.origin() == URL(host.url).origin():
        headers += host.headers
    if credentials is not None and credentials.identity_token:
        form = {
            "grant_type": "refresh_token",
            "refresh_token": credentials.identity_token,
            "client_id": _CLIENT_ID,
            "service": wanted.service,
            "scope": " ".join(wanted.scopes),
        }
        return wanted.realm, headers, form
    query = [("service", wanted.service)] if wanted.service else []
    url = wanted.realm.extend_query([*query, *(("scope", scope) for scope in wanted.scopes)])
    if credentials is not None and credentials.username:
        # They replace the operator's own, as in requests to the registry.
        headers = [header for header in headers if header[0].lower() != "authorization"]
        headers.append(("Authorization", credentials.basic))
    return url, headers, None


def _check(response: aiohttp.ClientResponse, what: str, host: RegistryHost, credentials: Credentials | None) -> None:
    """Raise an error if the server gives no token; ``credentials`` are those that it got."""
    answer = f"{what}: {response.status} {response.reason or ''}".rstrip()
    match response.status:
        case status if 200 <= status < 300:
            return
        case 400 | 401 | 403:
            known = (
                "the server refuses the credentials" if credentials else "the server gives no token without credentials"
            )
            if host.anonymous:
                known += f", and {host.url}, which is asked after a redirect, must get none of ours"
                raise UnauthenticatedError(f"{answer}; {known}")
            raise UnauthenticatedError(f"{answer}; {known}: check the pull secret")
        case status if status in TEMPORARY:
            raise TryAgainError(answer, retry_after(response.headers))
        case _:
            raise UnavailableError(answer)


def _token(body: bytes, began: float, what: str) -> Token:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise UnavailableError(f"{what}: the answer is no JSON object")
    document = {folded(name): value for name, value in document.items()}
    text = document.get("token") or document.get("access_token")
    if not isinstance(text, str) or not _TOKEN.fullmatch(text):
        raise UnavailableError(f"{what}: the answer has no token")
    lifetime = document.get("expires_in")
    if not isinstance(lifetime, int | float) or not 0 < lifetime < 1e9:
        lifetime = _LIFETIME
    # The token is renewed a little earlier: it must not expire while a request is under way.
    return Token(text, began + lifetime - min(10.0, lifetime / 10))
