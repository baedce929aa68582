"""Credentials for registries, and the docker config file that may hold the node's own."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from criserver.errors import FailedPreconditionError

_log = structlog.get_logger(__name__)

_HUB_NAMES = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_MAX_FILE = 1 << 20


@dataclass(frozen=True, slots=True)
class Credentials:
    """Credentials for a registry (CRI AuthConfig); any part may be empty.

    1. An authorisation server exchanges an identity token for bearer tokens. A registry token is such a bearer token.
       Both are used in preference to user and password.
    2. With a ``server_address`` the credentials are for that server only.
    """

    username: str = ""
    password: str = field(default="", repr=False)
    server_address: str = ""
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """User and password as an Authorization header (RFC 7617)."""
        return f"Basic {base64.b64encode(f'{self.username}:{self.password}'.encode()).decode()}"


@dataclass(frozen=True, slots=True)
class DockerConfig:
    """The credentials of a docker config file, by server, or by server and the beginning of a repository's path.

    ``helpers`` are the servers whose credentials a credential helper keeps; "" stands for all servers.
    """

    entries: Mapping[str, Credentials]
    helpers: frozenset[str]

    def find(self, server: str, path: str) -> Credentials | None:
        """The entry with the longest part of a repository's name, or None."""
        name = f"{canonical_server(server)}/{path}"
        while name:
            if name in self.entries:
                return self.entries[name]
            name = name.rpartition("/")[0]
        return None

    def leaves_to_helper(self, server: str) -> bool:
        """Whether a credential helper would be asked about ``server``."""
        return bool(self.helpers & {"", canonical_server(server)})


def load_docker_config(path: str, what: str = "registry.auth_file") -> DockerConfig:
    """Read the file that ``docker login`` writes.

    Raises FailedPreconditionError with ``what``, the path and the entry.
    """
    where = f"{what} {path}"
    try:
        with open(path, "rb") as f:
            content = f.read(_MAX_FILE + 1)
    except OSError as e:
        raise FailedPreconditionError(f"{where}: {e.strerror}") from e
    if len(content) > _MAX_FILE:
        raise FailedPreconditionError(f"{where} is larger than {_MAX_FILE} bytes")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):  # the text of the exception may have a secret in it
        document = None
    if not isinstance(document, dict):
        raise FailedPreconditionError(f"{where} is no JSON object")
    auths, helpers = (_table(where, document, name) for name in ("auths", "credHelpers"))
    found = {canonical_server(server): _entry(where, server, entry) for server, entry in auths.items()}
    everywhere = [""] if document.get("credsStore") else []
    return DockerConfig(
        # An empty entry means that a helper has the credentials.
        {server: credentials for server, credentials in found.items() if credentials != Credentials()},
        frozenset([*everywhere, *map(canonical_server, helpers)]),
    )


def node_credentials(path: str) -> DockerConfig | None:
    """The credentials of the node for pulls that bring none. ``path`` is registry.auth_file, "" for none.

    A missing file is logged, and has no credentials: images that anyone may pull need none. Raises as
    :func:`load_docker_config` does for a file that cannot be used.
    """
    if not path:
        return None
    if not os.path.exists(path):
        _log.warning("registry.auth_file does not exist; the pull has no credentials of the node", path=path)
        return None
    return load_docker_config(path)


def decode_basic(text: str) -> tuple[str, str]:
    """User and password of docker's ``auth``: base64 of both with a colon. Raises ValueError.

    Line breaks are left out, as in Go: base64(1) wraps long lines.
    """
    joined = text.replace("\r", "").replace("\n", "")
    username, colon, password = base64.b64decode(joined, validate=True).decode().rstrip("\0").partition(":")
    if not colon:
        raise ValueError("there is no colon")
    return username, password


def canonical_server(server: str) -> str:
    """The canonical form host[:port][/path] of a server in a docker config file, as https://index.docker.io/v1/."""
    name = server.partition("://")[2] or server
    name = name.rstrip("/").removesuffix("/v1").removesuffix("/v2")
    host, slash, path = name.partition("/")
    host = host.lower()
    return f"{'docker.io' if host in _HUB_NAMES else host}{slash}{path}"


def _table(where: str, document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = document.get(name)
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise FailedPreconditionError(f"{where}: {name} is no JSON object")
    return table


def _entry(file: str, server: str, entry: Any) -> Credentials:
    where = f"{file}: auths.{server!r}"
    if entry is None:
        return Credentials()  # Go reads null as a table without fields
    if not isinstance(entry, dict):
        raise FailedPreconditionError(f"{where} is no JSON object")
    values = {key: entry.get(key) or "" for key in ("auth", "username", "password", "identitytoken", "registrytoken")}
    for key, value in values.items():
        if not isinstance(value, str):
            raise FailedPreconditionError(f"{where}.{key} is not a string")
    username, password = values["username"], values["password"]
    if values["auth"]:
        try:
            username, password = decode_basic(values["auth"])
        except ValueError:
            raise FailedPreconditionError(
                f"{where}.auth is not base64 of a user name, a colon and a password"
            ) from None
    return Credentials(
        username, password, identity_token=values["identitytoken"], registry_token=values["registrytoken"]
    )
