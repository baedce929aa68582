"""Calls for a pod wait while the daemon recovers it after a start. Lists, and calls for other pods, do not."""

from __future__ import annotations

from typing import Any

from criserver.errors import CriError
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.node import Node
from criserver.runtime.parse import pod_config


async def pod_recovered(node: Node, request: Any) -> None:
    """Wait for the recovery of the pod that a request is for, if that is under way."""
    if node.recovering:
        await node.recovered(_sandbox_of(node, request))


def _sandbox_of(node: Node, request: Any) -> str:
    """The ID of the sandbox; "" for a request that names none, or none that exists."""
    try:
        if isinstance(request, cri.RunPodSandboxRequest):
            return node.records.holder(pod_config(request.config).full_name)
        if sandbox := getattr(request, "pod_sandbox_id", ""):
            return node.records.sandbox(sandbox).id
        if container := getattr(request, "container_id", ""):
            return node.records.container(container).sandbox_id
    except CriError:
        pass  # the RPC raises it too, with its own words
    return ""
