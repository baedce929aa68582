"""Offers to clients, a command or ports of a pod: each has an address that works once, and for a short time."""

from __future__ import annotations

import secrets
import socket
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from criserver.errors import ResourceExhaustedError
from criserver.streaming.remotecommand import RequestedStreams, ResizeDecoder, TerminalSize

if TYPE_CHECKING:
    from criserver.streaming.client_stream import ClientStream

# Seconds. The kubelet connects at once, but a person may paste an address.
LIFETIME = 60.0
LIMIT = 1000


@dataclass(frozen=True, slots=True)
class CommandStreams:
    """The client's streams of a command; None for a stream that the client did not ask for."""

    stdin: ClientStream | None
    stdout: ClientStream | None
    stderr: ClientStream | None
    resize: ClientStream | None

    async def sizes(self) -> AsyncIterator[TerminalSize]:
        """The sizes of the client's terminal, as they change."""
        if self.resize is None:
            return
        decoder = ResizeDecoder()
        while data := await self.resize.read():
            if (size := decoder.feed(bytes(data))) is not None:
                yield size


@dataclass(frozen=True, slots=True)
class Command:
    """Exec or attach: ``run`` returns the exit code. It raises CriError where the command has none."""

    requested: RequestedStreams
    run: Callable[[CommandStreams], Awaitable[int]]


@dataclass(frozen=True, slots=True)
class Forward:
    """Port forwarding: ``dial`` returns a connected socket, which does not block, for a port of the pod.

    ``ports`` are for clients of a plain WebSocket, which cannot name a port.
    """

    ports: Sequence[int]
    dial: Callable[[int], Awaitable[socket.socket]]


Offer = Command | Forward


class Offers:
    """Offers by their random tokens, oldest first."""

    def __init__(self) -> None:
        self._offers: OrderedDict[str, tuple[float, Offer]] = OrderedDict()

    def add(self, offer: Offer) -> str:
        """Keep an offer, and return its token for :meth:`take`. Raises ResourceExhaustedError for too many."""
        now = time.monotonic()
        while self._offers and next(iter(self._offers.values()))[0] <= now:
            self._offers.popitem(last=False)
        if len(self._offers) >= LIMIT:
            raise ResourceExhaustedError(f"{LIMIT} streaming requests wait for their clients; try again later")
        token = secrets.token_urlsafe(16)
        self._offers[token] = (now + LIFETIME, offer)
        return token

    def take(self, token: str) -> Offer | None:
        """The offer of a token, once; None for a token that is unknown, used or too old."""
        expires, offer = self._offers.pop(token, (0.0, None))
        return offer if expires > time.monotonic() else None
