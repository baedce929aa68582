"""Who we are to a registry: credentials, and what its servers ask for.

Credentials are sent to no server that did not ask for them, and to none but the registry that they are for and
what the operator put in its place: a mirror gets none.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from criserver.errors import UnauthenticatedError
from criserver.images.hosts import Host

_DOCKER_HUB = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the kubelet gives for one pull (CRI AuthConfig); ``server_address`` limits it to that server."""

    username: str
    password: str = field(repr=False)
    server_address: str = ""


class Authorizer:
    """The Authorization headers of one pull, by host."""

    def __init__(self, credentials: Credentials | None) -> None:
        self._credentials = credentials
        self._headers: dict[Host, str] = {}

    def header(self, host: Host) -> str | None:
        """What this host is known to want, if anything."""
        return self._headers.get(host)

    def answer(self, host: Host, challenges: Iterable[str]) -> bool:
        """Take up a 401's WWW-Authenticate headers; True where the request is worth another try.

        Raises UnauthenticatedError for a challenge that cannot be answered.
        """
        if host in self._headers:
            return False
        schemes = {challenge.partition(" ")[0].lower() for challenge in challenges}
        if "basic" in schemes:
            if self._credentials is None or not self._is_for(host, self._credentials):
                return False
            pair = f"{self._credentials.username}:{self._credentials.password}"
            self._headers[host] = f"Basic {base64.b64encode(pair.encode()).decode()}"
            return True
        if "bearer" in schemes:
            raise UnauthenticatedError("wants a bearer token, which this version does not fetch")
        return False

    @staticmethod
    def _is_for(host: Host, credentials: Credentials) -> bool:
        address = credentials.server_address
        named = urlsplit(address if "://" in address else f"//{address}").netloc
        return host.origin and (named in ("", host.authority) or {named, host.authority} <= _DOCKER_HUB)
