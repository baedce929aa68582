"""The pod and the container that a call is for.

The lines that the call logs name them. And the call waits while the daemon recovers that pod after a start. Lists, and
calls for other pods, do not wait.
"""

from __future__ import annotations

from typing import Any

from criserver import logs
from criserver.errors import CriError
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.node import Node
from criserver.runtime.parse import pod_config
from criserver.telemetry import operations


async def prepare(node: Node, request: Any) -> None:
    """Name the subject of a request in the log, and wait for its pod's recovery if that is under way."""
    try:
        sandbox_id = _name(node, request)
    except CriError:
        return  # the RPC raises it too, with its own words
    if sandbox_id in node.recovering:
        with operations.RECOVERY.timed():
            await node.recovered(sandbox_id)


def _name(node: Node, request: Any) -> str:
    """The ID of the sandbox; "" for a request that names none. Raises NotFoundError for one that does not exist."""
    if isinstance(request, cri.RunPodSandboxRequest):
        metadata = request.config.metadata
        logs.about(pod=f"{metadata.namespace}/{metadata.name}")
        # The RPC reads the request too. It is read here only during recovery.
        return node.records.holder(pod_config(request.config).full_name) if node.recovering else ""
    if isinstance(request, cri.PullImageRequest):
        # A kubelet names the pod for which it pulls.
        metadata = request.sandbox_config.metadata
        if metadata.name:
            logs.about(pod=f"{metadata.namespace}/{metadata.name}")
        logs.about(reference=request.image.image)
        return ""
    if isinstance(request, cri.RemoveImageRequest):
        logs.about(reference=request.image.image)
        return ""
    if isinstance(request, admin.PullImageRequest):
        logs.about(reference=request.name)
        return ""
    if isinstance(request, admin.RemoveImageRequest):
        logs.about(reference=request.image)
        return ""
    if isinstance(request, admin.RemovePodRequest):
        sandbox = node.records.sandbox(request.id)
        logs.about(**sandbox.named)
        return sandbox.id
    if sandbox_id := getattr(request, "pod_sandbox_id", ""):
        sandbox = node.records.sandbox(sandbox_id)
        logs.about(**sandbox.named)
        if isinstance(request, cri.CreateContainerRequest):
            image = request.config.image
            logs.about(name=request.config.metadata.name, reference=image.user_specified_image or image.image)
        return sandbox.id
    if container_id := getattr(request, "container_id", ""):
        container = node.records.container(container_id)
        logs.about(**node.records.sandbox(container.sandbox_id).named, **container.named)
        return container.sandbox_id
    return ""
