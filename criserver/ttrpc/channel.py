"""What a ttrpc connection reads from and writes to."""

from __future__ import annotations

import asyncio
from typing import Protocol


class ByteChannel(Protocol):
    """A connection of bytes: a socket, or a part of one that carries several connections."""

    async def read(self) -> bytes:
        """Some bytes, b"" at the end. Raises OSError."""

    def write(self, data: bytes) -> None:
        """Send one message without waiting. Nothing is raised for a connection that has ended."""

    async def drain(self) -> None:
        """Wait until there is room for the next message. Raises OSError."""

    def close(self) -> None:
        """Close it, also while the peer does not read. ``read`` returns b"" from now on."""


class StreamChannel:
    """A channel over asyncio's streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self) -> bytes:
        """Some bytes, b"" at the end. Raises OSError."""
        return await self._reader.read(65536)

    def write(self, data: bytes) -> None:
        """Send one message without waiting."""
        if not self._writer.is_closing():
            self._writer.write(data)

    async def drain(self) -> None:
        """Wait until there is room for the next message. Raises OSError."""
        await self._writer.drain()

    def close(self) -> None:
        """Close the socket. What is not sent yet is dropped: a peer that does not read could hold up the end."""
        self._writer.transport.abort()
