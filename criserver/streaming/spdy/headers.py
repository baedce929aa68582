"""Header blocks: names and values, one zlib stream in each direction (SPDY Protocol Draft 3.1, section 2.6.10)."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable

from criserver.streaming.spdy.frames import ConnectionFault, GoAwayStatus, LocalError, Status, StreamFault

Pairs = tuple[tuple[str, str], ...]
"""Headers in their order. A name is in lower case and comes once for each of its values."""

# The dictionary's strings: each gets its length before it, and an underline is a space. Then the dictionary's text.
_WORDS = """
options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow
authorization cache-control connection content-base content-encoding content-language content-length content-location
content-md5 content-range content-type date etag expect expires from host if-match if-modified-since if-none-match
if-range if-unmodified-since last-modified location max-forwards pragma proxy-authenticate proxy-authorization range
referer retry-after server te trailer transfer-encoding upgrade user-agent vary via warning www-authenticate method
get status 200_OK version HTTP/1.1 url public set-cookie keep-alive origin
"""

_TEXT = (
    b"100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 Non-Authoritative "
    b"Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not Found500 "
    b"Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec "
    b"00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,"
    b"application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8"
    b"charset=iso-8859-1,utf-,*,enq=0."
)


def _string(text: bytes) -> bytes:
    return len(text).to_bytes(4, "big") + text


DICTIONARY = b"".join(_string(word.replace("_", " ").encode()) for word in _WORDS.split()) + _TEXT
"""The zlib dictionary of both sides (section 2.6.10.1)."""

_ZLIB_HEAD = b"\x78\xbb" + zlib.adler32(DICTIONARY).to_bytes(4, "big")
_SYNC_FLUSH = b"\x00\x00\xff\xff"
_ZLIB_WINDOW = 32 * 1024
_STORED = 0xFFFF
_MOST = 1 << 20

# Printable ASCII without a space and without capitals.
_NAME = re.compile(rb"[!-@\[-~]+")


class HeaderEncoder:
    """Header blocks to one peer, as one zlib stream.

    They are stored blocks: valid zlib without compression. The only state is whether the stream has begun. The cost is
    low, because this side's headers are few and short.
    """

    __slots__ = ("_begun",)

    def __init__(self) -> None:
        self._begun = False

    def encode(self, headers: Iterable[tuple[str, str]]) -> bytes:
        """The block as zlib. Raises LocalError for a name or value that SPDY does not allow, and for headers that are
        larger than any peer accepts."""
        text = join_pairs(headers)
        if len(text) > _MOST:
            raise LocalError(f"headers of {len(text)} bytes are more than {_MOST} bytes")
        pieces = [] if self._begun else [_ZLIB_HEAD]
        self._begun = True
        for start in range(0, len(text), _STORED):
            part = text[start : start + _STORED]
            pieces += (b"\x00", struct.pack("<HH", len(part), len(part) ^ _STORED), part)
        return b"".join((*pieces, b"\x00", _SYNC_FLUSH))


class HeaderDecoder:
    """Header blocks from one peer: one zlib stream, with a flush to a byte's boundary after each block.

    Because of the flush, a block can be decompressed by itself if the text before it is known. So only that text is
    kept between blocks: a few hundred bytes for a peer like kubectl. zlib would keep 32 KiB and its tables.
    """

    __slots__ = ("_text",)

    def __init__(self) -> None:
        self._text: bytes | None = None

    def decode(self, block: bytes, limit: int) -> bytes:
        """The decompressed block. Raises ConnectionFault for invalid zlib and for more than ``limit`` bytes: the blocks
        behind it cannot be decompressed then."""
        if not block:  # a block without headers may be left out (section 2.6.7)
            return b"\x00\x00\x00\x00"
        before = self._text
        if before is None:
            head = int.from_bytes(block[:2], "big")
            if head & 0x0F20 != 0x0820 or head % 31 or block[2:6] != _ZLIB_HEAD[2:]:  # RFC 1950, section 2.2
                raise ConnectionFault(
                    GoAwayStatus.PROTOCOL_ERROR, "the first header block is not compressed with SPDY's dictionary"
                )
            before = b""
            block = block[6:]
        inflate = zlib.decompressobj(-zlib.MAX_WBITS, zdict=DICTIONARY + before)
        try:
            text = inflate.decompress(block, limit + 1)
        except zlib.error as error:
            raise ConnectionFault(
                GoAwayStatus.PROTOCOL_ERROR, f"a header block cannot be decompressed: {error}"
            ) from None
        if len(text) > limit:
            raise ConnectionFault(
                GoAwayStatus.PROTOCOL_ERROR, f"a header block has more than {limit} bytes when it is decompressed"
            )
        if inflate.eof or not block.endswith(_SYNC_FLUSH):
            raise ConnectionFault(GoAwayStatus.PROTOCOL_ERROR, "a header block does not end with a flush")
        self._text = (before + text)[-_ZLIB_WINDOW:]
        return text


def join_pairs(headers: Iterable[tuple[str, str]]) -> bytes:
    """A header block before its compression: names in lower case, all values of a name together.

    Raises LocalError where SPDY does not allow it:

    1. A name is empty or not printable ASCII.
    2. A value has a NUL, or a character that is not in Latin-1.
    3. One of several values of a name is empty.
    """
    merged: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        try:
            key, content = name.lower().encode("ascii"), value.encode("latin-1")
        except UnicodeEncodeError as error:
            raise LocalError(f"the header {name!r} = {value!r} cannot be sent: {error}") from None
        if not _NAME.fullmatch(key) or b"\x00" in content:
            raise LocalError(f"the header {name!r} = {value!r} cannot be sent: characters that SPDY does not allow")
        merged.setdefault(key, []).append(content)
    pieces = [len(merged).to_bytes(4, "big")]
    for key, contents in merged.items():
        if len(contents) > 1 and not all(contents):
            raise LocalError(f"the header {key.decode()!r} cannot be sent: one of its several values is empty")
        pieces += (_string(key), _string(b"\x00".join(contents)))
    return b"".join(pieces)


def split_pairs(text: bytes, limit: int) -> Pairs:
    """The headers in a decompressed block. Raises StreamFault, also for more than ``limit`` pairs."""
    count = int.from_bytes(text[:4], "big")
    if len(text) < 4 + 8 * count:
        raise StreamFault(Status.PROTOCOL_ERROR, f"a header block of {len(text)} bytes claims {count} headers")
    pairs: list[tuple[str, str]] = []
    names = set()
    at = 4
    for _ in range(count):
        name, at = _field(text, at)
        value, at = _field(text, at)
        if not _NAME.fullmatch(name):
            raise StreamFault(Status.PROTOCOL_ERROR, f"{name[:100]!r} is no name of a header")
        if name in names:
            raise StreamFault(Status.PROTOCOL_ERROR, f"the header {name[:100]!r} comes twice")
        names.add(name)
        key = name.decode()
        if b"\x00" not in value:
            pairs.append((key, value.decode("latin-1")))
            continue
        values = value.decode("latin-1").split("\x00")
        if not all(values):
            raise StreamFault(Status.PROTOCOL_ERROR, f"the header {name[:100]!r} has an empty value among several")
        pairs += [(key, part) for part in values]
    if at != len(text):
        raise StreamFault(Status.PROTOCOL_ERROR, f"the last header ends at {at} of {len(text)} bytes")
    if len(pairs) > limit:
        raise StreamFault(Status.FRAME_TOO_LARGE, f"{len(pairs)} headers, more than {limit}")
    return tuple(pairs)


def _field(text: bytes, at: int) -> tuple[bytes, int]:
    """A string that has its length before it, and the position after it, which may be beyond the text's end."""
    start = at + 4
    end = start + int.from_bytes(text[at:start], "big")
    return text[start:end], end
