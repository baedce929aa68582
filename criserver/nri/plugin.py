"""One connected plugin: its registration, its configuration, and the calls to it (NRI 0.12, api.proto)."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar, cast

import structlog
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from criserver import __version__
from criserver.config import Nri
from criserver.errors import CriError, FailedPreconditionError, UnavailableError
from criserver.nri.multiplexer import PLUGIN_SERVICE, RUNTIME_SERVICE, Multiplexer
from criserver.nri.plugin_files import PluginFile, check_name
from criserver.pb.nri.v1alpha1 import api_pb2 as nri
from criserver.telemetry import operations
from criserver.text import shown
from criserver.ttrpc import CallError, TtrpcClient, TtrpcServer

log = structlog.get_logger(__name__)

NRI_VERSION = "0.12.0"

_SERVICE = nri.DESCRIPTOR.services_by_name["Plugin"]
_RUNTIME = nri.DESCRIPTOR.services_by_name["Runtime"].full_name
_EVENTS: Mapping[str, int] = {
    "RunPodSandbox": nri.RUN_POD_SANDBOX,
    "UpdatePodSandbox": nri.UPDATE_POD_SANDBOX,
    "PostUpdatePodSandbox": nri.POST_UPDATE_POD_SANDBOX,
    "StopPodSandbox": nri.STOP_POD_SANDBOX,
    "RemovePodSandbox": nri.REMOVE_POD_SANDBOX,
    "CreateContainer": nri.CREATE_CONTAINER,
    "PostCreateContainer": nri.POST_CREATE_CONTAINER,
    "StartContainer": nri.START_CONTAINER,
    "PostStartContainer": nri.POST_START_CONTAINER,
    "UpdateContainer": nri.UPDATE_CONTAINER,
    "PostUpdateContainer": nri.POST_UPDATE_CONTAINER,
    "StopContainer": nri.STOP_CONTAINER,
    "RemoveContainer": nri.REMOVE_CONTAINER,
    "ValidateContainerAdjustment": nri.VALIDATE_CONTAINER_ADJUSTMENT,
}
_ALL_EVENTS = (1 << (nri.LAST - 1)) - 1
# The objects of a Synchronize that is split have at least this many, as the protocol's own library does.
_LEAST = 8

Response = TypeVar("Response", bound=Message)
Update = Callable[["Plugin", nri.UpdateContainersRequest], Awaitable[nri.UpdateContainersResponse]]


class PluginGoneError(UnavailableError):
    """The plugin has gone, or was disconnected. The operation goes on without it."""


class Plugin:
    """A plugin over one socket. ``name`` is INDEX-NAME; it is known once the plugin has registered."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        settings: Nri,
        update: Update,
        file: PluginFile | None = None,
    ) -> None:
        """``update`` serves the plugin's own UpdateContainers. ``file`` is given for a plugin that was started here."""
        self._settings = settings
        self._update = update
        self._file = file
        self.index, self.base = (file.index, file.name) if file else ("", "")
        self._events = 0
        self._multiplexer = Multiplexer(reader, writer)
        self._client = TtrpcClient(self._multiplexer.open(PLUGIN_SERVICE))
        handlers = {
            (_RUNTIME, "RegisterPlugin"): self._register,
            (_RUNTIME, "UpdateContainers"): self._update_containers,
        }
        self._server = TtrpcServer(self._multiplexer.open(RUNTIME_SERVICE), handlers)
        self._registered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reason = ""

    @property
    def name(self) -> str:
        """INDEX-NAME."""
        return f"{self.index}-{self.base}" if self.index else "(not registered)"

    @property
    def closed(self) -> bool:
        """Whether the plugin was disconnected, or has gone."""
        return self._multiplexer.closed

    def subscribed(self, method: str) -> bool:
        """Whether the plugin wants this event."""
        return not self.closed and self._events >> (_EVENTS[method] - 1) & 1 != 0

    async def serve(self, started: Callable[[Plugin], Awaitable[None]]) -> None:
        """Serve until the plugin goes. ``started`` is awaited once it is registered and configured."""
        serving = asyncio.create_task(self._server.serve(), name="nri runtime service")
        starting = asyncio.create_task(self._start(started), name="nri plugin start")
        reason = "it was closed"
        try:
            reason = await self._multiplexer.run()
        finally:
            for task in (serving, starting):
                task.cancel()
            self.disconnect(self._server.fault or self._client.fault or reason)
            await asyncio.gather(serving, starting, self._client.wait_closed(), return_exceptions=True)
            self._registered.cancel()
            log.info("NRI plugin gone", plugin=self.name, reason=self._reason)

    def disconnect(self, reason: str) -> None:
        """Close the connection; the first reason is logged."""
        self._reason = self._reason or reason
        self._multiplexer.close()

    async def _start(self, started: Callable[[Plugin], Awaitable[None]]) -> None:
        limit = self._settings.plugin_registration_timeout
        try:
            async with asyncio.timeout(limit):
                await self._registered
            await self._configure()
            await started(self)
        except TimeoutError:
            self.disconnect(f"it did not register within {limit} s")
        except CriError as e:
            self.disconnect(str(e))
        except Exception as e:
            log.exception("an NRI plugin cannot be started", plugin=self.name)
            self.disconnect(str(e))

    async def _register(self, payload: bytes) -> bytes:
        request = nri.RegisterPluginRequest.FromString(payload)
        if self._registered.done():
            raise FailedPreconditionError(f"NRI plugin {self.name} has registered already")
        if self._file is None:
            try:
                check_name(request.plugin_idx, request.plugin_name)
            except CriError as e:
                self._registered.set_exception(e)
                raise
            self.index, self.base = request.plugin_idx, request.plugin_name
        log.info("NRI plugin registered", plugin=self.name, nri_version=shown(request.NRI_version))
        self._registered.set_result(None)
        return nri.Empty().SerializeToString()

    async def _update_containers(self, payload: bytes) -> bytes:
        response = await self._update(self, nri.UpdateContainersRequest.FromString(payload))
        return response.SerializeToString()

    async def _configure(self) -> None:
        request = nri.ConfigureRequest(
            config=self._file.config if self._file else "",
            runtime_name="criserver",
            runtime_version=__version__,
            registration_timeout=int(self._settings.plugin_registration_timeout * 1000),
            request_timeout=int(self._settings.plugin_request_timeout * 1000),
            NRI_version=NRI_VERSION,
        )
        events = (await self.call("Configure", request, nri.ConfigureResponse)).events
        if events & ~_ALL_EVENTS:
            raise FailedPreconditionError(f"NRI plugin {self.name} subscribes to unknown events: {events:#x}")
        self._events = events or _ALL_EVENTS

    async def synchronize(self, pods: list[nri.PodSandbox], containers: list[nri.Container]) -> nri.SynchronizeResponse:
        """Tell the plugin of all pods and containers, in several messages if one is too large.

        It is the end of the registration, and all of it may take as long as a registration, not only as a request.
        Raises CriError; the plugin is disconnected then.
        """
        limit = max(self._settings.plugin_registration_timeout, self._settings.plugin_request_timeout)
        try:
            async with asyncio.timeout(limit):
                return await self._synchronize(pods, containers, limit)
        except TimeoutError as e:
            reason = f"NRI plugin {self.name} does not answer Synchronize within {limit} s"
            self.disconnect(reason)
            raise PluginGoneError(reason) from e
        except CriError as e:
            self.disconnect(str(e))
            raise

    async def _synchronize(
        self, pods: list[nri.PodSandbox], containers: list[nri.Container], limit: float
    ) -> nri.SynchronizeResponse:
        some_pods, some_containers = len(pods), len(containers)
        while True:
            request = nri.SynchronizeRequest(
                pods=pods[:some_pods],
                containers=containers[:some_containers],
                more=len(pods) > some_pods or len(containers) > some_containers,
            )
            try:
                response = await self._send("Synchronize", request, nri.SynchronizeResponse, limit)
            except CallError as e:
                if not e.oversized or some_pods + some_containers <= _LEAST:
                    raise self._failure("Synchronize", e) from e
                some_pods, some_containers = max(some_pods // 2, _LEAST // 2), max(some_containers // 2, _LEAST // 2)
                continue
            if not request.more:
                return response
            if response.update or not response.more:
                raise FailedPreconditionError(f"NRI plugin {self.name} does not take a Synchronize in several messages")
            pods, containers = pods[some_pods:], containers[some_containers:]

    async def call(self, method: str, request: Message, response: type[Response]) -> Response:
        """Call a method of the plugin.

        Raises PluginGoneError where the plugin is late, has gone or breaks the protocol: it is disconnected
        then. Raises FailedPreconditionError for an error of the plugin.
        """
        try:
            return await self._send(method, request, response, self._settings.plugin_request_timeout)
        except CallError as e:
            raise self._failure(method, e) from e

    async def _send(self, method: str, request: Message, response: type[Response], timeout: float) -> Response:
        sys.audit("criserver.plugin_call", method)
        with operations.NRI.timed(self.name, method):
            answer = await self._client.call(_SERVICE.full_name, method, request.SerializeToString(), timeout=timeout)
        try:
            return response.FromString(answer)
        except DecodeError as e:
            reason = f"NRI plugin {self.name} answers {method} with bytes that are no message"
            self.disconnect(reason)
            raise PluginGoneError(reason) from e

    def _failure(self, method: str, error: CallError) -> CriError:
        if error.lost or error.late:
            reason = f"NRI plugin {self.name} does not answer {method}: {error.message}"
            self.disconnect(reason)
            return PluginGoneError(reason)
        return FailedPreconditionError(f"NRI plugin {self.name} fails {method}: {shown(error.message)}")

    async def shut_down(self) -> None:
        """Tell the plugin of the daemon's end, and close the connection."""
        if self._events and not self.closed:
            try:
                await self.call("Shutdown", nri.Empty(), nri.Empty)
            except CriError as e:
                log.debug("an NRI plugin does not answer the shutdown", plugin=self.name, error=str(e))
        self.disconnect("the daemon stops")


def response_class(method: str) -> Any:
    """The class of a method's response."""
    return cast("Any", GetMessageClass(_SERVICE.methods_by_name[method].output_type))
