"""Bodies of HTTP responses that are sent with a Content-Encoding, though the request asks for none.

gzip and deflate (RFC 9110, section 8.4.1), as in containerd. A registry may also say "gzip" of a blob that is a gzip
file itself, and send it as it is: only the digest tells, so a download that fails one way is tried the other way.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

from criserver.errors import DataLossError, InvalidArgumentError

_PIECE = 256 << 10
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}


def coding_of(headers: Mapping[str, str]) -> str:
    """The coding in a response's headers, which :class:`Decoder` knows; "" for none or another one."""
    coding = headers.get("Content-Encoding", "").strip().lower()
    return coding if coding in _WINDOW_BITS else ""


class Decoder:
    """Decodes a body. Its output comes in pieces of bounded size."""

    def __init__(self, coding: str) -> None:
        self._inflater = zlib.decompressobj(_WINDOW_BITS[coding])

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """The next content. Raises DataLossError for bytes that do not have the coding."""
        try:
            while data:
                if self._inflater.eof:
                    raise DataLossError("more comes after the end of the compressed body")
                yield self._inflater.decompress(data, _PIECE)
                data = self._inflater.unconsumed_tail or self._inflater.unused_data
        except zlib.error as e:
            raise DataLossError(f"the compressed body cannot be read: {e}") from e


def decoded(body: bytes, coding: str, limit: int, what: str) -> bytes:
    """A small body without its coding. A body that does not have that coding is returned as it is.

    Raises InvalidArgumentError if it is larger than ``limit`` bytes.
    """
    found = bytearray()
    try:
        for piece in Decoder(coding).pieces(body):
            found += piece
            if len(found) > limit:
                raise InvalidArgumentError(f"{what} is larger than {limit} bytes")
    except DataLossError:
        return body
    return bytes(found)
