"""The heads of HTTP responses that Go's client takes and aiohttp's parser refuses, made regular before it reads them.

A registry is used by clients in Go, so its faults that Go does not mind stay. What is changed (RFC 9112, section 6.3):

1. Equal Content-Length headers become one.
2. A Content-Length beside "Transfer-Encoding: chunked" is left out: the chunks count.
3. White space between a header's name and its colon is left out (section 5.1).
4. What comes after the body of a Content-Length is left out.

After such a response the connection is closed, as its end may be disputed. All else is left to the parser.
"""

from __future__ import annotations

import asyncio
import functools
import re
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError

MAX_HEAD = 2 << 20  # bytes; Go's client takes 10 MiB; proxies and signed URLs make a few hundred KiB at most
MAX_HEADERS = 20_000
_MAX_INFORMATIONAL = 5  # before a response, as in Go's client
_END = re.compile(rb"\r?\n\r?\n")
_INFORMATIONAL = re.compile(rb"HTTP/1\.[01] 1(?!01)\d\d")
_FOLDED = (b" ", b"\t")
_LENGTH = re.compile(rb"\n(?i:content-length):[ \t]*([0-9]{1,18})[ \t]*(?:\r?\n|\Z)")
_CODING = re.compile(rb"\n(?i:transfer-encoding):")


def regular_head(head: bytes) -> tuple[bytes, bool]:
    """A response's head, without the empty line after it, as a parser wants it, and whether anything was changed."""
    if head.count(b"\n") > MAX_HEADERS:
        return head, False  # the parser refuses it
    given = [line.removesuffix(b"\r") for line in head.split(b"\n")]
    if any(line.startswith(_FOLDED) for line in given):
        return head, False
    lines = [given[0], *map(_without_space, given[1:])]
    names = [line.partition(b":")[0].strip().lower() for line in lines]
    lengths = [n for n, name in enumerate(names) if name == b"content-length"]
    codings = [n for n, name in enumerate(names) if name == b"transfer-encoding"]
    left_out: set[int] = set()
    if len(codings) == 1 and _value(lines[codings[0]]).lower() == b"chunked" and lines[0].startswith(b"HTTP/1.1"):
        left_out.update(lengths)
    elif len({_value(lines[n]) for n in lengths}) == 1:
        left_out.update(lengths[1:])
    if not left_out and lines == given:
        return head, False
    return b"\r\n".join(line for n, line in enumerate(lines) if n not in left_out), True


def _without_space(line: bytes) -> bytes:
    name, colon, value = line.partition(b":")
    return name.rstrip(b" \t") + colon + value


def length_of(head: bytes) -> int | None:
    """How many bytes the body has after a regular head; None if the head does not say it."""
    found = _LENGTH.search(head)
    return int(found[1]) if found and not _CODING.search(head) else None


def _value(line: bytes) -> bytes:
    return line.partition(b":")[2].strip()


class LenientConnector(aiohttp.TCPConnector):
    """Makes connections that are LenientHandlers. aiohttp has no public parameter for it. ``options`` are its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._factory = functools.partial(_new_handler, loop=self._loop)


def _new_handler(loop: asyncio.AbstractEventLoop) -> ResponseHandler:
    return LenientHandler(loop)


class LenientHandler(ResponseHandler):
    """A connection whose responses' heads are made regular. There is one response at a time.

    A head has to be whole before the connection's timeout for reads: its bytes are no progress.
    """

    _head: bytearray | None = None
    _informational = 0
    _left: int | None = None  # bytes of the body that are still to come; None if the head does not say it

    def set_response_params(self, **options: Any) -> None:
        """Expect a response."""
        self._head = bytearray()
        self._informational = 0
        self._left = None
        super().set_response_params(**options)

    def data_received(self, data: bytes) -> None:
        """Take the next bytes of the response. Its head is kept until it is whole, up to MAX_HEAD bytes."""
        if self._head is None or not data:
            super().data_received(self._body(data))
            return
        at = max(0, len(self._head) - 3)
        self._head += data
        while (end := _END.search(self._head, at)) is not None:
            head = bytes(self._head[: end.start()])
            if not _INFORMATIONAL.match(head):
                rest = bytes(self._head[end.end() :])
                self._head = None
                regular, changed = regular_head(head)
                if changed:
                    self.force_close()
                self._left = length_of(regular)
                super().data_received(regular + end[0] + self._body(rest))
                return
            # Another head comes after this one.
            self._informational += 1
            if self._informational > _MAX_INFORMATIONAL:
                self._refuse(f"more than {_MAX_INFORMATIONAL} informational responses")
                return
            at = 0
            self._head = self._head[end.end() :]
            super().data_received(head + end[0])
        if len(self._head) > MAX_HEAD:
            # The parser's own limit is for one header.
            self._refuse(f"a head of more than {MAX_HEAD} bytes")

    def _body(self, data: bytes) -> bytes:
        """The part of ``data`` that is of the body."""
        if self._left is None:
            return data
        body = data[: self._left]
        self._left -= len(body)
        if len(body) < len(data):
            self.force_close()
        return body

    def _refuse(self, reason: str) -> None:
        self._head = None
        if self.transport is not None:
            self.transport.close()
        self.set_exception(HttpProcessingError(message=reason))

    def connection_lost(self, exc: BaseException | None) -> None:
        """Give the parser what has come of a head that is not whole: it says what is wrong."""
        if self._head:
            kept, self._head = bytes(self._head), None
            super().data_received(kept)
        super().connection_lost(exc)
