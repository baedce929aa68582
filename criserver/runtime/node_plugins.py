"""What operations tell to the plugins of the node (NRI). Without a plugin each call returns at once.

The events come in the order of the protocol: RunPodSandbox, CreateContainer, PostCreateContainer, StartContainer,
PostStartContainer, UpdateContainer, PostUpdateContainer, StopContainer once, RemoveContainer, StopPodSandbox once,
RemovePodSandbox. A container's own end is a StopContainer too. An error of an event that begins something fails it. The
errors of the others are logged. No operation waits until plugins have taken a Post event.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from criserver.oci.adjustment_value import SpecAdjustment
from criserver.oci.spec_inputs import Spec
from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.record_store import RecordStore
from criserver.runtime.records import Container, Record, Sandbox


class Known(enum.Enum):
    """What plugins know about a pod or container. Without an event they do not know that it exists."""

    MADE = "made"
    STOPPED = "stopped"


class Adjusted(NamedTuple):
    """What plugins change of a container that is created. ``resources`` is a CRI LinuxContainerResources.

    ``after`` has the changes of other containers, for :meth:`NodePlugins.apply`.
    """

    spec: SpecAdjustment
    resources: Any
    after: Any


class Limits(NamedTuple):
    """The limits of an update: ``asked`` is a CRI LinuxContainerResources, ``oci`` the OCI ``linux.resources``."""

    asked: Any
    oci: Spec
    after: Any = None


class PluginEvents(Protocol):
    """The events, where there may be plugins. Each also changes ``NodePlugins.known``, while it holds the turn."""

    @property
    def idle(self) -> bool:
        """Whether there is no plugin to tell, and none that is being told of everything."""

    async def run_sandbox(self, sandbox: Sandbox) -> None:
        """Raises CriError."""

    async def update_sandbox(self, sandbox: Sandbox, overhead: Any, resources: Any) -> None:
        """The arguments are CRI's LinuxContainerResources. Raises CriError."""

    async def sandbox_updated(self, sandbox: Sandbox) -> None:
        """The update is done."""

    async def sandbox_stopped(self, sandbox: Sandbox) -> None:
        """Its containers have ended, and its network is still there."""

    async def sandbox_removed(self, sandbox: Sandbox) -> None:
        """Everything of it is removed, except its record."""

    async def create_container(self, container: Container, spec: Spec) -> Adjusted:
        """Raises CriError."""

    async def container_created(self, container: Container) -> None:
        """The container is visible."""

    async def start_container(self, container: Container) -> None:
        """Raises CriError."""

    async def container_started(self, container: Container) -> None:
        """Its process runs."""

    async def update_container(self, container: Container, limits: Limits) -> Limits:
        """Raises CriError."""

    async def container_updated(self, container: Container) -> None:
        """The update is done."""

    async def container_stopped(self, container: Container) -> None:
        """Its process has ended. May change others; the caller holds no container's lock."""

    async def container_removed(self, container: Container) -> None:
        """Everything of it is removed, except its record."""

    async def apply(self, after: Any) -> object:
        """Change other containers. The caller holds no container's lock."""


class NodePlugins:
    """The events of all operations. ``events`` is None until there can be a plugin."""

    def __init__(self) -> None:
        self.events: PluginEvents | None = None
        self.known: dict[str, Known] = {}

    def begin(
        self, records: RecordStore, background: Callable[[Any, str], object], lock: Callable[[str], asyncio.Lock]
    ) -> None:
        """Take what an earlier daemon has left as known, and watch containers end. ``lock`` is that of a record."""
        for sandbox in records.visible_sandboxes():
            self.known[sandbox.id] = Known.MADE if sandbox.state is SandboxState.READY else Known.STOPPED
        for container in records.visible_containers():
            self.known[container.id] = Known.STOPPED if container.state is ContainerState.EXITED else Known.MADE

        async def ended(container: Container) -> None:
            # A container may end while StartContainer holds its lock. Plugins are told of the start first.
            async with lock(container.id):
                pass
            await self.container_stopped(container)

        def changed(_old: Record | None, new: Record | None) -> None:
            if isinstance(new, Container) and new.state is ContainerState.EXITED and self._is_made(new):
                background(ended(new), "the plugins cannot be told of a container's end")

        records.watch(changed)

    def _active(self) -> PluginEvents | None:
        return None if self.events is None or self.events.idle else self.events

    def _is_made(self, record: Record) -> bool:
        return self.known.get(record.id) is Known.MADE

    async def run_sandbox(self, sandbox: Sandbox) -> None:
        """A pod is complete, and no caller sees it yet. Raises CriError: it is to be undone."""
        if (events := self._active()) is not None:
            await events.run_sandbox(sandbox)
        else:
            self.known[sandbox.id] = Known.MADE

    async def update_sandbox(self, sandbox: Sandbox, overhead: Any, resources: Any) -> None:
        """The kubelet tells of a pod's new resources. Raises CriError: they are not taken."""
        if (events := self._active()) is not None:
            await events.update_sandbox(sandbox, overhead, resources)

    async def sandbox_updated(self, sandbox: Sandbox) -> None:
        """The record has a pod's new resources."""
        if (events := self._active()) is not None:
            await events.sandbox_updated(sandbox)

    async def sandbox_stopped(self, sandbox: Sandbox) -> None:
        """A pod's containers have ended, and its network is still there."""
        if not self._is_made(sandbox):
            return
        if (events := self._active()) is not None:
            await events.sandbox_stopped(sandbox)
        else:
            self.known[sandbox.id] = Known.STOPPED

    async def sandbox_removed(self, sandbox: Sandbox) -> None:
        """Everything of a pod is removed, except its record. This is also called if the pod could not be made."""
        if sandbox.id not in self.known:
            return
        if (events := self._active()) is not None:
            await events.sandbox_removed(sandbox)
        else:
            self.known.pop(sandbox.id, None)

    async def create_container(self, container: Container, spec: Spec) -> Adjusted | None:
        """A container is complete but for what plugins change of its spec; None for nothing.

        No caller sees it yet. Raises CriError: it is to be undone.
        """
        if (events := self._active()) is not None:
            return await events.create_container(container, spec)
        self.known[container.id] = Known.MADE
        return None

    async def container_created(self, container: Container) -> None:
        """A container is visible."""
        if (events := self._active()) is not None:
            await events.container_created(container)

    async def start_container(self, container: Container) -> None:
        """A container is about to be started. Raises CriError: it is not."""
        if (events := self._active()) is not None:
            await events.start_container(container)

    async def container_started(self, container: Container) -> None:
        """A container's process runs."""
        if (events := self._active()) is not None:
            await events.container_started(container)

    async def update_container(self, container: Container, limits: Limits) -> Limits:
        """The limits of a container with what plugins change of them. Raises CriError: it keeps those that it has."""
        return limits if (events := self._active()) is None else await events.update_container(container, limits)

    async def container_updated(self, container: Container) -> None:
        """A container has its new limits."""
        if (events := self._active()) is not None:
            await events.container_updated(container)

    async def container_stopped(self, container: Container) -> None:
        """A container's process has ended. The caller holds no container's lock, as plugins may change others."""
        if not self._is_made(container):
            return
        if (events := self._active()) is not None:
            await events.container_stopped(container)
        else:
            self.known[container.id] = Known.STOPPED

    async def container_removed(self, container: Container) -> None:
        """Everything of a container is removed, except its record. This is also called if it could not be made."""
        if container.id not in self.known:
            return
        if (events := self._active()) is not None:
            await events.container_removed(container)
        else:
            self.known.pop(container.id, None)

    async def apply(self, after: Any) -> None:
        """Change other containers, as plugins ask for. The caller holds no container's lock."""
        if self.events is not None and after is not None:
            await self.events.apply(after)
