"""Offers to clients: each has an address that works once, and for a short time."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from typing import Generic, TypeVar

from criserver.errors import ResourceExhaustedError

_Offer = TypeVar("_Offer")

# Seconds. The kubelet connects at once, but a person may paste an address.
LIFETIME = 60.0
LIMIT = 1000


class Offers(Generic[_Offer]):
    """Offers by their random tokens, oldest first."""

    def __init__(self) -> None:
        self._offers: OrderedDict[str, tuple[float, _Offer]] = OrderedDict()

    def add(self, offer: _Offer) -> str:
        """Keep an offer, and return its token for :meth:`take`. Raises ResourceExhaustedError for too many."""
        now = time.monotonic()
        while self._offers and next(iter(self._offers.values()))[0] <= now:
            self._offers.popitem(last=False)
        if len(self._offers) >= LIMIT:
            raise ResourceExhaustedError(f"{LIMIT} streaming requests wait for their clients; try again later")
        token = secrets.token_urlsafe(16)
        self._offers[token] = (now + LIFETIME, offer)
        return token

    def take(self, token: str) -> _Offer | None:
        """The offer of a token, once; None for a token that is unknown, used or too old."""
        expires, offer = self._offers.pop(token, (0.0, None))
        return offer if expires > time.monotonic() else None
