"""Digests: the names of blobs, made of their content (OCI image-spec, descriptor, "Digests").

A digest is ``sha256:`` and 64 hexadecimal digits, or ``sha512:`` and 128. These are the algorithms that the
specification registers for all implementations. Pure functions.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hashlib import _Hash

ALGORITHMS: dict[str, Callable[[], _Hash]] = {"sha256": hashlib.sha256, "sha512": hashlib.sha512}
CANONICAL = "sha256"  # for what gets its digest here

_DIGEST = re.compile("|".join(f"{name}:[0-9a-f]{{{2 * new().digest_size}}}" for name, new in ALGORITHMS.items()))


def is_digest(text: str) -> bool:
    """Whether ``text`` is a digest. Image IDs have this form too."""
    return _DIGEST.fullmatch(text) is not None


def new_hash(like: str = "") -> _Hash:
    """A hash of the algorithm of the digest ``like``, and of the canonical one where that is no digest."""
    return ALGORITHMS.get(algorithm(like), ALGORITHMS[CANONICAL])()


def written(computed: _Hash) -> str:
    """What a hash has found, as descriptors write it."""
    return f"{computed.name}:{computed.hexdigest()}"


def digest_of(data: bytes, like: str = "") -> str:
    """The digest of ``data``, by the algorithm that :func:`new_hash` takes."""
    found = new_hash(like)
    found.update(data)
    return written(found)


def algorithm(digest: str) -> str:
    """The name of the algorithm that a digest was made by."""
    return digest.partition(":")[0]


def digits(digest: str) -> str:
    """The hexadecimal digits of a digest, or of a beginning of one, which may lack the algorithm."""
    return digest.partition(":")[2] if algorithm(digest) in ALGORITHMS else digest


def begins_with(digest: str, start: str) -> bool:
    """Whether ``start`` is the beginning of ``digest``, or the beginning of its hexadecimal digits."""
    return digest.startswith(start) if ":" in start else digits(digest).startswith(start)
