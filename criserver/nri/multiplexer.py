"""Several connections of bytes over one socket, as NRI has them (pkg/net/multiplex of github.com/containerd/nri).

A frame is 4 bytes of connection ID, 4 bytes of length, both big-endian, and the data. Connection 1 is for calls to the
plugin, 2 for calls of the plugin to the runtime. Nothing is sent to open one.
"""

from __future__ import annotations

import asyncio
import struct

from criserver.ttrpc import MAX_PAYLOAD

PLUGIN_SERVICE, RUNTIME_SERVICE = 1, 2

_HEAD = struct.Struct(">II")
_MAX_FRAME = MAX_PAYLOAD + 10  # a whole ttrpc frame
# NRI's own library reads a connection through a buffer of this size. It can take a frame that is larger only as the
# rest of one ttrpc message, whose beginning came in a frame of this size.
_BUFFER = 4096
# Bytes of one connection that are not read yet, above which nothing is read from the socket.
_MAX_UNREAD = 8 << 20


class Multiplexer:
    """One side of the socket. Open all connections before :meth:`run`: data of others is dropped."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._channels: dict[int, MultiplexedChannel] = {}
        self.closed = False

    def open(self, connection: int) -> MultiplexedChannel:
        """The channel of a connection."""
        channel = self._channels[connection] = MultiplexedChannel(self, connection)
        return channel

    async def run(self) -> str:
        """Read until the end, and return its reason."""
        try:
            while not self.closed:
                connection, size = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
                if size > _MAX_FRAME:
                    return f"a frame of {size} bytes, more than {_MAX_FRAME}"
                data = await self._reader.readexactly(size)
                channel = self._channels.get(connection)
                if channel is not None and data:
                    await channel.take(data)
        except asyncio.IncompleteReadError:
            return "the peer closed it"
        except OSError as error:
            return f"reading failed: {error}"
        finally:
            self.close()
        return "it was closed"

    def send(self, connection: int, data: bytes) -> None:
        """Send one message, without waiting."""
        if self.closed:
            return
        for part in filter(None, (data[:_BUFFER], data[_BUFFER:])):
            self._writer.write(_HEAD.pack(connection, len(part)) + part)

    async def drain(self) -> None:
        """Wait until there is room for the next message. Raises OSError."""
        await self._writer.drain()

    def close(self) -> None:
        """Close the socket and all channels."""
        if not self.closed:
            self.closed = True
            self._writer.transport.abort()
            for channel in self._channels.values():
                channel.end()


class MultiplexedChannel:
    """One connection. To close it closes the whole multiplexer: neither side can do without the other connection."""

    def __init__(self, multiplexer: Multiplexer, connection: int) -> None:
        self._multiplexer = multiplexer
        self._connection = connection
        # One buffer, and not a list of what has come: an object for each byte would take fifty bytes.
        self._unread = bytearray()
        self._changed = asyncio.Event()

    async def take(self, data: bytes) -> None:
        """Add what has come, and wait while too much is not read yet."""
        self._unread += data
        self._changed.set()
        while len(self._unread) > _MAX_UNREAD and not self._multiplexer.closed:
            self._changed.clear()
            await self._changed.wait()

    def end(self) -> None:
        """Wake up who waits: the multiplexer is closed."""
        self._changed.set()

    async def read(self) -> bytes:
        """All bytes that have come, b"" at the end."""
        while not self._unread:
            if self._multiplexer.closed:
                return b""
            self._changed.clear()
            await self._changed.wait()
        data = bytes(self._unread)
        self._unread.clear()
        self._changed.set()
        return data

    def write(self, data: bytes) -> None:
        """Send one message without waiting."""
        self._multiplexer.send(self._connection, data)

    async def drain(self) -> None:
        """Wait until there is room for the next message. Raises OSError."""
        await self._multiplexer.drain()

    def close(self) -> None:
        """Close the multiplexer."""
        self._multiplexer.close()
