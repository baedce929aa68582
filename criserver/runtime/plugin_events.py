"""The events of operations as calls to the plugins of the node (NRI), and what plugins ask of the runtime."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import structlog

from criserver.errors import CriError, NotFoundError, disk_fault, exhaustion
from criserver.nri.plugins import Plugins
from criserver.nri.resource_updates import ResourceUpdates
from criserver.nri.spec_values import spec_adjustment, update_limits
from criserver.oci.spec_inputs import Spec
from criserver.pb.nri.v1alpha1 import api_pb2 as nri
from criserver.runtime import cgroups, container_stop, container_update, host
from criserver.runtime.node import Node
from criserver.runtime.node_plugins import Adjusted, Known, Limits
from criserver.runtime.plugin_views import (
    asked_resources,
    container_view,
    cri_resources,
    namespace_pins,
    pod_view,
    set_status,
)
from criserver.runtime.pod_namespaces import pod_facts
from criserver.runtime.records import Container, Record, Sandbox
from criserver.runtime.spec_file import spec_path

log = structlog.get_logger(__name__)


class _ContainerView(NamedTuple):
    """The view of a container with the spec of this version, serialised."""

    version: tuple[int, int, int] | None
    message: bytes


class _PodView(NamedTuple):
    """The view of a pod, and what it was made of. ``pid`` is that of the infra process, None for a pod without one."""

    sandbox: Sandbox
    pid: int | None
    pins: list[tuple[str, str]]
    pinned: list[tuple[str, str]]
    message: nri.PodSandbox


class PluginCalls:
    """:class:`criserver.runtime.node_plugins.PluginEvents`, with plugins. It also is their runtime side."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._known = node.plugins.known
        self._pods: dict[str, _PodView] = {}
        self._views: dict[str, _ContainerView] = {}
        node.records.watch(self._changed)
        self.plugins = Plugins(node.config.nri, self)

    @property
    def idle(self) -> bool:
        """Whether there is no plugin to tell, and none that is being told of everything."""
        return self.plugins.idle

    async def run_sandbox(self, sandbox: Sandbox) -> None:
        """Raises CriError."""
        async with self.plugins.turn:
            self._known[sandbox.id] = Known.MADE
            await self.plugins.tell("RunPodSandbox", nri.RunPodSandboxRequest(pod=self._pod(sandbox)))

    async def update_sandbox(self, sandbox: Sandbox, overhead: Any, resources: Any) -> None:
        """Raises CriError."""
        request = nri.UpdatePodSandboxRequest(
            pod=self._pod(sandbox),
            overhead_linux_resources=asked_resources(overhead),
            linux_resources=asked_resources(resources),
        )
        async with self.plugins.turn:
            await self.plugins.tell("UpdatePodSandbox", request)

    async def sandbox_updated(self, sandbox: Sandbox) -> None:
        """The update is done."""
        self._tell_soon("PostUpdatePodSandbox", nri.PostUpdatePodSandboxRequest(pod=self._pod(sandbox)))

    async def sandbox_stopped(self, sandbox: Sandbox) -> None:
        """Its containers have ended, and its network is still there."""
        async with self.plugins.turn:
            await self._stop_sandbox(sandbox)

    async def _stop_sandbox(self, sandbox: Sandbox) -> None:
        if self._known.get(sandbox.id) is Known.MADE:
            self._known[sandbox.id] = Known.STOPPED
            await self.plugins.tell_all("StopPodSandbox", nri.StopPodSandboxRequest(pod=self._pod(sandbox)))

    async def sandbox_removed(self, sandbox: Sandbox) -> None:
        """Everything of it is removed, except its record."""
        async with self.plugins.turn:
            await self._stop_sandbox(sandbox)
            if self._known.pop(sandbox.id, None) is not None:
                await self.plugins.tell_all("RemovePodSandbox", nri.RemovePodSandboxRequest(pod=self._pod(sandbox)))

    async def create_container(self, container: Container, spec: Spec) -> Adjusted:
        """Raises CriError."""
        async with self.plugins.turn:
            self._known[container.id] = Known.MADE
            view = container_view(container, spec, self._digest(container))
            found = await self.plugins.create_container(
                nri.CreateContainerRequest(pod=self._pod(self._sandbox(container)), container=view)
            )
        if not found.adjustment.ByteSize():  # the spec stays as it is in its file
            self._views[container.id] = _ContainerView(_version(self._spec_path(container)), view.SerializeToString())
        asked = found.adjustment.linux.resources
        value = spec_adjustment(container.id, found.adjustment, found.owners)
        return Adjusted(value, cri_resources(asked), found.updates)

    async def container_created(self, container: Container) -> None:
        """The container is visible."""
        self._tell_soon("PostCreateContainer", await self._request(container, nri.PostCreateContainerRequest))

    async def start_container(self, container: Container) -> None:
        """Raises CriError."""
        async with self.plugins.turn:
            await self.plugins.tell("StartContainer", await self._request(container, nri.StartContainerRequest))

    async def container_started(self, container: Container) -> None:
        """Its process runs."""
        self._tell_soon("PostStartContainer", await self._request(container, nri.PostStartContainerRequest))

    async def update_container(self, container: Container, limits: Limits) -> Limits:
        """Raises CriError."""
        async with self.plugins.turn:
            request = await self._request(container, nri.UpdateContainerRequest)
            request.linux_resources.CopyFrom(asked_resources(limits.asked))
            asked = request.linux_resources.SerializeToString(deterministic=True)
            updates = await self.plugins.update_container(request)
        changed = updates.resources
        if changed.SerializeToString(deterministic=True) == asked:
            return Limits(limits.asked, limits.oci, updates)
        wanted = cri_resources(changed)
        wanted.oom_score_adj = limits.asked.oom_score_adj
        return Limits(wanted, _limits(container.id, changed, updates), updates)

    async def container_updated(self, container: Container) -> None:
        """The update is done."""
        self._tell_soon("PostUpdateContainer", await self._request(container, nri.PostUpdateContainerRequest))

    async def container_stopped(self, container: Container) -> None:
        """Its process has ended. May change others; the caller holds no container's lock."""
        updates = ResourceUpdates()
        async with self.plugins.turn:
            await self._stop_container(container, updates)
        await self.apply(updates)

    async def _stop_container(self, container: Container, updates: ResourceUpdates | None = None) -> None:
        if self._known.get(container.id) is Known.MADE:
            self._known[container.id] = Known.STOPPED
            request = await self._request(container, nri.StopContainerRequest)
            await self.plugins.tell_all("StopContainer", request, updates)

    async def container_removed(self, container: Container) -> None:
        """Everything of it is removed, except its record."""
        async with self.plugins.turn:
            await self._stop_container(container)
            if self._known.pop(container.id, None) is not None:
                request = await self._request(container, nri.RemoveContainerRequest)
                await self.plugins.tell_all("RemoveContainer", request)

    async def everything(self) -> tuple[list[nri.PodSandbox], list[nri.Container]]:
        """All pods that plugins know of, and the containers that have not ended."""
        records, known = self._node.records, self._known
        pods = [self._pod(s) for s in records.sandboxes.values() if s.id in known]
        alive = [c for c in records.containers.values() if known.get(c.id) is Known.MADE]
        return pods, [await self._view(c) for c in alive]

    async def apply(self, after: Any) -> list[nri.ContainerUpdate]:
        """Update and evict containers. A failure is logged, as the operation of another container has no use of it."""
        updates: ResourceUpdates = after
        failed = []
        for update in updates.updates:
            try:
                await self._update(update, updates)
            except CriError as e:
                failed.append(update)
                log.warning("an NRI plugin's update failed", container=update.container_id, error=str(e))
        for eviction in updates.evictions:
            await self._evict(eviction)
        return failed

    async def _update(self, update: nri.ContainerUpdate, updates: ResourceUpdates) -> None:
        resources = update.linux.resources
        container = self._node.records.visible_container(update.container_id)
        limits = Limits(cri_resources(resources), _limits(container.id, resources, updates), None)
        await container_update.set_limits(self._node, container.id, limits)

    async def _evict(self, eviction: nri.ContainerEviction) -> None:
        try:
            container = self._node.records.visible_container(eviction.container_id)
        except NotFoundError as e:
            log.warning("an NRI plugin evicts a container that is not there", error=str(e))
            return
        log.info("an NRI plugin evicts a container", container=container.id, reason=eviction.reason)
        self._node.background(
            container_stop.stop_container(self._node, container.id, 0), "a container cannot be evicted"
        )

    def _tell_soon(self, method: str, request: Any) -> None:
        """Tell of what has been done already. The operation does not wait, as no answer changes its outcome.

        The lock of ``turn`` is given in the order in which it was asked for, so later events of the container come
        after this one.
        """

        async def tell() -> None:
            async with self.plugins.turn:
                await self.plugins.tell_all(method, request)

        self._node.background(tell(), "the plugins cannot be told of an event")

    async def _request(self, container: Container, kind: Callable[..., Any]) -> Any:
        return kind(pod=self._pod(self._sandbox(container)), container=await self._view(container))

    async def _view(self, container: Container) -> nri.Container:
        current = self._node.records.containers.get(container.id, container)
        view = nri.Container.FromString(await self._spec_view(current))
        set_status(view, current)
        # A process that starts is known before its record says so.
        process = self._node.processes.get(container.id)
        if not view.pid and process is not None and process.started is not None:
            view.pid = process.started.pid
        return view

    async def _spec_view(self, container: Container) -> bytes:
        """The view of a container with its spec, which is read again once it changes."""
        path = self._spec_path(container)
        version = _version(path)
        if version is None:  # it could not be made
            return container_view(container, {}).SerializeToString()
        known = self._views.get(container.id)
        if known is None or known.version != version:
            try:
                spec = await asyncio.to_thread(_read, path)
                view = container_view(container, spec, self._digest(container))
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
                # A full disk or a power failure has cut it off. The plugins are told of all others, and of its removal.
                log.warning("plugins see a container without its spec", container=container.id, path=path, error=str(e))
                view = container_view(container, {}, self._digest(container))
                if exhaustion(e) or disk_fault(e):
                    return view.SerializeToString()  # that may be over soon, so the file is read again at the next use
            known = self._views[container.id] = _ContainerView(version, view.SerializeToString())
        return known.message

    def _changed(self, old: Record | None, new: Record | None) -> None:
        if new is None and old is not None:
            self._views.pop(old.id, None)
            self._pods.pop(old.id, None)

    def _sandbox(self, container: Container) -> Sandbox:
        return self._node.records.sandboxes[container.sandbox_id]

    def _digest(self, container: Container) -> str:
        return container.image_ref.rpartition("@")[2]

    def _spec_path(self, container: Container) -> str:
        return spec_path(self._node, container.id)

    def _pod(self, sandbox: Sandbox) -> nri.PodSandbox:
        """The view of a pod, which is not to be changed."""
        infra = self._node.processes.get(sandbox.id)
        pid = None if infra is None else infra.started.pid if infra.started is not None else 0
        known = self._pods.get(sandbox.id)
        pins = known.pins if known is not None else namespace_pins(pod_facts(self._node, sandbox))
        pinned = [pin for pin in pins if os.path.exists(pin[1])]
        if known is None or known.sandbox is not sandbox or (known.pid, known.pinned) != (pid, pinned):
            message = pod_view(
                sandbox,
                pid=pid or 0,
                cgroups_path="" if pid is None else cgroups.spec_path(sandbox.cgroup_parent, sandbox.id),
                namespaces=pinned,
            )
            known = self._pods[sandbox.id] = _PodView(sandbox, pid, pins, pinned, message)
        return known.message


def _version(path: str) -> tuple[int, int, int] | None:
    """What tells whether a file is another by now; None without a file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read(path: str) -> Spec:
    with open(path, "rb") as f:
        spec: Spec = json.load(f)
    return spec


def _limits(container_id: str, resources: nri.LinuxResources, updates: ResourceUpdates) -> Spec:
    """The OCI limits. Raises FailedPreconditionError for what plugins ask for and this node cannot give."""
    return update_limits(container_id, resources, updates.ownership.message, host.facts())
