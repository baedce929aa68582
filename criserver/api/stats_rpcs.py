"""The RPCs of CRI's RuntimeService for statistics and metrics."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

from criserver.api import stats_views, views
from criserver.api.filters import batches, select_containers, select_sandboxes
from criserver.api.grpc_server import MAX_MESSAGE
from criserver.api.lists import ListLimit
from criserver.api.stats_views import StatsViews
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.lifecycle import SandboxState
from criserver.runtime.node import Node
from criserver.runtime.records import Container, Sandbox


class StatsRpcs:
    """The methods have the names of the RPCs. CRI documents them."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._stats = StatsViews(node, os.path.join(node.config.root, "snapshots"))
        # A kubelet's limit counts also where the daemon may send more.
        self._limit = ListLimit(min(node.config.max_send_message_size, MAX_MESSAGE))

    async def container_stats(self, request: cri.ContainerStatsRequest) -> cri.ContainerStatsResponse:
        container = self._node.records.visible_container(request.container_id)
        return cri.ContainerStatsResponse(stats=self._stats.container(container))

    async def list_container_stats(self, request: cri.ListContainerStatsRequest) -> cri.ListContainerStatsResponse:
        stats = self._stats.containers(self._measured_containers(request.filter))
        return cri.ListContainerStatsResponse(stats=[s async for s in stats])

    async def stream_container_stats(
        self, request: cri.StreamContainerStatsRequest
    ) -> AsyncIterator[cri.StreamContainerStatsResponse]:
        async for batch in batches(self._stats.containers(self._measured_containers(request.filter))):
            yield cri.StreamContainerStatsResponse(container_stats=batch)

    async def pod_sandbox_stats(self, request: cri.PodSandboxStatsRequest) -> cri.PodSandboxStatsResponse:
        sandbox = self._node.records.visible_sandbox(request.pod_sandbox_id)
        return cri.PodSandboxStatsResponse(stats=await self._stats.sandbox(sandbox))

    async def list_pod_sandbox_stats(self, request: cri.ListPodSandboxStatsRequest) -> bytes:
        stats = [s async for s in self._stats.sandboxes(self._measured_sandboxes(request.filter))]
        answer = cri.ListPodSandboxStatsResponse(stats=stats).SerializeToString()
        if len(answer) <= self._limit.size:
            return answer

        def shorter(place: int) -> int:
            views.shorten(stats[place].attributes)
            return stats[place].ByteSize()

        self._limit.shorten([s.attributes.id for s in stats], [s.ByteSize() for s in stats], shorter)
        return cri.ListPodSandboxStatsResponse(stats=stats).SerializeToString()

    async def stream_pod_sandbox_stats(
        self, request: cri.StreamPodSandboxStatsRequest
    ) -> AsyncIterator[cri.StreamPodSandboxStatsResponse]:
        async for batch in batches(self._stats.sandboxes(self._measured_sandboxes(request.filter))):
            yield cri.StreamPodSandboxStatsResponse(pod_sandbox_stats=batch)

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
        async for metrics in self._stats.metrics():
            yield cri.StreamPodSandboxMetricsResponse(pod_sandbox_metrics=[metrics])

    def _measured_containers(self, selector: cri.ContainerStatsFilter) -> list[Container]:
        return select_containers(self._node.records.visible_containers(), selector)

    def _measured_sandboxes(self, selector: cri.PodSandboxStatsFilter) -> list[Sandbox]:
        ready = (s for s in self._node.records.sandboxes.values() if s.state is SandboxState.READY)
        return select_sandboxes(ready, selector)
