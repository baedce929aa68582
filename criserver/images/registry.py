"""The registry client: manifests and blobs by HTTP, from whichever configured host has them (OCI
distribution-spec, pull).

One client, with its connections and credentials, serves one pull and ends with it. This module imports aiohttp,
9 MiB and 80 ms, so images/ imports it at the first pull and not before.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self, TypeVar

import aiohttp
import structlog
from yarl import URL

import criserver
from criserver.errors import (
    CriError,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from criserver.images.auth import Authorizer, Credentials
from criserver.images.content import ContentStore, digest_of
from criserver.images.hosts import PULL, RESOLVE, Host
from criserver.images.manifests import INDEX_TYPES, MANIFEST_TYPES, MAX_MANIFEST, Descriptor
from criserver.images.references import Reference, is_digest

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)

_ACCEPT = ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))
_PROGRESS_TIMEOUT = 60.0
_MANIFEST_TIMEOUT = 120.0
_MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_READ_BUFFER = 1 << 20


class RegistryClient:
    """Pulls for one reference. An async context manager; a :class:`~criserver.images.pull.Source`.

    Every method asks the hosts in order until one delivers. Where none does, the error is of the class that the
    last one, the registry itself, gave, and tells what each said. A host that cannot be connected to is not asked
    again.
    """

    def __init__(self, reference: Reference, hosts: Sequence[Host], credentials: Credentials | None) -> None:
        self.name = f"image {reference}"
        self.origin = reference.domain
        self._reference = reference
        self._hosts = hosts
        self._authorizer = Authorizer(credentials)
        self._unreachable: dict[Host, UnavailableError] = {}
        self._tls: dict[Host, ssl.SSLContext] = {}
        self._resolved: dict[str, bytes] = {}

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            auto_decompress=False,  # a digest is that of the bytes sent
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": f"criserver/{criserver.__version__}", "Accept-Encoding": "identity"},
            read_bufsize=_READ_BUFFER,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    async def resolve(self) -> Descriptor:
        """The manifest or index that the reference means at this moment.

        Raises NotFoundError, UnauthenticatedError, PermissionDeniedError, UnavailableError, DataLossError.
        """
        wanted = self._reference.digest
        capabilities = {PULL} if wanted else {PULL, RESOLVE}

        async def attempt(host: Host) -> tuple[Descriptor, bytes]:
            return await self._fetch_manifest(host, wanted or f"{self._reference.tag}", wanted)

        descriptor, body = await self._from_any(capabilities, attempt)
        self._resolved[descriptor.digest] = body
        return descriptor

    async def manifest(self, descriptor: Descriptor) -> bytes:
        """The body of a manifest or index, checked against its digest. Raises as :meth:`resolve`."""
        if descriptor.digest in self._resolved:
            return self._resolved[descriptor.digest]

        async def attempt(host: Host) -> tuple[Descriptor, bytes]:
            return await self._fetch_manifest(host, descriptor.digest, descriptor.digest)

        return (await self._from_any({PULL}, attempt))[1]

    async def blob(self, descriptor: Descriptor, content: ContentStore) -> None:
        """Bring a blob of the repository into ``content``, checked against its size and digest.

        Raises as :meth:`resolve`, and ResourceExhaustedError where the disk is full.
        """

        async def attempt(host: Host) -> None:
            timeout = _timeout(host, total=None)
            async with self._get(host, f"blobs/{descriptor.digest}", {}, timeout) as response:
                with content.ingest() as ingest:
                    async for chunk in response.content.iter_any():
                        if ingest.size + len(chunk) > descriptor.size:
                            raise DataLossError(f"blob {descriptor.digest} is longer than its {descriptor.size} bytes")
                        await ingest.write(chunk)
                    if ingest.size < descriptor.size:
                        raise UnavailableError(
                            f"blob {descriptor.digest} ended after {ingest.size} of {descriptor.size} bytes"
                        )
                    ingest.commit(descriptor.digest)

        await self._from_any({PULL}, attempt)

    async def _from_any(self, capabilities: set[str], attempt: Callable[[Host], Awaitable[_T]]) -> _T:
        errors: list[tuple[Host, CriError]] = []
        for host in self._hosts:
            if not host.capabilities >= capabilities:
                continue
            error: CriError | None = self._unreachable.get(host)
            if error is None:
                try:
                    return await attempt(host)
                except ResourceExhaustedError:
                    raise  # the node's own trouble: no other host helps
                except CriError as e:
                    error = e
                    _log.info("registry host failed", image=str(self._reference), host=host.url, error=str(e))
            errors.append((host, error))
        if not errors:
            raise FailedPreconditionError(
                f"{self.name}: no host of {self.origin} is configured with the capabilities "
                f"{', '.join(sorted(capabilities))}"
            )
        told = "; ".join(f"{host.url}: {error}" for host, error in errors)
        raise type(errors[-1][1])(f"{self.name}: {told}") from errors[-1][1]

    async def _fetch_manifest(self, host: Host, name: str, digest: str | None) -> tuple[Descriptor, bytes]:
        timeout = _timeout(host, total=_MANIFEST_TIMEOUT)
        headers = {"Accept": _ACCEPT}
        async with self._get(host, f"manifests/{name}", headers, timeout, trusted=digest is None) as response:
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > MAX_MANIFEST:
                    raise InvalidArgumentError(f"manifest {name} is larger than {MAX_MANIFEST} bytes")
            found = digest_of(bytes(body))
            stated = response.headers.get("Docker-Content-Digest", "") if digest is None else digest
            if found != stated and is_digest(stated):
                raise DataLossError(f"manifest {name}: the content received has digest {found}, not {stated}")
            media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
            return Descriptor(media_type, found, len(body)), bytes(body)

    @asynccontextmanager
    async def _get(
        self, host: Host, path: str, headers: dict[str, str], timeout: aiohttp.ClientTimeout, *, trusted: bool = False
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A response with status 200. ``trusted`` content has no digest to prove it: it must not come over plain
        HTTP where the host itself does not.

        Redirects are followed here: what identifies us goes to the configured host only.
        """
        url = URL(f"{host.url}{host.path}/{self._reference.path}/{path}")
        if host.namespace:
            url = url.with_query(ns=host.namespace)
        asked, redirects = url, 0
        try:
            while True:
                own = url.origin() == asked.origin()
                sent = [*headers.items(), *(self._identity(host) if own else ())]
                tls = self._tls_context(host) if own else True
                async with self._session.get(
                    url, headers=sent, allow_redirects=False, ssl=tls, timeout=timeout
                ) as response:
                    if response.status == 200:
                        yield response
                        return
                    if response.status in _REDIRECTS and redirects < _MAX_REDIRECTS:
                        redirects += 1
                        url = _redirected(url, response, trusted)
                        continue
                    challenges = response.headers.getall("WWW-Authenticate", ())
                    if response.status == 401 and own and self._authorizer.answer(host, challenges):
                        continue
                    raise self._refusal(response, path)
        except aiohttp.ClientConnectorError as e:
            reason = e.certificate_error if isinstance(e, aiohttp.ClientConnectorCertificateError) else e.os_error
            raise self._not_connected(host, own, reason) from e
        except aiohttp.ConnectionTimeoutError as e:
            raise self._not_connected(host, own, f"no connection within {host.dial_timeout:g} s") from e
        except TimeoutError as e:
            raise UnavailableError(f"{path}: no progress within its deadline") from e
        except aiohttp.ClientPayloadError as e:
            raise UnavailableError(f"{path}: the connection ended in the middle of the content") from e
        except (aiohttp.ClientError, ValueError) as e:
            raise UnavailableError(f"{path}: {str(e) or type(e).__name__}") from e

    def _identity(self, host: Host) -> list[tuple[str, str]]:
        authorization = self._authorizer.header(host)
        return [*host.headers, *([("Authorization", authorization)] if authorization else [])]

    def _not_connected(self, host: Host, own: bool, reason: object) -> UnavailableError:
        error = UnavailableError(f"cannot connect: {reason}")
        if own:
            self._unreachable[host] = error
        return error

    def _refusal(self, response: aiohttp.ClientResponse, path: str) -> CriError:
        answer = f"{path}: {response.status} {response.reason or ''}".rstrip()
        match response.status:
            case 401:
                return UnauthenticatedError(f"{answer}; the image is private or does not exist: check the pull secret")
            case 403:
                return PermissionDeniedError(f"{answer}; the credentials given do not allow to pull it")
            case 404:
                return NotFoundError(answer)
            case _:
                return UnavailableError(answer)

    def _tls_context(self, host: Host) -> ssl.SSLContext | bool:
        if not (host.ca or host.client or host.skip_verify):
            return True
        if host not in self._tls:
            self._tls[host] = _make_tls_context(host)
        return self._tls[host]


def _timeout(host: Host, total: float | None) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=total, sock_connect=host.dial_timeout, sock_read=_PROGRESS_TIMEOUT)


def _redirected(url: URL, response: aiohttp.ClientResponse, trusted: bool) -> URL:
    # Encoded already: a signed URL must not change.
    target = url.join(URL(response.headers.get("Location", ""), encoded=True))
    if target.scheme not in ("http", "https") or (trusted and url.scheme == "https" != target.scheme):
        raise UnavailableError(f"{url.path}: {response.status} redirects from {url.scheme} to {target.scheme}")
    return target


def _make_tls_context(host: Host) -> ssl.SSLContext:
    """The system's authorities and the host's own. Of several client certificates the first is used."""
    context = ssl.create_default_context()
    if host.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    path = ""
    try:
        for path in host.ca:
            context.load_verify_locations(path)
        for path, key in host.client[:1]:
            context.load_cert_chain(path, key)
    except OSError as e:  # ssl.SSLError is one
        raise FailedPreconditionError(f"certificate file {path}: {e.strerror or e}") from e
    return context
