"""Redirects of registries and authorisation servers (RFC 9110, section 15.4)."""

from __future__ import annotations

import re

import aiohttp
from yarl import URL

from criserver.errors import UnavailableError
from criserver.images.references import is_ipv6

MAX_REDIRECTS = 10

_STATUSES = frozenset({301, 302, 303, 307, 308})
# What no URL has (RFC 3986, section 2). Servers write it nevertheless, and Go's client encodes it in paths.
_NO_URL = re.compile(r"[^!-~]")


def is_redirect(response: aiohttp.ClientResponse) -> bool:
    """Whether a response names another place for its content."""
    return response.status in _STATUSES and "Location" in response.headers


def redirected(url: URL, response: aiohttp.ClientResponse, *, trusted: bool) -> URL:
    """Where the response to a request for ``url`` redirects to.

    ``trusted`` content has no digest that proves it. A redirect from HTTPS to plain HTTP is refused for it. Raises
    UnavailableError.
    """
    # The URL is taken as encoded already: a signed URL must not change.
    location = _NO_URL.sub(_encoded, response.headers.get("Location", ""))
    try:
        target = url.join(URL(location, encoded=True))
        valid = target.scheme not in ("http", "https") or names_server(target)
    except ValueError:
        valid = False
    if not valid:
        raise UnavailableError(f"{url.path}: {response.status} redirects to what is no URL of a server")
    if target.scheme not in ("http", "https") or (trusted and url.scheme == "https" != target.scheme):
        raise UnavailableError(f"{url.path}: {response.status} redirects from {url.scheme} to {target.scheme}")
    return target


def names_server(url: URL) -> bool:
    """Whether there is a host and a port in an absolute URL. Raises ValueError for some that have none.

    yarl looks at them late, and takes anything between brackets for an address.
    """
    host = url.raw_host or ""
    return bool(host and url.port) and (":" not in host or is_ipv6(host.partition("%")[0]))


def is_same_server(url: URL, target: URL) -> bool:
    """Whether a redirect from ``url`` to ``target`` stays at one server, which may get the same credentials.

    It does if nothing but the path changes, or if the same host is asked over TLS.
    """
    return target.origin() == url.origin() or (target.raw_host == url.raw_host and target.scheme == "https")


def is_upgrade(url: URL, target: URL) -> bool:
    """Whether a redirect from ``url`` asks for the same over TLS, from the same host at any port."""
    is_same = (url.raw_host, url.raw_path_qs) == (target.raw_host, target.raw_path_qs)
    return is_same and url.scheme == "http" and target.scheme == "https"


def _encoded(character: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in character[0].encode(errors="surrogateescape"))
