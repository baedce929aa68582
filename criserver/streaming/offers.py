"""What was promised to clients: addresses that work once, and not for long."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from typing import Generic, TypeVar

from criserver.errors import ResourceExhaustedError

_Offer = TypeVar("_Offer")

# Seconds. The kubelet connects at once; a person may paste an address.
LIFETIME = 60.0
LIMIT = 1000


class Offers(Generic[_Offer]):
    """Offers by their tokens, oldest first."""

    def __init__(self) -> None:
        self._offers: OrderedDict[str, tuple[float, _Offer]] = OrderedDict()

    def add(self, offer: _Offer) -> str:
        """The token that :meth:`take` gives the offer for, once. Raises ResourceExhaustedError for too many."""
        now = time.monotonic()
        while self._offers and next(iter(self._offers.values()))[0] <= now:
            self._offers.popitem(last=False)
        if len(self._offers) >= LIMIT:
            raise ResourceExhaustedError(f"{LIMIT} streaming requests wait for their clients; try again later")
        token = secrets.token_urlsafe(16)
        self._offers[token] = (now + LIFETIME, offer)
        return token

    def take(self, token: str) -> _Offer | None:
        """The offer, or None where there is no such token any more; all tokens are of one length and random."""
        expires, offer = self._offers.pop(token, (0.0, None))
        return offer if expires > time.monotonic() else None
