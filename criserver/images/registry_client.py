"""The registry client: manifests and blobs by HTTP from the configured hosts (OCI distribution-spec, pull).

A client, with its connections and credentials, is for one pull. This module imports aiohttp (see transport), so images/
imports it at the first pull.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Self, TypeVar

import aiohttp
import structlog

from criserver.errors import (
    CriError,
    DataLossError,
    FailedPreconditionError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from criserver.images.auth import Authorizer, Keyring
from criserver.images.content import ContentStore, Watcher
from criserver.images.credentials import Credentials
from criserver.images.digests import digest_of, is_digest
from criserver.images.download import Download
from criserver.images.exchange import Exchange
from criserver.images.hosts import PULL, RESOLVE, RegistryHost
from criserver.images.lookups import Lookups
from criserver.images.manifests import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_CONFIG,
    MAX_MANIFEST,
    Descriptor,
    Index,
    choose,
    parse_config,
    parse_manifest,
)
from criserver.images.platforms import Platform, runs_on
from criserver.images.references import Reference
from criserver.images.retries import MAX_WAIT, Retries, TryAgainError
from criserver.images.tokens import Token, TokenRequest, fetch_token
from criserver.images.transport import NotConnectedError, SilentError, Transport, read_bounded

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)

_ACCEPT = ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))
# How often a connection without progress is replaced by a new one before the patience ends.
_CONNECTIONS = 3


class RegistryClient:
    """Pulls for one reference. An async context manager; a :class:`~criserver.images.pull.BlobSource`.

    1. Every method asks the hosts in order until one has the content. Hosts with a temporary failure are asked again.
    2. If none has it, the error has the class of the last host's error, which is the registry itself: only that knows
       whether there is such an image. Its text has the errors of all hosts. The answers come before the hosts that
       cannot be connected to, and those of the registry before those of mirrors.
    3. ``downloads`` bounds how many blobs are fetched at the same time, besides configurations. ``patience`` is the
       longest time without progress, in seconds.
    """

    def __init__(
        self,
        reference: Reference,
        hosts: Sequence[RegistryHost],
        keyring: Keyring,
        downloads: asyncio.Semaphore,
        patience: float,
        platform: Platform,
        lookups: Lookups,
    ) -> None:
        self._platform = platform
        self.name = f"image {reference}"
        self.origin = reference.domain
        self._reference = reference
        self._hosts = hosts
        self._downloads = downloads
        self._patience = patience
        self._idle = patience / _CONNECTIONS
        self._transport = Transport(lookups)
        authorizer = Authorizer(keyring, self._fetch_token, f"repository:{reference.path}:pull")
        self._exchange = Exchange(self._transport, authorizer, reference.path)
        self._reached: set[RegistryHost] = set()
        self._unreachable: dict[RegistryHost, UnavailableError] = {}
        self._resolved: dict[str, bytes] = {}

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._transport.__aexit__(kind, error, traceback)

    async def peek(self) -> Descriptor | None:
        """The manifest or index that the reference means now, by HEAD; None if no host says it.

        Registries that limit pulls do not count HEAD requests.
        """
        wanted = self._reference.digest

        async def attempt(host: RegistryHost) -> Descriptor:
            name = wanted or f"{self._reference.tag}"
            async with self._exchange.get(
                host,
                f"manifests/{name}",
                {"Accept": _ACCEPT},
                idle=self._idle,
                total=self._idle,
                trusted=wanted is None,
                method="HEAD",
            ) as response:
                digest = response.headers.get("Docker-Content-Digest", "") if wanted is None else wanted
                if not is_digest(digest):
                    raise UnavailableError(f"manifests/{name}: HEAD tells no digest")
                return Descriptor(_media_type(response), digest, response.content_length or 0)

        try:
            return await self._from_any({PULL} if wanted else {PULL, RESOLVE}, attempt, Retries(0))
        except CriError:
            return None

    async def resolve(self) -> Descriptor:
        """The manifest or index that the reference means now.

        Raises NotFoundError, UnauthenticatedError, PermissionDeniedError, UnavailableError, DataLossError.
        """
        wanted = self._reference.digest
        capabilities = {PULL} if wanted else {PULL, RESOLVE}

        async def attempt(host: RegistryHost) -> tuple[Descriptor, bytes]:
            found, body = await self._fetch_manifest(host, wanted or f"{self._reference.tag}", wanted)
            if wanted is None:
                await self._check_usable(host, found, body)
            return found, body

        descriptor, body = await self._from_any(capabilities, attempt)
        self._resolved[descriptor.digest] = body
        return descriptor

    async def manifest(self, descriptor: Descriptor) -> bytes:
        """The body of a manifest or index, checked against its digest. Raises as :meth:`resolve`."""
        if descriptor.digest in self._resolved:
            return self._resolved[descriptor.digest]

        async def attempt(host: RegistryHost) -> tuple[Descriptor, bytes]:
            return await self._fetch_manifest(host, descriptor.digest, descriptor.digest)

        return (await self._from_any({PULL}, attempt))[1]

    async def blob(
        self,
        descriptor: Descriptor,
        content: ContentStore,
        watcher: Watcher | None = None,
        *,
        at_once: bool = False,
    ) -> None:
        """Bring a blob of the repository into ``content``, checked against its size and digest.

        A blob that is needed ``at_once`` is not one of those that ``downloads`` bounds.

        Raises as :meth:`resolve`, and ResourceExhaustedError if the disk is full.
        """
        retries = Retries(self._patience)
        slot = nullcontext() if at_once else self._downloads
        async with content.ingest(descriptor.digest, watcher) as ingest:
            download = Download(self._exchange, descriptor, ingest, self._idle)

            async def attempt(host: RegistryHost) -> None:
                queued = time.monotonic()
                async with slot:
                    retries.forgive(time.monotonic() - queued)
                    try:
                        await download.attempt(host)
                    finally:
                        if download.progressed():
                            retries.progressed()

            await self._from_any({PULL}, attempt, retries)

    async def _from_any(
        self, capabilities: set[str], attempt: Callable[[RegistryHost], Awaitable[_T]], retries: Retries | None = None
    ) -> _T:
        hosts = [host for host in self._hosts if host.capabilities >= capabilities]
        if not hosts:
            raise FailedPreconditionError(
                f"{self.name}: no host of {self.origin} is configured with the capabilities "
                f"{', '.join(sorted(capabilities))}"
            )
        retries = retries or Retries(self._patience)
        failures: dict[RegistryHost, CriError] = {}
        asked = hosts
        while True:
            for host in asked:
                if host.fallback and not self._is_plain_http(hosts[hosts.index(host) - 1]):
                    continue
                try:
                    return await self._ask(host, attempt, first=asked is hosts)
                except ResourceExhaustedError:
                    raise  # the node is at fault, so no other host helps
                except CriError as e:
                    failures[host] = e
            again = {h: e.after for h, e in failures.items() if isinstance(e, TryAgainError) and e.after <= MAX_WAIT}
            last = list(failures.values())[-1]
            if not again or not isinstance(last, UnavailableError) or not await retries.wait(max(again.values())):
                kind = UnavailableError if isinstance(last, UnavailableError) else type(last)
                raise kind(f"{self.name}: {self._all_errors(failures)}") from last
            asked = list(again)

    def _all_errors(self, failures: Mapping[RegistryHost, CriError]) -> str:
        """The errors of all hosts, the one that says most first."""
        asked_without_tls = {self._hosts[self._hosts.index(host) - 1] for host in failures if host.fallback}
        hosts = [host for host in failures if host not in asked_without_tls]
        hosts.sort(key=lambda host: (host in self._unreachable, not host.origin))
        return "; and ".join(f"{host.url}: {failures[host]}" for host in hosts)

    async def _ask(self, host: RegistryHost, attempt: Callable[[RegistryHost], Awaitable[_T]], *, first: bool) -> _T:
        """One attempt at one host.

        A host that could not be connected to, or that has not answered, is not asked again in the ``first`` round of a
        later request, as that may take a whole timeout. One without a connection is asked again later only if a
        connection has succeeded before.
        """
        if first and host in self._unreachable:
            raise self._unreachable[host]
        try:
            found = await attempt(host)
        except CriError as e:
            _log.info("registry host failed", image=str(self._reference), host=host.url, error=str(e))
            if isinstance(e, NotConnectedError):
                if host in self._reached:
                    self._unreachable[host] = TryAgainError(str(e))
                    raise self._unreachable[host] from e
                self._unreachable[host] = e
                raise
            if isinstance(e, SilentError):
                self._unreachable[host] = e
                raise
            self._has_been_reached(host)
            raise
        self._has_been_reached(host)
        return found

    def _has_been_reached(self, host: RegistryHost) -> None:
        self._reached.add(host)
        self._unreachable.pop(host, None)

    def _is_plain_http(self, host: RegistryHost) -> bool:
        error = self._unreachable.get(host)
        return isinstance(error, NotConnectedError) and error.plain

    async def _fetch_manifest(self, host: RegistryHost, name: str, digest: str | None) -> tuple[Descriptor, bytes]:
        headers = {"Accept": _ACCEPT}
        async with self._exchange.get(
            host, f"manifests/{name}", headers, idle=self._idle, total=self._patience, trusted=digest is None
        ) as response:
            body = await read_bounded(response, MAX_MANIFEST, f"manifest {name}")
            stated = response.headers.get("Docker-Content-Digest", "") if digest is None else digest
            found = digest_of(body, stated)
            if found != stated and is_digest(stated):
                raise DataLossError(f"manifest {name}: the content received has digest {found}, not {stated}")
            return Descriptor(_media_type(response), found, len(body)), body

    async def _check_usable(self, host: RegistryHost, found: Descriptor, body: bytes) -> None:
        """Check what a host has sent for a tag: no digest proves it, and another host may have the image.

        1. It must be a manifest, or an index with this node's platform.
        2. A mirror's manifest must be of an image for this node's platform.

        Raises InvalidArgumentError, UnimplementedError, NotFoundError.
        """
        what = f"manifest {found.digest}"
        parsed = parse_manifest(body, found.media_type, what)
        if isinstance(parsed, Index):
            choose(parsed, self._platform, what)
            return
        config = parsed.config
        if host == self._hosts[-1] or config.size > MAX_CONFIG:
            return
        async with self._exchange.get(
            host, f"blobs/{config.digest}", {}, idle=self._idle, total=self._patience
        ) as response:
            sent = await read_bounded(response, MAX_CONFIG, f"configuration {config.digest}")
        if digest_of(sent, config.digest) != config.digest:
            return  # it is fetched again from all hosts, and checked then
        platform = parse_config(sent, f"configuration {config.digest}").platform
        if not runs_on(platform, self._platform):
            raise NotFoundError(f"{what} is for {platform}; this node runs {self._platform}")

    async def _fetch_token(self, host: RegistryHost, wanted: TokenRequest, credentials: Credentials | None) -> Token:
        return await fetch_token(self._transport, host, wanted, credentials)


def _media_type(response: aiohttp.ClientResponse) -> str:
    return response.headers.get("Content-Type", "").partition(";")[0].strip()
