"""Connections through a SOCKS proxy of version 5 (RFC 1928, and RFC 1929 for a user with a password).

Only a daemon whose environment names such a proxy imports this module, and python-socks with it.
"""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
from typing import Any
from urllib.parse import unquote, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from python_socks import ProxyConnectionError, ProxyError, ProxyType
from python_socks.async_.asyncio import Proxy

from criserver.images.lenient_http import LenientConnector
from criserver.images.lookups import Lookups

_PORT = 1080


class SocksConnector(LenientConnector):
    """Makes connections through the proxy ``url``. The proxy resolves the names of hosts, as for programs in Go.

    aiohttp has no public way to use another program's connection, so this replaces what makes one. Failures are the
    errors that aiohttp has for its own connections.
    """

    def __init__(self, url: str, lookups: Lookups) -> None:
        super().__init__(resolver=_Unresolved())
        self._lookups = lookups
        parts = urlsplit(url)
        self._address = (str(parts.hostname), parts.port or _PORT)
        self._user, self._password = (unquote(text) if text else None for text in (parts.username, parts.password))

    async def _wrap_create_connection(
        self, *args: Any, addr_infos: Any, req: Any, timeout: Any, **options: Any
    ) -> tuple[asyncio.Transport, Any]:
        options.pop("client_error", None)
        host, port = addr_infos[0][4][:2]
        async with asyncio.timeout(timeout.sock_connect or None):  # 0 is no limit, as for aiohttp
            try:
                tunnel = await self._tunnel(host, port)
            except (ProxyError, OSError) as e:
                raise aiohttp.ClientProxyConnectionError(req.connection_key, _as_os_error(e)) from e
            try:
                return await self._loop.create_connection(*args, **options, sock=tunnel)
            except ssl.CertificateError as e:
                raise aiohttp.ClientConnectorCertificateError(req.connection_key, e) from e
            except ssl.SSLError as e:
                raise aiohttp.ClientConnectorSSLError(req.connection_key, e) from e
            except OSError as e:
                raise aiohttp.ClientConnectorError(req.connection_key, e) from e

    async def _tunnel(self, host: str, port: int) -> socket.socket:
        """A connection to a host, by the first of the proxy's addresses that can be connected to."""
        # python-socks alone tries one address. Its own limit of a minute is off, as the caller has one.
        found = await self._lookups.addresses(*self._address)
        addresses = [str(address[0]) for *_, address in found]
        while True:
            proxy = Proxy(ProxyType.SOCKS5, addresses.pop(0), self._address[1], self._user, self._password, rdns=True)
            try:
                return await proxy.connect(host, port, timeout=math.inf)
            except ProxyConnectionError:
                if not addresses:
                    raise


class _Unresolved(AbstractResolver):
    """Leaves names to the proxy."""

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[ResolveResult]:
        return [ResolveResult(hostname=host, host=host, port=port, family=family, proto=0, flags=0)]

    async def close(self) -> None:
        """There is nothing to close."""


def _as_os_error(error: Exception) -> OSError:
    """The kernel's or the resolver's own error, where python-socks has one of its own around it."""
    for found in (error.__cause__, error):
        if isinstance(found, OSError) and found.errno:
            return found
    return OSError(str(error))
