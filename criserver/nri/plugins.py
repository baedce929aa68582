"""The plugins that are connected: their order, and what each event asks of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Protocol

import structlog
from google.protobuf.message import Message

from criserver.config import Nri
from criserver.errors import CriError, FailedPreconditionError, PermissionDeniedError
from criserver.nri.adjustments import ContainerAdjustments
from criserver.nri.default_validator import ValidatorSettings, validate
from criserver.nri.plugin import Plugin, PluginGoneError, response_class
from criserver.nri.plugin_files import PluginFile
from criserver.nri.resource_updates import ResourceUpdates
from criserver.pb.nri.v1alpha1 import api_pb2 as nri
from criserver.text import quoted

log = structlog.get_logger(__name__)


class RuntimeSide(Protocol):
    """What plugins need of the runtime."""

    async def everything(self) -> tuple[list[nri.PodSandbox], list[nri.Container]]:
        """All pods and containers that plugins know of."""

    async def apply(self, updates: ResourceUpdates) -> list[nri.ContainerUpdate]:
        """Update and evict containers. Returns the updates that have failed."""


class Plugins:
    """All plugins, in the order of their indices.

    ``turn`` is held while an event is told to the plugins, and while a new one is told of everything. So the plugins
    see one event after the other, and a new plugin misses none. Its holder waits for plugins alone, each of which has
    its timeout.
    """

    def __init__(self, settings: Nri, runtime: RuntimeSide) -> None:
        self._settings = settings
        self._runtime = runtime
        self._plugins: list[Plugin] = []
        self._served: set[Plugin] = set()
        self._validator = _validator_settings(settings)
        self._joined = asyncio.Condition()
        self.turn = asyncio.Lock()

    @property
    def idle(self) -> bool:
        """Whether nothing has to be told: there is no plugin, and none is being told of everything."""
        return not self._plugins and not self.turn.locked() and self._validator is None

    async def serve(self, file: PluginFile | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection of a plugin, until it ends."""
        plugin = Plugin(reader, writer, self._settings, self._unsolicited, file)
        self._served.add(plugin)
        try:
            await plugin.serve(self._join)
        finally:
            self._served.discard(plugin)
            self._plugins = [other for other in self._plugins if other is not plugin]

    async def wait_for(self, files: Iterable[PluginFile], limit: float) -> bool:
        """Wait until the plugins of these files are connected, for at most ``limit`` seconds. Whether they are."""
        wanted = {f"{file.index}-{file.name}" for file in files}
        try:
            async with asyncio.timeout(limit), self._joined:
                await self._joined.wait_for(lambda: wanted <= {plugin.name for plugin in self._plugins})
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Tell all plugins that the daemon ends, and close their connections."""
        await asyncio.gather(*(plugin.shut_down() for plugin in self._served))

    async def _join(self, plugin: Plugin) -> None:
        async with self.turn:
            pods, containers = await self._runtime.everything()
            response = await plugin.synchronize(pods, containers)
            self._plugins = sorted([*self._plugins, plugin], key=lambda one: (one.index, one.base))
        async with self._joined:
            self._joined.notify_all()
        log.info("NRI plugin connected", plugin=plugin.name, order=[one.name for one in self._plugins])
        updates = ResourceUpdates()
        updates.add(plugin.name, response)
        await self._runtime.apply(updates)

    async def _unsolicited(self, plugin: Plugin, request: nri.UpdateContainersRequest) -> nri.UpdateContainersResponse:
        if plugin not in self._plugins:
            raise FailedPreconditionError(f"NRI plugin {plugin.name} is not synchronized yet")
        updates = ResourceUpdates()
        updates.add(plugin.name, request)
        return nri.UpdateContainersResponse(failed=await self._runtime.apply(updates))

    async def tell(self, method: str, request: Message) -> None:
        """Tell each plugin of an event. Raises the first plugin's error. The caller holds ``turn``."""
        for plugin in self._subscribed(method):
            await _ask(plugin, method, request)

    async def tell_all(self, method: str, request: Message, updates: ResourceUpdates | None = None) -> None:
        """Tell each plugin of an event that cannot be hindered: errors are logged. The caller holds ``turn``.

        ``updates`` gets what the plugins answer.
        """
        for plugin in self._subscribed(method):
            try:
                response = await _ask(plugin, method, request)
                if updates is not None and response is not None:
                    updates.add(plugin.name, response)
            except CriError as e:
                log.warning("an NRI plugin answers with an error", plugin=plugin.name, nri_event=method, error=str(e))

    async def create_container(self, request: nri.CreateContainerRequest) -> ContainerAdjustments:
        """What the plugins change of a container. The caller holds ``turn``.

        Raises a plugin's error, and the errors of what the plugins ask against each other or against the validators.
        """
        adjustments = ContainerAdjustments(request)
        for plugin in self._subscribed("CreateContainer"):
            response = await _ask(plugin, "CreateContainer", adjustments.request)
            if response is not None:
                adjustments.add(plugin.name, response)
        await self._validate(adjustments)
        return adjustments

    async def update_container(self, request: nri.UpdateContainerRequest) -> ResourceUpdates:
        """What the plugins make of an update. Raises a plugin's error. The caller holds ``turn``."""
        updates = ResourceUpdates(request)
        for plugin in self._subscribed("UpdateContainer"):
            response = await _ask(plugin, "UpdateContainer", updates.request)
            if response is not None:
                updates.add(plugin.name, response)
        return updates

    async def _validate(self, adjustments: ContainerAdjustments) -> None:
        validators = list(self._subscribed("ValidateContainerAdjustment"))
        if not validators and self._validator is None:
            return
        # A plugin that has just gone is in the list until its connection has been served.
        present = [plugin for plugin in self._plugins if not plugin.closed]
        request = adjustments.validation(nri.PluginInstance(name=p.base, index=p.index) for p in present)
        if self._validator is not None:
            validate(self._validator, request)
        answers = await asyncio.gather(
            *(
                p.call("ValidateContainerAdjustment", request, nri.ValidateContainerAdjustmentResponse)
                for p in validators
            )
        )
        for plugin, answer in zip(validators, answers, strict=True):
            if answer.reject:
                raise PermissionDeniedError(
                    f"NRI plugin {plugin.name} rejects the adjustments of container {request.container.id}: "
                    f"{quoted(answer.reason)}"
                )

    def _subscribed(self, method: str) -> Iterable[Plugin]:
        return [plugin for plugin in self._plugins if plugin.subscribed(method)]


async def _ask(plugin: Plugin, method: str, request: Message) -> Any:
    """The response of a plugin; None where the plugin was disconnected, as the others go on then."""
    try:
        return await plugin.call(method, request, response_class(method))
    except PluginGoneError as e:
        log.warning("an event goes on without an NRI plugin", plugin=plugin.name, nri_event=method, error=str(e))
        return None


def _validator_settings(settings: Nri) -> ValidatorSettings | None:
    table = dict(settings.default_validator)
    if not table.pop("enable"):
        return None
    return ValidatorSettings(**{**table, "required_plugins": tuple(table["required_plugins"])})
