"""CRI's RuntimeService: each request becomes one call of the runtime room, and its result an answer."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import structlog

from criserver import __version__
from criserver.api import views
from criserver.api.filters import batches, select_containers, select_sandboxes
from criserver.api.inspection import verbose_info
from criserver.api.lists import Fragments, make_each, make_in_slices
from criserver.api.stats_rpcs import StatsRpcs
from criserver.api.status_info import status_info
from criserver.errors import InvalidArgumentError
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.container_checkpoint import checkpoint_container
from criserver.runtime.container_create import create_container
from criserver.runtime.container_exec import exec_sync
from criserver.runtime.container_log import reopen_log
from criserver.runtime.container_remove import remove_container
from criserver.runtime.container_start import start_container
from criserver.runtime.container_stop import stop_container
from criserver.runtime.container_stream import attach_address, exec_address, forward_address
from criserver.runtime.container_update import update_container
from criserver.runtime.node import Node
from criserver.runtime.parse import container_config, pod_config
from criserver.runtime.records import Container, Sandbox
from criserver.runtime.refusals import check_container, check_pod, check_resources
from criserver.runtime.sandbox_remove import remove_sandbox
from criserver.runtime.sandbox_run import run_sandbox
from criserver.runtime.sandbox_stop import stop_sandbox
from criserver.runtime.sandbox_update import update_sandbox
from criserver.streaming import RequestedStreams

log = structlog.get_logger(__name__)

# RPCs that are not implemented yet, each with the name of its feature.
MISSING: dict[str, str] = {}

# The version of the kubelet's runtime API, which the kubelet compares with its own. It is not criserver's.
KUBELET_API_VERSION = "0.1.0"


class RuntimeService(StatsRpcs):
    """The methods have the names of the RPCs. CRI documents them."""

    def __init__(self, node: Node, api_version: str) -> None:
        super().__init__(node)
        self._api_version = api_version
        self._sandboxes: Fragments[Sandbox] = Fragments(
            lambda s: cri.ListPodSandboxResponse(items=[views.sandbox(s)]).SerializeToString(),
            lambda s: cri.ListPodSandboxResponse(items=[views.short_sandbox(s)]).SerializeToString(),
            self._limit,
        )
        self._containers: Fragments[Container] = Fragments(
            lambda c: cri.ListContainersResponse(containers=[views.container(c)]).SerializeToString(),
            lambda c: cri.ListContainersResponse(containers=[views.short_container(c)]).SerializeToString(),
            self._limit,
        )

    async def version(self, request: cri.VersionRequest) -> cri.VersionResponse:
        return cri.VersionResponse(
            version=KUBELET_API_VERSION,
            runtime_name="criserver",
            runtime_version=__version__,
            runtime_api_version=self._api_version,
        )

    async def status(self, request: cri.StatusRequest) -> cri.StatusResponse:
        reason = await self._node.network.ready()
        network = cri.RuntimeCondition(type="NetworkReady", status=reason is None)
        if reason is not None:
            network.reason, network.message = "NetworkPluginNotReady", reason
        features = self._node.features
        handlers = {"": features[self._node.config.default_runtime], **features}
        return cri.StatusResponse(
            status=cri.RuntimeStatus(conditions=[cri.RuntimeCondition(type="RuntimeReady", status=True), network]),
            info=status_info(self._node) if request.verbose else {},
            runtime_handlers=[
                cri.RuntimeHandler(
                    name=name,
                    features=cri.RuntimeHandlerFeatures(
                        recursive_read_only_mounts=handler_features.recursive_readonly_mounts,
                        user_namespaces=handler_features.user_namespaces,
                    ),
                )
                for name, handler_features in handlers.items()
            ],
            features=cri.RuntimeFeatures(
                supplemental_groups_policy=True,
                user_namespaces_host_network=any(found.user_namespaces for found in features.values()),
            ),
        )

    async def runtime_config(self, request: cri.RuntimeConfigRequest) -> cri.RuntimeConfigResponse:
        driver = cri.SYSTEMD if self._node.config.cgroup_driver == "systemd" else cri.CGROUPFS
        return cri.RuntimeConfigResponse(linux=cri.LinuxRuntimeConfiguration(cgroup_driver=driver))

    async def update_runtime_config(self, request: cri.UpdateRuntimeConfigRequest) -> cri.UpdateRuntimeConfigResponse:
        # The CNI configuration decides about the pod network. The kubelet sends the CIDR to every runtime.
        log.info("pod CIDR from the kubelet, not used", cidr=request.runtime_config.network_config.pod_cidr)
        return cri.UpdateRuntimeConfigResponse()

    async def run_pod_sandbox(self, request: cri.RunPodSandboxRequest) -> cri.RunPodSandboxResponse:
        check_pod(request.config)
        config = pod_config(request.config)
        sent = request.config.SerializeToString(deterministic=True)
        return cri.RunPodSandboxResponse(
            pod_sandbox_id=await run_sandbox(self._node, config, sent, request.runtime_handler)
        )

    async def stop_pod_sandbox(self, request: cri.StopPodSandboxRequest) -> cri.StopPodSandboxResponse:
        await stop_sandbox(self._node, _required(request.pod_sandbox_id, "pod_sandbox_id"))
        return cri.StopPodSandboxResponse()

    async def remove_pod_sandbox(self, request: cri.RemovePodSandboxRequest) -> cri.RemovePodSandboxResponse:
        await remove_sandbox(self._node, _required(request.pod_sandbox_id, "pod_sandbox_id"))
        return cri.RemovePodSandboxResponse()

    async def pod_sandbox_status(self, request: cri.PodSandboxStatusRequest) -> cri.PodSandboxStatusResponse:
        records = self._node.records
        sandbox = records.visible_sandbox(request.pod_sandbox_id)
        response = cri.PodSandboxStatusResponse(
            status=views.sandbox_status(sandbox),
            containers_statuses=make_each(
                (c for c in records.visible_containers() if c.sandbox_id == sandbox.id), views.container_status
            ),
            timestamp=time.time_ns(),
        )
        if request.verbose:
            response.info.update(await verbose_info(self._node, sandbox))
        return response

    async def list_pod_sandbox(self, request: cri.ListPodSandboxRequest) -> bytes:
        sandboxes = self._filtered_sandboxes(request.filter)
        return self._sandboxes.join(sandboxes, len(self._node.records.sandboxes))

    def _filtered_sandboxes(self, selector: cri.PodSandboxFilter) -> list[Sandbox]:
        sandboxes = select_sandboxes(self._node.records.visible_sandboxes(), selector)
        if selector.HasField("state"):
            sandboxes = [s for s in sandboxes if views.SANDBOX_STATES[s.state] == selector.state.state]
        return sandboxes

    async def create_container(self, request: cri.CreateContainerRequest) -> cri.CreateContainerResponse:
        sandbox = self._node.records.sandbox(request.pod_sandbox_id)
        check_container(request.config, sandbox.config, request.sandbox_config)
        config = container_config(request.config, sandbox.config)
        sent = request.config.SerializeToString(deterministic=True)
        return cri.CreateContainerResponse(container_id=await create_container(self._node, sandbox.id, config, sent))

    async def start_container(self, request: cri.StartContainerRequest) -> cri.StartContainerResponse:
        await start_container(self._node, request.container_id)
        return cri.StartContainerResponse()

    async def stop_container(self, request: cri.StopContainerRequest) -> cri.StopContainerResponse:
        await stop_container(self._node, _required(request.container_id, "container_id"), request.timeout)
        return cri.StopContainerResponse()

    async def remove_container(self, request: cri.RemoveContainerRequest) -> cri.RemoveContainerResponse:
        await remove_container(self._node, _required(request.container_id, "container_id"))
        return cri.RemoveContainerResponse()

    async def container_status(self, request: cri.ContainerStatusRequest) -> cri.ContainerStatusResponse:
        container = self._node.records.visible_container(request.container_id)
        response = cri.ContainerStatusResponse(status=views.container_status(container))
        if request.verbose:
            response.info.update(await verbose_info(self._node, container))
        return response

    async def update_container_resources(
        self, request: cri.UpdateContainerResourcesRequest
    ) -> cri.UpdateContainerResourcesResponse:
        if request.HasField("windows"):
            raise InvalidArgumentError("the windows section is set, and this node runs Linux")
        check_resources(request.linux)
        await update_container(self._node, request.container_id, request.linux)
        return cri.UpdateContainerResourcesResponse()

    async def update_pod_sandbox_resources(
        self, request: cri.UpdatePodSandboxResourcesRequest
    ) -> cri.UpdatePodSandboxResourcesResponse:
        await update_sandbox(self._node, request.pod_sandbox_id, request.overhead, request.resources)
        return cri.UpdatePodSandboxResourcesResponse()

    async def list_containers(self, request: cri.ListContainersRequest) -> bytes:
        containers = self._filtered_containers(request.filter)
        return self._containers.join(containers, len(self._node.records.containers))

    def _filtered_containers(self, selector: cri.ContainerFilter) -> list[Container]:
        containers = select_containers(self._node.records.visible_containers(), selector)
        if selector.HasField("state"):
            containers = [c for c in containers if views.CONTAINER_STATES[c.state] == selector.state.state]
        return containers

    async def get_container_events(self, request: cri.GetEventsRequest) -> AsyncIterator[cri.ContainerEventResponse]:
        async for event in self._node.events.listen():
            yield views.event(event)

    async def stream_pod_sandboxes(
        self, request: cri.StreamPodSandboxesRequest
    ) -> AsyncIterator[cri.StreamPodSandboxesResponse]:
        async for batch in batches(make_in_slices(self._filtered_sandboxes(request.filter), views.sandbox)):
            yield cri.StreamPodSandboxesResponse(pod_sandboxes=batch)

    async def stream_containers(
        self, request: cri.StreamContainersRequest
    ) -> AsyncIterator[cri.StreamContainersResponse]:
        async for batch in batches(make_in_slices(self._filtered_containers(request.filter), views.container)):
            yield cri.StreamContainersResponse(containers=batch)

    async def exec_sync(self, request: cri.ExecSyncRequest) -> bytes:
        result = await exec_sync(self._node, request.container_id, request.cmd, request.timeout)
        return views.exec_result(result)

    async def exec(self, request: cri.ExecRequest) -> cri.ExecResponse:
        requested = RequestedStreams(request.stdin, request.stdout, request.stderr, request.tty)
        return cri.ExecResponse(url=exec_address(self._node, request.container_id, list(request.cmd), requested))

    async def attach(self, request: cri.AttachRequest) -> cri.AttachResponse:
        requested = RequestedStreams(request.stdin, request.stdout, request.stderr, request.tty)
        return cri.AttachResponse(url=attach_address(self._node, request.container_id, requested))

    async def port_forward(self, request: cri.PortForwardRequest) -> cri.PortForwardResponse:
        return cri.PortForwardResponse(url=forward_address(self._node, request.pod_sandbox_id, list(request.port)))

    async def checkpoint_container(self, request: cri.CheckpointContainerRequest) -> cri.CheckpointContainerResponse:
        await checkpoint_container(self._node, request.container_id, request.location, request.timeout)
        return cri.CheckpointContainerResponse()

    async def reopen_container_log(self, request: cri.ReopenContainerLogRequest) -> cri.ReopenContainerLogResponse:
        await reopen_log(self._node, request.container_id)
        return cri.ReopenContainerLogResponse()


def _required(value: str, field: str) -> str:
    if not value:
        raise InvalidArgumentError(f"{field} is empty; it must be set")
    return value
