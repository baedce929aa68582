"""A plugin of the node (NRI): it connects to the real socket, keeps what it is told, and answers as a test says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from criserver.nri.multiplexer import PLUGIN_SERVICE, RUNTIME_SERVICE, Multiplexer
from criserver.pb.nri.v1alpha1 import api_pb2 as nri
from criserver.ttrpc import CallError, TtrpcClient, TtrpcServer
from tests.support.waiting import SLOWNESS, eventually

SERVICE = nri.DESCRIPTOR.services_by_name["Plugin"]
RUNTIME = nri.DESCRIPTOR.services_by_name["Runtime"].full_name

Answer = Callable[[Any], Message | None]


@dataclass(frozen=True)
class Told:
    """One request of the runtime."""

    method: str
    request: Any

    @property
    def pod(self) -> str:
        """The name of the pod, "" for a method that is of none."""
        return str(self.request.pod.name) if "pod" in self.request.DESCRIPTOR.fields_by_name else ""


class TestPlugin:
    """A plugin with its event loop in a thread. ``answers`` has a function for each method that says more."""

    __test__ = False

    def __init__(
        self, socket: str, index: str, name: str, events: int = 0, answers: Mapping[str, Answer] | None = None
    ) -> None:
        self._socket = socket
        self._index, self._name, self._events = index, name, events
        self.answers = dict(answers or {})
        self.told: list[Told] = []
        self.closed = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))
        self._multiplexer: Multiplexer
        self._client: TtrpcClient

    def start(self, *, register: bool = True) -> None:
        """Connect, and wait until the runtime has told of everything."""
        self._register = register
        self._thread.start()
        if register:
            eventually(lambda: any(t.method == "Synchronize" for t in self.told) or self.closed.is_set())

    def stop(self) -> None:
        """Close the connection."""
        self._loop.call_soon_threadsafe(lambda: self._multiplexer.close())
        self._thread.join(30 * SLOWNESS)
        assert not self._thread.is_alive()
        self._loop.close()

    def methods(self, pod: str = "") -> list[str]:
        """The methods that were called, of one pod by its name."""
        return [told.method for told in self.told if not pod or told.pod == pod]

    def requests(self, method: str) -> list[Any]:
        """The requests of one method."""
        return [t.request for t in self.told if t.method == method]

    def update(self, **fields: Any) -> Any:
        """Call UpdateContainers of the runtime."""
        request = nri.UpdateContainersRequest(**fields)
        call = self._client.call(RUNTIME, "UpdateContainers", request.SerializeToString(), timeout=60 * SLOWNESS)
        answer = asyncio.run_coroutine_threadsafe(call, self._loop).result()
        return nri.UpdateContainersResponse.FromString(answer)

    async def _serve(self) -> None:
        reader, writer = await asyncio.open_unix_connection(self._socket)
        self._multiplexer = Multiplexer(reader, writer)
        handlers = {(SERVICE.full_name, method.name): self._handler(method) for method in SERVICE.methods}
        server = TtrpcServer(self._multiplexer.open(PLUGIN_SERVICE), handlers)
        self._client = TtrpcClient(self._multiplexer.open(RUNTIME_SERVICE))
        serving = asyncio.create_task(server.serve())
        reading = asyncio.create_task(self._multiplexer.run())
        if self._register:
            request = nri.RegisterPluginRequest(plugin_name=self._name, plugin_idx=self._index)
            with suppress(CallError):  # the runtime has closed the connection
                await self._client.call(RUNTIME, "RegisterPlugin", request.SerializeToString())
        await reading
        await asyncio.gather(serving, self._client.wait_closed(), return_exceptions=True)
        self.closed.set()

    def _handler(self, method: Any) -> Callable[[bytes], Awaitable[bytes]]:
        request_class: Any = GetMessageClass(method.input_type)
        response_class = GetMessageClass(method.output_type)

        async def handle(payload: bytes) -> bytes:
            request = request_class.FromString(payload)
            answer = self.answers.get(method.name)
            response = None
            try:
                if answer is not None:
                    response = await asyncio.to_thread(answer, request)
                elif method.name == "Configure":
                    response = nri.ConfigureResponse(events=self._events)
                elif method.name == "Synchronize":
                    response = nri.SynchronizeResponse(more=request.more)
            finally:
                self.told.append(Told(method.name, request))
            return (response or response_class()).SerializeToString()

        return handle


@contextmanager
def plugged(socket: str, index: str = "10", name: str = "test", **answers: Answer) -> Iterator[TestPlugin]:
    """A connected plugin, which is told of all events."""
    plugin = TestPlugin(socket, index, name, answers=answers)
    plugin.start()
    try:
        yield plugin
    finally:
        plugin.stop()
