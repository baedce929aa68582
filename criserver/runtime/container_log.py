"""ReopenContainerLog: the kubelet has moved the log file away; the shim is to write to a new one."""

from __future__ import annotations

from criserver.errors import FailedPreconditionError
from criserver.runtime.node import Node
from criserver.runtime.records import ContainerState


async def reopen_log(node: Node, given: str) -> None:
    """Have the container's shim open its log path anew. Raises FailedPreconditionError where it does not run."""
    container = node.registry.container(given)
    link = node.links.get(container.id)
    if container.state is not ContainerState.RUNNING or link is None:
        raise FailedPreconditionError(
            f"container {container.id} is {container.state.value}; only a running one has a log to reopen"
        )
    await link.request({"op": "reopen"})
