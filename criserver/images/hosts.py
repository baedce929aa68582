"""The servers that have the images of a registry, from containerd's certs.d directory.

The file is ``CONFIG_PATH/HOST[:PORT]/hosts.toml``, or that of ``_default`` if there is none. It is read as containerd
reads it (its docs/hosts.md), with one difference: containerd logs a malformed file and goes on without it. Here that is
an error, as the operator's mirror would not be used, and nobody would notice. The files are read for every pull, so a
change needs no restart.
"""

from __future__ import annotations

import ipaddress
import os
import posixpath
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from criserver.errors import FailedPreconditionError
from criserver.images.references import DEFAULT_DOMAIN

PULL = "pull"
RESOLVE = "resolve"

_API = "/v2"
_DOCKER_HUB = "registry-1.docker.io"
# Other names of Docker Hub, which operators write for it. There are web pages at them, and no registry.
_HUB_PAGES = frozenset({DEFAULT_DOMAIN, "index.docker.io"})
_CAPABILITIES = frozenset({PULL, RESOLVE, "push", "referrers"})
_HOST_KEYS = frozenset({"capabilities", "ca", "client", "skip_verify", "header", "dial_timeout", "override_path"})
_MAX_FILE = 1 << 20
_NO_URL = re.compile(r"[\s\\]")
_DIAL_TIMEOUT = 30.0
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class RegistryHost:
    """One server that is asked for an image.

    - ``url`` is scheme and authority, ``path`` the root of the API there, usually ``/v2``.
    - ``namespace`` is the domain that a mirror is asked for by the query parameter ``ns``; "" for the registry itself.
    - ``origin`` says that the server is the registry, or the operator's replacement for it. Credentials for the domain
      go to it, and not to mirrors.
    - ``dial_timeout`` is in seconds.
    - ``fallback`` says that it is the host before it without TLS. It is asked only if that host does not support TLS.
    - ``anonymous`` says that it was found by a redirect: it gets no credentials, headers or client certificates.
    """

    url: str
    path: str = _API
    capabilities: frozenset[str] = _CAPABILITIES
    ca: tuple[str, ...] = ()
    client: tuple[tuple[str, str | None], ...] = ()
    skip_verify: bool | None = None
    headers: tuple[tuple[str, str], ...] = ()
    dial_timeout: float = _DIAL_TIMEOUT
    namespace: str = ""
    origin: bool = False
    fallback: bool = False
    anonymous: bool = False

    @property
    def authority(self) -> str:
        """host[:port], as in the URL."""
        return urlsplit(self.url).netloc

    @property
    def may_rename(self) -> bool:
        """Whether a repository may have another name there than in the image's reference."""
        return self.anonymous or self.path != _API

    def over_tls(self, url: str) -> RegistryHost:
        """The same server, which has said by a redirect that it is to be asked with TLS at the origin ``url``."""
        return replace(self, url=url)

    def redirected_to(self, url: str) -> RegistryHost:
        """The server with the origin ``url`` to which this host redirects: it gets no secret of this host."""
        return replace(self, url=url, client=(), headers=(), namespace="", origin=False, anonymous=True)


def hosts_for(domain: str, config_path: str) -> tuple[RegistryHost, ...]:
    """The servers to ask for images of ``domain``, in order; the registry itself is last.

    ``config_path`` is a directory, or several with ":" between them; the first that has the domain counts. "" means
    none. Raises FailedPreconditionError with the file and the key that cannot be read.
    """
    directory = _directory(domain, config_path) if config_path else None
    if directory is None:
        return _expanded(_default(domain, RegistryHost("")), domain)
    path = os.path.join(directory, "hosts.toml")
    try:
        with open(path, "rb") as f:
            content = f.read(_MAX_FILE + 1)
    except FileNotFoundError:
        content = b""
    except OSError as e:
        raise FailedPreconditionError(f"{path}: {e.strerror}") from e
    if len(content) > _MAX_FILE:
        raise FailedPreconditionError(f"{path} is larger than {_MAX_FILE} bytes")
    if not content:
        return _expanded(_default(domain, _certificate_files(directory)), domain)
    return _File(path).hosts(domain, content)


def unknown_keys(content: bytes) -> list[str]:
    """The keys of a hosts.toml that mean nothing, such as misspelt ones. A pull ignores them, as containerd does.

    Raises ValueError if the content is not TOML.
    """
    root = tomllib.loads(content.decode())
    tables = root.get("host", {})
    found = [key for key in root if key not in _HOST_KEYS and key not in ("host", "server")]
    for url, table in tables.items() if isinstance(tables, dict) else ():
        if isinstance(table, dict):
            found += [f'host."{url}".{key}' for key in table if key not in _HOST_KEYS]
    return found


def _directory(domain: str, config_path: str) -> str | None:
    host, colon, port = domain.rpartition(":")
    names = [f"{host}_{port}_"] if colon and not domain.endswith("]") else []
    for root in filter(None, config_path.split(":")):
        for name in (*names, domain, "_default"):
            candidate = os.path.join(root, name)
            if os.path.isdir(candidate):
                return candidate
    return None


def _certificate_files(directory: str) -> RegistryHost:
    """Docker's layout, for directories without hosts.toml: ``*.crt`` authorities, ``*.cert`` with ``*.key``."""
    names = sorted(os.listdir(directory))
    pairs = []
    for name in names:
        if name.endswith(".cert"):
            key = name.removesuffix(".cert") + ".key"
            pairs.append((os.path.join(directory, name), os.path.join(directory, key) if key in names else None))
    ca = tuple(os.path.join(directory, name) for name in names if name.endswith(".crt"))
    return RegistryHost("", ca=ca, client=tuple(pairs))


def _default(domain: str, settings: RegistryHost) -> RegistryHost:
    """The registry itself, for a file without the key ``server``; ``settings`` has the TLS keys for it."""
    server = replace(settings, path=_API, capabilities=_CAPABILITIES, origin=True)
    if domain == DEFAULT_DOMAIN:
        return replace(server, url=f"https://{_DOCKER_HUB}")
    if not _is_loopback(domain):
        return replace(server, url=f"https://{domain}")
    match urlsplit(f"//{domain}").port:
        case 80:
            return replace(server, url=f"http://{domain}")
        case None | 443:
            return replace(server, url=f"https://{domain}", skip_verify=True)
        case _:
            return replace(server, url=f"http://{domain}", skip_verify=True)


def _is_loopback(domain: str) -> bool:
    host = urlsplit(f"//{domain}").hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _expanded(host: RegistryHost, domain: str) -> tuple[RegistryHost, ...]:
    """The host, or two: an http:// address with TLS settings means https first, and http as the fallback."""
    if host.authority not in (domain, _DOCKER_HUB if domain == DEFAULT_DOMAIN else domain):
        host = replace(host, namespace=domain)
    else:
        host = replace(host, origin=True)
    parts = urlsplit(host.url)
    has_tls = host.ca or host.client or host.skip_verify is not None
    if parts.scheme == "http" and has_tls and parts.port != 80:
        return replace(host, url=f"https://{parts.netloc}"), replace(host, fallback=True)
    return (host,)


class _File:
    """One hosts.toml; errors name it and the key."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._directory = os.path.dirname(path)

    def hosts(self, domain: str, content: bytes) -> tuple[RegistryHost, ...]:
        try:
            root = tomllib.loads(content.decode())
        except ValueError as e:  # tomllib's and UnicodeDecodeError are both
            raise FailedPreconditionError(f"{self._path} is not TOML: {e}") from e
        tables = root.get("host", {})
        if not isinstance(tables, dict):
            raise self._error("host", 'is not a table; write [host."https://NAME"]')
        found: list[RegistryHost] = []
        for url, table in tables.items():
            key = f'host."{url}"'
            if not isinstance(table, dict):
                raise self._error(key, "is not a table")
            found += _expanded(self._host(key, url, table), domain)
        server = root.get("server", "")
        if not isinstance(server, str):
            raise self._error("server", "is not a string")
        last = self._host("server", server, root)
        last = replace(last, origin=True) if server else _default(domain, last)
        return (*found, *_expanded(last, domain))

    def _host(self, key: str, url: str, table: Mapping[str, Any]) -> RegistryHost:
        base, path = self._url(key, url, self._boolean(key, table, "override_path") or False) if url else ("", "")
        return RegistryHost(
            base,
            path,
            self._capabilities(key, table),
            self._ca(key, table),
            self._client(key, table),
            self._boolean(key, table, "skip_verify"),
            self._headers(key, table),
            self._dial_timeout(key, table),
        )

    def _url(self, key: str, url: str, override_path: bool) -> tuple[str, str]:
        try:
            parts = urlsplit(url if "://" in url else f"https://{url}")
            valid = not _NO_URL.search(url) and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            valid = False  # also for an IPv6 address that is none
        if not valid or parts.query or parts.fragment or "@" in parts.netloc:
            raise self._error(key, f"{url!r} is not an http or https URL of a host")
        path = posixpath.normpath(parts.path) if parts.path.strip("/") else ""
        if not override_path and not path.endswith(_API):
            path += _API
        return f"{parts.scheme}://{_DOCKER_HUB if parts.netloc in _HUB_PAGES else parts.netloc}", path

    def _capabilities(self, key: str, table: Mapping[str, Any]) -> frozenset[str]:
        values = table.get("capabilities") or sorted(_CAPABILITIES)
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise self._error(f"{key}.capabilities", "is not a list of strings")
        names = frozenset(v.lower() for v in values)
        if unknown := sorted(names - _CAPABILITIES):
            raise self._error(f"{key}.capabilities", f"{unknown[0]!r} is none of {', '.join(sorted(_CAPABILITIES))}")
        return names

    def _ca(self, key: str, table: Mapping[str, Any]) -> tuple[str, ...]:
        value = table.get("ca", [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise self._error(f"{key}.ca", "is neither a path nor a list of paths")
        return tuple(self._absolute(v) for v in values)

    def _client(self, key: str, table: Mapping[str, Any]) -> tuple[tuple[str, str | None], ...]:
        value = table.get("client", [])
        values = [value] if isinstance(value, str) else value
        pairs: list[tuple[str, str | None]] = []
        for item in values if isinstance(values, list) else [None]:
            match item:
                case str():
                    pairs.append((self._absolute(item), None))
                case [str() as cert, str() as private]:
                    pairs.append((self._absolute(cert), self._absolute(private) if private else None))
                case _:
                    raise self._error(f"{key}.client", "is neither a path, nor a list of paths or of pairs of paths")
        return tuple(pairs)

    def _boolean(self, key: str, table: Mapping[str, Any], name: str) -> bool | None:
        value = table.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._error(f"{key}.{name}", "is neither true nor false")
        return value

    def _headers(self, key: str, table: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        header = table.get("header", {})
        if not isinstance(header, dict):
            raise self._error(f"{key}.header", "is not a table")
        found = []
        for name, value in header.items():
            values = [value] if isinstance(value, str) else value
            if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
                raise self._error(f"{key}.header.{name}", "is neither a string nor a list of strings")
            if any(c in text for text in (name, *values) for c in "\r\n\0"):
                raise self._error(f"{key}.header.{name}", "has a line break or a NUL")
            found += [(name, v) for v in values]
        return tuple(found)

    def _dial_timeout(self, key: str, table: Mapping[str, Any]) -> float:
        value = table.get("dial_timeout", "")
        if value == "":
            return _DIAL_TIMEOUT
        if not isinstance(value, str) or _DURATION_PART.sub("", value):
            raise self._error(f"{key}.dial_timeout", f"{value!r} is not a duration such as '500ms' or '1m30s'")
        return sum(float(number) * _SECONDS[unit] for number, unit in _DURATION_PART.findall(value))

    def _absolute(self, path: str) -> str:
        return os.path.join(self._directory, path)

    def _error(self, key: str, reason: str) -> FailedPreconditionError:
        return FailedPreconditionError(f"{self._path}: key {key}: {reason}")
