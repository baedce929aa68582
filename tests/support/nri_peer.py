"""The plugin's side of one connection, for tests of a plugin's calls and of all plugins together."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from criserver.config import Nri, load
from criserver.nri.multiplexer import PLUGIN_SERVICE, RUNTIME_SERVICE, Multiplexer
from criserver.nri.plugin import Plugin
from criserver.pb.nri.v1alpha1 import api_pb2 as nri
from criserver.ttrpc import Handler, TtrpcClient, TtrpcServer

SERVICE, RUNTIME = "nri.pkg.api.v1alpha1.Plugin", "nri.pkg.api.v1alpha1.Runtime"


def settings(**changes: Any) -> Nri:
    given = load(None).nri
    fields = {name: getattr(given, name) for name in Nri.__slots__}
    return Nri(**{**fields, **changes})


class Peer:
    """The plugin's side."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.multiplexer = Multiplexer(reader, writer)
        self.handlers: dict[tuple[str, str], Handler] = {}
        self.server = TtrpcServer(self.multiplexer.open(PLUGIN_SERVICE), self.handlers)
        self.client = TtrpcClient(self.multiplexer.open(RUNTIME_SERVICE))
        self.asked: list[Any] = []

    def answer(self, method: str, kind: Any, answer: Callable[[Any], Any]) -> None:
        async def handle(payload: bytes) -> bytes:
            request = kind.FromString(payload)
            self.asked.append(request)
            response = answer(request)
            return response if isinstance(response, bytes) else response.SerializeToString()

        self.handlers[SERVICE, method] = handle

    async def register(self, index: str = "10", name: str = "peer") -> None:
        request = nri.RegisterPluginRequest(plugin_idx=index, plugin_name=name)
        await self.client.call(RUNTIME, "RegisterPlugin", request.SerializeToString())


async def no_update(plugin: Plugin, request: nri.UpdateContainersRequest) -> nri.UpdateContainersResponse:
    return nri.UpdateContainersResponse()


@asynccontextmanager
async def connected(**changes: Any) -> AsyncIterator[tuple[Plugin, Peer, asyncio.Task[None], asyncio.Event]]:
    ours, theirs = socket.socketpair()
    patient = {"plugin_registration_timeout": 60.0, "plugin_request_timeout": 60.0}  # also on a busy machine
    plugin = Plugin(*await asyncio.open_connection(sock=ours), settings(**{**patient, **changes}), no_update)
    peer = Peer(*await asyncio.open_connection(sock=theirs))
    peer.answer("Configure", nri.ConfigureRequest, lambda _: nri.ConfigureResponse())
    started = asyncio.Event()

    async def join(_plugin: Plugin) -> None:
        started.set()

    serving = asyncio.create_task(plugin.serve(join))
    tasks = [asyncio.create_task(peer.server.serve()), asyncio.create_task(peer.multiplexer.run())]
    try:
        yield plugin, peer, serving, started
    finally:
        peer.multiplexer.close()
        await asyncio.wait([serving, *tasks])
        await peer.client.wait_closed()
