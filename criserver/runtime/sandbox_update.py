"""UpdatePodSandboxResources: what the pod as a whole is sized at has changed.

The kubelet sets the limits of the pod's cgroup itself; a runtime keeps the figures for those who ask it (CRI
UpdatePodSandboxResources).
"""

from __future__ import annotations

import dataclasses

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.node import Node


def update_sandbox(
    node: Node, given: str, overhead: cri.LinuxContainerResources, resources: cri.LinuxContainerResources
) -> None:
    """Record the pod's new resources and overhead, as a verbose status shows them. Raises NotFoundError."""
    sandbox = node.registry.sandbox(given)
    sent = cri.PodSandboxConfig.FromString(sandbox.sent)
    sent.linux.resources.CopyFrom(resources)
    sent.linux.overhead.CopyFrom(overhead)
    node.registry.save(dataclasses.replace(sandbox, sent=sent.SerializeToString(deterministic=True)))
