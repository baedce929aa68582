"""HTTP requests to registries and authorisation servers; failures become the classes of criserver/errors.py.

Only this module and its callers import aiohttp, which takes 9 MiB and 80 ms. So images/ imports it at the first pull.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

import criserver
from criserver.errors import InvalidArgumentError, UnavailableError
from criserver.images.content_codings import coding_of, decoded
from criserver.images.hosts import RegistryHost
from criserver.images.lenient_http import MAX_HEAD, MAX_HEADERS, LenientConnector
from criserver.images.lookups import Lookups
from criserver.images.proxies import SOCKS, Proxies
from criserver.images.retries import TryAgainError
from criserver.images.tls import context_for

_READ_BUFFER = 1 << 20
_MAX_REASON = 200
_NUMERIC = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
# OpenSSL's errors for a server that answers TLS with plain text; the second is since version 3.2.
_PLAIN_TEXT = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"})


class NotConnectedError(UnavailableError):
    """A host cannot be connected to; ``plain`` says that it answers, but without TLS."""

    def __init__(self, message: str, *, plain: bool = False) -> None:
        super().__init__(message)
        self.plain = plain


class SilentError(TryAgainError):
    """A host has taken a request, and has not begun to answer it."""


class Transport:
    """The connections of one pull. An async context manager."""

    def __init__(self, lookups: Lookups) -> None:
        self._lookups = lookups
        self._contexts: dict[tuple[RegistryHost, bool], ssl.SSLContext] = {}
        self._proxies = Proxies(os.environ)

        # One session for each SOCKS proxy, by the proxy's URL; "" is the session for connections without one.
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for session in self._sessions.values():
            await session.close()

    @asynccontextmanager
    async def send(
        self,
        host: RegistryHost,
        url: URL,
        headers: Iterable[tuple[str, str]],
        what: str,
        *,
        identified: bool,
        idle: float,
        total: float | None = None,
        method: str = "GET",
        form: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response to a request, or to a POST of ``form``. Redirects are not followed.

        1. ``host`` has the settings for TLS, also if ``url`` is another server's after a redirect. The host's client
           certificate is used if ``identified``.
        2. ``idle`` is the longest time without a byte, ``total`` that of the whole request, in seconds.
        3. A failure before the response is closed is NotConnectedError, SilentError, TryAgainError or UnavailableError.
        """
        timeout = aiohttp.ClientTimeout(
            total, connect=host.dial_timeout, sock_connect=host.dial_timeout, sock_read=idle
        )
        proxy = self._proxies.proxy_for(url.scheme, url.raw_host or "", url.port or 0)
        socks = proxy if proxy and proxy.startswith(SOCKS) else ""
        answered = False
        try:
            async with self._session(socks).request(
                method if form is None else "POST",
                url,
                headers=list(headers),
                data=form,
                allow_redirects=False,
                ssl=self._context(host, identified),
                proxy=None if socks else proxy,
                timeout=timeout,
            ) as response:
                answered = True
                yield response
        except aiohttp.ClientConnectorCertificateError as e:
            raise _not_connected(host, url, what, e.certificate_error, final=True) from e
        except aiohttp.ClientProxyConnectionError as e:
            raise _not_connected(host, url, what, f"the proxy: {_reason(e.os_error)}") from e
        except aiohttp.ClientConnectorError as e:
            plain = getattr(e.os_error, "reason", None) in _PLAIN_TEXT
            raise _not_connected(host, url, what, _reason(e.os_error), plain=plain) from e
        except aiohttp.ClientHttpProxyError as e:
            raise _not_connected(host, url, what, f"the proxy answers {e.status} {e.message}", final=True) from e
        except aiohttp.ConnectionTimeoutError as e:
            raise _not_connected(host, url, what, f"no connection within {host.dial_timeout:g} s") from e
        except TimeoutError as e:
            kind = TryAgainError if answered else SilentError
            raise kind(f"{what}: no progress within its deadline") from e
        except aiohttp.ClientPayloadError as e:
            raise TryAgainError(f"{what}: the connection ended in the middle of the content") from e
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as e:
            raise TryAgainError(f"{what}: the connection ended: {str(e) or type(e).__name__}") from e
        except aiohttp.ClientResponseError as e:
            reason = " ".join(e.message.split())[:_MAX_REASON] or type(e).__name__
            raise UnavailableError(
                f"{what}: criserver cannot read the HTTP response of {url.origin()} ({reason})"
            ) from e
        except (aiohttp.ClientError, ValueError) as e:
            raise UnavailableError(f"{what}: {str(e) or type(e).__name__}") from e

    def _session(self, socks: str) -> aiohttp.ClientSession:
        if socks not in self._sessions:
            self._sessions[socks] = aiohttp.ClientSession(
                auto_decompress=False,  # digests are of the bytes as they are sent
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": f"criserver/{criserver.__version__}", "Accept-Encoding": "identity"},
                read_bufsize=_READ_BUFFER,
                connector=self._connector(socks),
                max_line_size=MAX_HEAD,
                max_field_size=MAX_HEAD,
                max_headers=MAX_HEADERS,
            )
        return self._sessions[socks]

    def _connector(self, socks: str) -> aiohttp.BaseConnector:
        if not socks:
            return LenientConnector(resolver=_NodesResolver(self._lookups))
        from criserver.images.socks import SocksConnector

        return SocksConnector(socks, self._lookups)

    def _context(self, host: RegistryHost, identified: bool) -> ssl.SSLContext:
        if (host, identified) not in self._contexts:
            self._contexts[host, identified] = context_for(host, identified=identified)
        return self._contexts[host, identified]


class _NodesResolver(AbstractResolver):
    """Resolves names as aiohttp's own resolver does, by the node's lookups."""

    def __init__(self, lookups: Lookups) -> None:
        self._lookups = lookups

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._lookups.addresses(host, port, family, socket.AI_ADDRCONFIG)
        return [
            ResolveResult(hostname=host, host=_numeric(address), port=port, family=kind, proto=protocol, flags=_NUMERIC)
            for kind, _, protocol, _, address in found
        ]

    async def close(self) -> None:
        """The lookups are not the session's own."""


def _numeric(address: tuple[Any, ...]) -> str:
    """The host of a socket address. A link-local one has its interface's name, without which it leads nowhere."""
    return socket.getnameinfo(address, _NUMERIC)[0]


async def read_bounded(response: aiohttp.ClientResponse, limit: int, what: str) -> bytes:
    """The whole of a small body. Raises InvalidArgumentError if it is larger than ``limit`` bytes."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limit:
            raise InvalidArgumentError(f"{what} is larger than {limit} bytes")
    coding = coding_of(response.headers)
    return decoded(bytes(body), coding, limit, what) if coding else bytes(body)


def _reason(error: OSError) -> str:
    """Why there is no connection, without numbers and addresses: the caller tells the host."""
    if isinstance(error, ssl.SSLError) or not error.errno:
        return str(error)
    return str(error.strerror) if isinstance(error, socket.gaierror) else os.strerror(error.errno)


def _not_connected(
    host: RegistryHost, url: URL, what: str, reason: object, *, plain: bool = False, final: bool = False
) -> UnavailableError:
    """The error for a host that cannot be connected to; ``final`` if that cannot be over soon.

    A server that the host redirects to, or its authorisation server, is tried again: the host has just answered.
    """
    if url.origin() == URL(host.url).origin():
        return NotConnectedError(f"cannot connect: {reason}", plain=plain)
    kind = UnavailableError if final else TryAgainError
    return kind(f"{what}: cannot connect to {url.origin()}: {reason}")
