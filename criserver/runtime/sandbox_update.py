"""UpdatePodSandboxResources: the resources of the pod as a whole have changed.

The kubelet sets the limits of the pod's cgroup itself. The runtime records the figures and shows them in a verbose
status (CRI UpdatePodSandboxResources).
"""

from __future__ import annotations

import dataclasses

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.node import Node


async def update_sandbox(
    node: Node, id_or_prefix: str, overhead: cri.LinuxContainerResources, resources: cri.LinuxContainerResources
) -> None:
    """Record the pod's new resources and overhead, as a verbose status shows them.

    Raises NotFoundError, and the error of a plugin; nothing has changed then.
    """
    sandbox_id = node.records.sandbox(id_or_prefix).id

    async def update() -> None:
        async with node.lock(sandbox_id):
            await node.plugins.update_sandbox(node.records.sandbox(sandbox_id), overhead, resources)
            # Read after the plugins' answer: the pod's own process may have ended meanwhile.
            sandbox = node.records.sandbox(sandbox_id)
            sent = cri.PodSandboxConfig.FromString(sandbox.sent)
            sent.linux.resources.CopyFrom(resources)
            sent.linux.overhead.CopyFrom(overhead)
            changed = dataclasses.replace(sandbox, sent=sent.SerializeToString(deterministic=True))
            await node.plugins.sandbox_updated(await node.records.save(changed))

    await node.finish(update())
