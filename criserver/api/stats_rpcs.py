"""The statistics of CRI's RuntimeService: its RPCs that measure."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

from criserver.api import stats_views
from criserver.api.filters import batches, selected
from criserver.api.stats_views import StatsViews
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.lifecycle import SandboxState
from criserver.runtime.node import Node
from criserver.runtime.records import Container, Sandbox


class StatsRpcs:
    """The methods are named after the RPCs; what each promises is CRI's."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._stats = StatsViews(node, os.path.join(node.config.root, "snapshots"))

    async def container_stats(self, request: cri.ContainerStatsRequest) -> cri.ContainerStatsResponse:
        container = self._node.registry.visible_container(request.container_id)
        return cri.ContainerStatsResponse(stats=self._stats.container(container))

    async def list_container_stats(self, request: cri.ListContainerStatsRequest) -> cri.ListContainerStatsResponse:
        found = self._stats.containers(self._measured_containers(request.filter))
        return cri.ListContainerStatsResponse(stats=[s async for s in found])

    async def stream_container_stats(
        self, request: cri.StreamContainerStatsRequest
    ) -> AsyncIterator[cri.StreamContainerStatsResponse]:
        for batch in batches(self._measured_containers(request.filter)):
            found = self._stats.containers(batch)
            yield cri.StreamContainerStatsResponse(container_stats=[s async for s in found])

    async def pod_sandbox_stats(self, request: cri.PodSandboxStatsRequest) -> cri.PodSandboxStatsResponse:
        sandbox = self._node.registry.visible_sandbox(request.pod_sandbox_id)
        return cri.PodSandboxStatsResponse(stats=await self._stats.sandbox(sandbox))

    async def list_pod_sandbox_stats(self, request: cri.ListPodSandboxStatsRequest) -> cri.ListPodSandboxStatsResponse:
        found = self._stats.sandboxes(self._measured_sandboxes(request.filter))
        return cri.ListPodSandboxStatsResponse(stats=[s async for s in found])

    async def stream_pod_sandbox_stats(
        self, request: cri.StreamPodSandboxStatsRequest
    ) -> AsyncIterator[cri.StreamPodSandboxStatsResponse]:
        for batch in batches(self._measured_sandboxes(request.filter)):
            found = self._stats.sandboxes(batch)
            yield cri.StreamPodSandboxStatsResponse(pod_sandbox_stats=[s async for s in found])

    async def list_metric_descriptors(
        self, request: cri.ListMetricDescriptorsRequest
    ) -> cri.ListMetricDescriptorsResponse:
        return cri.ListMetricDescriptorsResponse(descriptors=stats_views.descriptors())

    async def list_pod_sandbox_metrics(
        self, request: cri.ListPodSandboxMetricsRequest
    ) -> cri.ListPodSandboxMetricsResponse:
        return cri.ListPodSandboxMetricsResponse(pod_metrics=[m async for m in self._stats.metrics()])

    async def stream_pod_sandbox_metrics(
        self, request: cri.StreamPodSandboxMetricsRequest
    ) -> AsyncIterator[cri.StreamPodSandboxMetricsResponse]:
        async for found in self._stats.metrics():
            yield cri.StreamPodSandboxMetricsResponse(pod_sandbox_metrics=[found])

    def _measured_containers(self, wanted: cri.ContainerStatsFilter) -> list[Container]:
        found = self._node.registry.visible_containers()
        if wanted.id:
            found = [c for c in found if c.id.startswith(wanted.id)]
        if wanted.pod_sandbox_id:
            found = [c for c in found if c.sandbox_id.startswith(wanted.pod_sandbox_id)]
        return [c for c in found if selected(c.config.labels, wanted.label_selector)]

    def _measured_sandboxes(self, wanted: cri.PodSandboxStatsFilter) -> list[Sandbox]:
        found = [s for s in self._node.registry.sandboxes.values() if s.state is SandboxState.READY]
        if wanted.id:
            found = [s for s in found if s.id.startswith(wanted.id)]
        return [s for s in found if selected(s.config.labels, wanted.label_selector)]
