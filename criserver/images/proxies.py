"""Which proxy a request goes through: HTTP_PROXY, HTTPS_PROXY and NO_PROXY.

They are read as Go programs read them (golang.org/x/net/http/httpproxy), because operators write NO_PROXY for Go
programs, with networks in it. aiohttp itself does not support networks there, and takes passwords from ``~/.netrc``.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from criserver.errors import FailedPreconditionError
from criserver.numbers import decimal

_PORTS = {"http": 80, "https": 443}
# In curl, socks5 means that the client resolves names, and socks5h that the proxy does. For programs in Go the proxy
# resolves them in both cases, and here too.
SOCKS = ("socks5", "socks5h")
# The longest user and password for a SOCKS proxy (RFC 1929). python-socks sends ASCII alone.
_MAX_SOCKS_TEXT = 255


class Proxies:
    """The proxies in ``environment``. A variable in upper case counts before one in lower case."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._proxies = {scheme: _variable(environment, f"{scheme}_proxy") for scheme in _PORTS}
        listed = _variable(environment, "no_proxy")[1].split(",")
        self._direct = [entry.strip().lower() for entry in listed if entry.strip()]

    def proxy_for(self, scheme: str, host: str, port: int) -> str | None:
        """The URL of the proxy for a request, or None if the request goes to ``host`` directly.

        Raises FailedPreconditionError for a proxy that is not http, https or socks5, and for a user or a password that
        cannot be said to a SOCKS proxy.
        """
        name, proxy = self._proxies[scheme]
        if not proxy or self._is_direct(host.lower(), port):
            return None
        url = proxy if "://" in proxy else f"http://{proxy}"
        try:
            parts = urlsplit(url)
            valid = parts.scheme in (*_PORTS, *SOCKS) and parts.hostname and parts.port != 0
        except ValueError:
            valid = False
        if not valid:  # the error is without the value, which may have a password in it
            raise FailedPreconditionError(f"the environment's {name} is not an http, https or socks5 URL of a proxy")
        told = [unquote(text) for text in (parts.username, parts.password) if text]
        if parts.scheme in SOCKS and not all(text.isascii() and len(text) <= _MAX_SOCKS_TEXT for text in told):
            limit = f"at most {_MAX_SOCKS_TEXT} ASCII characters"
            raise FailedPreconditionError(f"the environment's {name} has a user or a password that is not {limit}")
        return f"{parts.scheme}://{url.partition('://')[2]}"

    def _is_direct(self, host: str, port: int) -> bool:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            address = None
        if host == "localhost" or (address is not None and address.is_loopback):
            return True
        return any(_matches(entry, host, address, port) for entry in self._direct)


def _variable(environment: Mapping[str, str], name: str) -> tuple[str, str]:
    for spelling in (name.upper(), name):
        if value := environment.get(spelling, "").strip():
            return spelling, value
    return name.upper(), ""


def _matches(entry: str, host: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address | None, port: int) -> bool:
    """Whether an entry of NO_PROXY covers a host.

    The entry is ``*``, a network, or an address or a domain with or without a port.
    """
    if entry == "*":
        return True
    try:
        network = ipaddress.ip_network(entry, strict=False)
    except ValueError:
        pass
    else:
        return address is not None and address in network
    name, colon, number = entry.rpartition(":")
    if colon and number.isdecimal():
        if decimal(number, 65535) != port:
            return False
        entry = name
    if address is not None:
        return entry.strip("[]") == host
    domain = entry.removeprefix("*")
    # With a leading dot the domain itself is not covered.
    return host.endswith(domain) if domain.startswith(".") else host == domain or host.endswith(f".{domain}")
