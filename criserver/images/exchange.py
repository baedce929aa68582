"""One request to one host: authentication and redirects (OCI distribution-spec)."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from yarl import URL

from criserver.errors import UnavailableError
from criserver.images.auth import Authorizer
from criserver.images.hosts import RegistryHost
from criserver.images.redirects import MAX_REDIRECTS, is_redirect, is_upgrade, redirected
from criserver.images.registry_errors import refusal
from criserver.images.transport import Transport

# How many times a 401 of one server is answered. The first 401 says what the server wants. The second may be for an
# expired token.
_MAX_ANSWERS = 2
_SUCCESS = frozenset({200, 201, 202, 203, 206})


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
        2. Redirects are followed here. Credentials go to the configured host only, also if it redirects to itself with
           TLS. Another server that answers 401 to a redirected request is asked with an anonymous token of its own.

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
                if is_redirect(response):
                    redirects += 1
                    if redirects > MAX_REDIRECTS:
                        raise UnavailableError(
                            f"{path}: {response.status} after {MAX_REDIRECTS} redirects; no more are followed"
                        )
                    target = redirected(url, response, trusted=trusted)
                    if own and is_upgrade(url, target):
                        host, asked = host.over_tls(str(target.origin())), target
                    url = target
                    continue
                if response.status != 401 or answers[server] >= _MAX_ANSWERS:
                    raise await refusal(response, path, server, ranged="Range" in headers)
                answers[server] += 1
                challenges = response.headers.getall("WWW-Authenticate", ())
                refused = await refusal(response, path, server)
            if not await self._authorizer.answer(server, challenges, authorization):
                raise refused

    def _url(self, host: RegistryHost, path: str) -> URL:
        url = URL(f"{host.url}{host.path}/{self._repository}/{path}")
        return url.with_query(ns=host.namespace) if host.namespace else url


def _identity(host: RegistryHost, authorization: str) -> list[tuple[str, str]]:
    """The operator's headers. If the server has asked for an Authorization, that replaces the operator's."""
    if not authorization:
        return list(host.headers)
    return [*(h for h in host.headers if h[0].lower() != "authorization"), ("Authorization", authorization)]
