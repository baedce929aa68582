"""Authentication at each server of a pull: which credentials a server gets, and as which header.

1. A server gets credentials only after it has asked for them with a 401.
2. Credentials from the kubelet are for the registry in the image's name, or for the server that the operator has put in
   its place. Mirrors do not get them.
3. Credentials in the node's docker config file are for the servers that the file names.
4. A server to which another one redirects gets none. It is asked with an anonymous token, if it wants one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import structlog

from criserver.images.credentials import Credentials, DockerConfig, canonical_server
from criserver.images.hosts import RegistryHost
from criserver.images.references import Reference
from criserver.images.tokens import Challenge, Token, TokenRequest, parse_challenges, wanted_by

_log = structlog.get_logger(__name__)

FetchToken = Callable[[RegistryHost, TokenRequest, Credentials | None], Awaitable[Token]]


class Keyring:
    """The credentials for one pull, by server."""

    def __init__(self, reference: Reference, given: Credentials | None, file: DockerConfig | None) -> None:
        self._reference = reference
        self._given = given
        self._file = file
        self._found: dict[RegistryHost, Credentials | None] = {}

    def find(self, host: RegistryHost) -> Credentials | None:
        """The credentials for ``host``, or None."""
        if host not in self._found:
            self._found[host] = self._find(host)
        return self._found[host]

    def _find(self, host: RegistryHost) -> Credentials | None:
        if host.anonymous:
            return None
        names = {canonical_server(host.authority)}
        if host.origin:
            names.add(canonical_server(self._reference.domain))
        if self._given is not None:
            only_for = canonical_server(self._given.server_address).partition("/")[0]
            if only_for in names or (host.origin and not only_for):
                return self._given
        if self._file is None:
            return None
        path = f"{host.path.removeprefix('/v2')}/{self._reference.path}".strip("/")
        for name in sorted(names, key=lambda name: name == self._reference.domain):
            if found := self._file.find(name, path):
                return found
            if self._file.leaves_to_helper(name):
                _log.warning(
                    "a credential helper of registry.auth_file is not asked: criserver runs none; write the "
                    "credentials into the file",
                    server=name,
                )
        return None


@dataclass(slots=True)
class _Identity:
    """The authentication that one host is known to want."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    header: str = ""
    wanted: TokenRequest | None = None  # a token, which may have to be fetched anew
    expires: float = 0.0


class Authorizer:
    """The Authorization headers of one pull.

    ``scope`` is the access that authorisation servers are asked for, beside what a challenge names. It is not asked for
    if the challenge of a host that may have another name for the repository names a scope: an authorisation server may
    refuse all scopes for one that it does not know.
    """

    def __init__(self, keyring: Keyring, fetch_token: FetchToken, scope: str) -> None:
        self._keyring = keyring
        self._fetch_token = fetch_token
        self._scope = scope
        self._identities: dict[RegistryHost, _Identity] = {}

    async def header(self, host: RegistryHost) -> str:
        """The header that this host is known to want; "" if it wants none. Raises as :meth:`answer`."""
        identity = self._identities.get(host)
        if identity is None:
            return ""
        async with identity.lock:
            if identity.wanted is not None and time.monotonic() >= identity.expires:
                await self._fetch(host, identity, identity.wanted)
            return identity.header

    async def answer(self, host: RegistryHost, challenges: Sequence[str], sent: str) -> bool:
        """Answer the WWW-Authenticate headers of a 401, which was the response to the header ``sent``.

        Returns whether the request is to be sent again. Raises UnauthenticatedError, TryAgainError, UnavailableError.
        """
        identity = self._identities.setdefault(host, _Identity())
        async with identity.lock:
            if identity.header != sent:
                return True  # another request was quicker
            offered = {challenge.scheme: challenge for challenge in reversed(parse_challenges(challenges))}
            credentials = self._keyring.find(host)
            if "bearer" in offered:
                return await self._answer_bearer(host, identity, offered["bearer"], credentials)
            if "basic" in offered and credentials is not None and credentials.username:
                identity.header, identity.wanted = credentials.basic, None
                return identity.header != sent
            return False

    async def _answer_bearer(
        self, host: RegistryHost, identity: _Identity, challenge: Challenge, credentials: Credentials | None
    ) -> bool:
        if credentials is not None and credentials.registry_token:
            sent, identity.header = identity.header, f"Bearer {credentials.registry_token}"
            return identity.header != sent
        scopes = set(identity.wanted.scopes if identity.wanted else ())
        if not (host.may_rename and challenge.parameters.get("scope")):
            scopes.add(self._scope)
        await self._fetch(host, identity, wanted_by(challenge, host, scopes))
        return True

    async def _fetch(self, host: RegistryHost, identity: _Identity, wanted: TokenRequest) -> None:
        token = await self._fetch_token(host, wanted, self._keyring.find(host))
        identity.header, identity.wanted, identity.expires = f"Bearer {token.text}", wanted, token.expires
