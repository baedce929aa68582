"""One request to one host: authentication, redirects, and refusals as errors (OCI distribution-spec)."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from yarl import URL

from criserver.errors import (
    CriError,
    DataLossError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from criserver.images.auth import Authorizer
from criserver.images.hosts import RegistryHost
from criserver.images.retries import TryAgainError, retry_after
from criserver.images.transport import Transport, read_bounded
from criserver.text import shown

_MAX_REDIRECTS = 10
# To the 401s of a server: the first says what the server wants, the second may be for a token that has expired.
_MAX_ANSWERS = 2
# Bytes and seconds for the reason that a registry gives for a refusal.
_MAX_WORDS = 16 << 10
_WORDS_TIME = 10.0
_SUCCESS = frozenset({200, 201, 202, 203, 206})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class Exchange:
    """Requests for the repository ``repository``."""

    def __init__(self, transport: Transport, authorizer: Authorizer, repository: str) -> None:
        self._transport = transport
        self._authorizer = authorizer
        self._repository = repository

    @asynccontextmanager
    async def get(
        self,
        host: RegistryHost,
        path: str,
        headers: dict[str, str],
        *,
        idle: float,
        total: float | None = None,
        trusted: bool = False,
        method: str = "GET",
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A response with a status of success (2xx). See Transport.send for ``idle`` and ``total``.

        1. ``trusted`` content has no digest that proves it. So a redirect from HTTPS to plain HTTP is refused for it.
        2. Redirects are followed here. Credentials go to the configured host only. Another server that answers 401 to
           a redirected request is asked with an anonymous token of its own.

        Raises NotFoundError, UnauthenticatedError, PermissionDeniedError, UnavailableError, DataLossError for a missing
        range, and TryAgainError for a failure that may be over soon.
        """
        asked = url = self._url(host, path)
        redirects = 0
        answers: Counter[RegistryHost] = Counter()
        while True:
            own = url.origin() == asked.origin()
            server = host if own else host.redirected_to(str(url.origin()))
            authorization = await self._authorizer.header(server)
            sent = [*headers.items(), *_identity(server, authorization)]
            async with self._transport.send(
                host, url, sent, path, identified=own, idle=idle, total=total, method=method
            ) as response:
                if response.status in _SUCCESS:
                    yield response
                    return
                if response.status in _REDIRECTS and "Location" in response.headers:
                    redirects += 1
                    if redirects > _MAX_REDIRECTS:
                        raise UnavailableError(
                            f"{path}: {response.status} after {_MAX_REDIRECTS} redirects; no more are followed"
                        )
                    url = _redirected(url, response, trusted)
                    continue
                if response.status != 401 or answers[server] >= _MAX_ANSWERS:
                    raise _refusal(response, path, server, await _words(response))
                answers[server] += 1
                challenges = response.headers.getall("WWW-Authenticate", ())
                refusal = _refusal(response, path, server)
            if not await self._authorizer.answer(server, challenges, authorization):
                raise refusal

    def _url(self, host: RegistryHost, path: str) -> URL:
        url = URL(f"{host.url}{host.path}/{self._repository}/{path}")
        return url.with_query(ns=host.namespace) if host.namespace else url


def _identity(host: RegistryHost, authorization: str) -> list[tuple[str, str]]:
    """The operator's headers. If the server has asked for an Authorization, that replaces the operator's."""
    if not authorization:
        return list(host.headers)
    return [*(h for h in host.headers if h[0].lower() != "authorization"), ("Authorization", authorization)]


def _redirected(url: URL, response: aiohttp.ClientResponse, trusted: bool) -> URL:
    # The URL is taken as encoded already: a signed URL must not change.
    target = url.join(URL(response.headers.get("Location", ""), encoded=True))
    if target.scheme not in ("http", "https") or (trusted and url.scheme == "https" != target.scheme):
        raise UnavailableError(f"{url.path}: {response.status} redirects from {url.scheme} to {target.scheme}")
    return target


async def _words(response: aiohttp.ClientResponse) -> str:
    """The reason that the registry gives for a refusal, "" if there is none.

    It is the first error of a document (OCI distribution-spec, "Error Codes"), or plain text. An answer that cannot be
    read, or does not come, is no reason.
    """
    try:
        async with asyncio.timeout(_WORDS_TIME):
            body = await read_bounded(response, _MAX_WORDS, "the refusal")
    except (CriError, aiohttp.ClientError, TimeoutError):
        return ""
    if response.content_type == "text/plain":
        return shown(body.decode(errors="replace").strip())
    try:
        first = json.loads(body)["errors"][0]
        return ": ".join(shown(first[key]) for key in ("code", "message") if isinstance(first.get(key), str))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return ""  # the body has another form


def _refusal(response: aiohttp.ClientResponse, path: str, server: RegistryHost, words: str = "") -> CriError:
    answer = f"{path}: {response.status} {response.reason or ''}".rstrip()
    if words:
        answer += f" ({words})"
    if server.anonymous:
        answer += f" from {server.url}, to which the registry redirects"
    match response.status:
        case 401 if server.anonymous:
            return UnauthenticatedError(
                f"{answer}; the pull secret is not sent there, and it gives no anonymous access"
            )
        case 403 if server.anonymous:
            return PermissionDeniedError(answer)
        case 401:
            return UnauthenticatedError(f"{answer}; the image is private or does not exist: check the pull secret")
        case 403:
            return PermissionDeniedError(f"{answer}; the credentials do not allow to pull it")
        case 404:
            return NotFoundError(answer)
        case 416:
            return DataLossError(f"{answer}: the host's blob is shorter than what was received already")
        case 408 | 429 | 500 | 502 | 503 | 504:
            after = retry_after(response.headers)
            asks = f"; the server asks to wait {after:.0f} s" if after else ""
            return TryAgainError(f"{answer}{asks}", after)
        case _:
            return UnavailableError(answer)
