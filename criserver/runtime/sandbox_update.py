"""UpdatePodSandboxResources: the resources of the pod as a whole have changed.

The kubelet sets the limits of the pod's cgroup itself. The runtime records the figures and shows them in a verbose
status (CRI UpdatePodSandboxResources).
"""

from __future__ import annotations

import dataclasses

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.node import Node
from criserver.runtime.records import Sandbox


async def update_sandbox(
    node: Node, id_or_prefix: str, overhead: cri.LinuxContainerResources, resources: cri.LinuxContainerResources
) -> None:
    """Record the pod's new resources and overhead, as a verbose status shows them. Raises NotFoundError."""
    sandbox = node.records.sandbox(id_or_prefix)
    sent = cri.PodSandboxConfig.FromString(sandbox.sent)
    sent.linux.resources.CopyFrom(resources)
    sent.linux.overhead.CopyFrom(overhead)
    await node.finish(_save(node, dataclasses.replace(sandbox, sent=sent.SerializeToString(deterministic=True))))


async def _save(node: Node, sandbox: Sandbox) -> None:
    await node.records.save(sandbox)
