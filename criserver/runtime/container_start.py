"""StartContainer: a shim is forked, and it runs the bundle with one call of the OCI runtime."""

from __future__ import annotations

import dataclasses

import structlog

from criserver.errors import CriError, FailedPreconditionError
from criserver.runtime import supervision
from criserver.runtime.node import Node
from criserver.runtime.records import ContainerState, SandboxState

log = structlog.get_logger(__name__)


async def start_container(node: Node, given: str) -> None:
    """Start a created container. Raises FailedPreconditionError for one in any other state.

    One whose process cannot be started ends as exited with code 128 and reason StartError, for the kubelet to
    show, and the runtime's words are the error.
    """
    container_id = node.registry.container(given).id
    await node.attempts.run(f"start {container_id}", b"", lambda: _start(node, container_id))


async def _start(node: Node, container_id: str) -> str:
    async with node.lock(container_id):
        container = node.registry.container(container_id)
        if container.state is not ContainerState.CREATED:
            raise FailedPreconditionError(f"container {container_id} is {container.state.value}, not created")
        sandbox = node.registry.sandbox(container.sandbox_id)
        if sandbox.state is not SandboxState.READY:
            raise FailedPreconditionError(f"pod sandbox {sandbox.id} is {sandbox.state.value}; run a new one")
        container = dataclasses.replace(container, state=ContainerState.STARTING)
        node.registry.save(container)
        try:
            started = await supervision.start(
                node,
                container_id,
                handler=sandbox.runtime,
                cgroup_parent=sandbox.cgroup_parent,
                log_path=container.log_path,
                tty=container.config.tty,
                stdin=container.config.stdin,
            )
        except CriError as e:
            supervision.start_failed(node, container_id, str(e))
            raise type(e)(f"container {container.config.name} cannot be started: {e}") from e
        supervision.running(node, container_id, started)
    return container_id
