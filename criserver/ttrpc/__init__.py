"""ttrpc, the RPC protocol of NRI plugins and of shims of version 2: without I/O, and over an asyncio stream.

client = TtrpcClient(StreamChannel(reader, writer))
answer = await client.call("package.Service", "Method", request.SerializeToString(), timeout=2)

server = TtrpcServer(StreamChannel(reader, writer), {("package.Service", "Method"): handler})
reason = await server.serve()
"""

from __future__ import annotations

from criserver.ttrpc.call_client import TtrpcClient
from criserver.ttrpc.call_server import Handler, TtrpcServer
from criserver.ttrpc.channel import ByteChannel, StreamChannel
from criserver.ttrpc.message_frames import MAX_PAYLOAD
from criserver.ttrpc.statuses import CallError, StatusCode

__all__ = [
    "MAX_PAYLOAD",
    "ByteChannel",
    "CallError",
    "Handler",
    "StatusCode",
    "StreamChannel",
    "TtrpcClient",
    "TtrpcServer",
]
