"""The download of one blob. It may take several attempts and hosts; each attempt goes on where the last one stopped."""

from __future__ import annotations

import asyncio
import re

import aiohttp

from criserver.errors import DataLossError
from criserver.images.content import Ingest
from criserver.images.content_codings import Decoder, coding_of
from criserver.images.exchange import Exchange
from criserver.images.hosts import RegistryHost
from criserver.images.manifests import Descriptor
from criserver.images.retries import TryAgainError
from criserver.numbers import decimal
from criserver.telemetry import families

# Fewer bytes are no progress: a server that sends a byte a second must not keep a download going.
MIN_PROGRESS = 16 << 10
# Bytes of an encoded body above twice the blob's size. A body without content could go on for ever.
_CODING_ROOM = 1 << 20

_RANGE = re.compile(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)")


class Download:
    """Brings the blob ``descriptor`` into ``ingest``, and commits it.

    ``idle`` is the longest time without progress in one attempt, in seconds.
    """

    def __init__(self, exchange: Exchange, descriptor: Descriptor, ingest: Ingest, idle: float) -> None:
        self._exchange = exchange
        self._descriptor = descriptor
        self._ingest = ingest
        self._idle = idle
        self._best = 0
        self._coded = False  # whether a response of the present attempt had a Content-Encoding

    def progressed(self) -> bool:
        """Whether there was progress since the last call."""
        if self._ingest.size < self._best + MIN_PROGRESS:
            return False
        self._best = self._ingest.size
        return True

    async def attempt(self, host: RegistryHost) -> None:
        """Fetch the missing part from ``host``.

        Raises as Exchange.get, DataLossError if the host has other content, ResourceExhaustedError.
        """
        resumed = self._ingest.size > 0
        self._coded = False
        try:
            await self._fetch(host)
        except DataLossError:
            await self._ingest.reset()
            if not resumed and not self._coded:
                raise
            # 1. The part that an earlier attempt has brought, from another host, may be the wrong one.
            # 2. A body with a Content-Encoding is taken the other way: as it is, or decoded.
            await self._fetch(host, other_way=self._coded)
        except BaseException:
            if self._coded:
                await self._ingest.reset()  # a range would be one of the encoded bytes
            raise

    async def _fetch(self, host: RegistryHost, *, other_way: bool = False) -> None:
        if not self._ingest.size or self._ingest.size < self._descriptor.size:
            await self._ask(host, other_way=other_way)
        await self._ingest.commit(self._descriptor.digest)

    async def _ask(self, host: RegistryHost, *, other_way: bool) -> None:
        """Ask for what is missing."""
        digest, size, offset = self._descriptor.digest, self._descriptor.size, self._ingest.size
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        async with self._exchange.get(host, f"blobs/{digest}", headers, idle=self._idle) as response:
            coding = coding_of(response.headers)
            self._coded = self._coded or bool(coding)
            if coding and offset and response.status == 206:
                raise DataLossError(f"blob {digest}: the server sends a range of a compressed body")
            # A body of the blob's own size is the blob itself.
            decode = bool(coding) and (response.content_length != size) != other_way
            await self._receive(response, offset, Decoder(coding) if decode else None, host.authority)
        if self._ingest.size < size:
            if self._coded:
                raise DataLossError(f"blob {digest} ended after {self._ingest.size} of {size} bytes")
            raise TryAgainError(f"blob {digest} ended after {self._ingest.size} of {size} bytes")

    async def _receive(self, response: aiohttp.ClientResponse, offset: int, decoder: Decoder | None, host: str) -> None:
        digest, size = self._descriptor.digest, self._descriptor.size
        skip = 0
        if response.status == 206 and (offset or "Content-Range" in response.headers):
            self._check_range(response, offset)
        else:
            skip = offset  # the server does not support ranges
        loop = asyncio.get_running_loop()
        taken, mark = 0, MIN_PROGRESS
        async with asyncio.timeout(self._idle) as timer:
            async for chunk in response.content.iter_any():
                taken += len(chunk)
                if decoder and taken > 2 * size + _CODING_ROOM:
                    raise DataLossError(f"blob {digest} of {size} bytes does not end after {taken} encoded bytes")
                families.DOWNLOADED.add(len(chunk), host)
                for piece in decoder.pieces(chunk) if decoder else (chunk,):
                    wanted, skip = piece[skip:], max(0, skip - len(piece))
                    if self._ingest.size + len(wanted) > size:
                        raise DataLossError(f"blob {digest} is longer than its {size} bytes")
                    if wanted:
                        await self._ingest.write(wanted)
                if taken >= mark:
                    mark = taken + MIN_PROGRESS
                    timer.reschedule(loop.time() + self._idle)

    def _check_range(self, response: aiohttp.ClientResponse, offset: int) -> None:
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if (
            found is None
            or decimal(found[1], self._descriptor.size) != offset
            or found[2] not in ("*", str(self._descriptor.size))
        ):
            raise DataLossError(
                f"blob {self._descriptor.digest}: asked for what comes after {offset} of {self._descriptor.size} "
                f"bytes, and the server sends {response.headers.get('Content-Range', 'something')[:100]!r}"
            )
