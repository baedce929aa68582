"""StopContainer: the stop signal, the grace, and SIGKILL."""

from __future__ import annotations

import asyncio
import signal

import structlog

from criserver.errors import DeadlineExceededError, NotFoundError
from criserver.runtime import cgroups, supervision
from criserver.runtime.lifecycle import ContainerState
from criserver.runtime.node import Node
from criserver.runtime.records import Container

log = structlog.get_logger(__name__)

# A killed process ends at once unless the kernel holds it (a dead network disk); its shim then drains the log.
KILL_TIMEOUT = 30.0
# What a shim may take to tell of a process that has ended; after that it is looked whether the shim is stuck.
SHIM_PATIENCE = 5.0


async def stop_container(node: Node, given: str, grace: float) -> None:
    """Stop a container: its stop signal, ``grace`` seconds, then SIGKILL. Idempotent (CRI).

    A grace of 0 or less kills at once, and a start under way is ended at once: there is nothing yet that could take a
    signal. Raises DeadlineExceededError where even SIGKILL does not end it.
    """
    try:
        container = node.registry.container(given)
    except NotFoundError:
        return
    await node.finish(_stop(node, container.id, grace))


async def kill(node: Node, container: Container) -> None:
    """End a container at once; one that does not run is no error."""
    await _stop(node, container.id, 0)


async def _stop(node: Node, container_id: str, grace: float) -> None:
    checkpoint = node.checkpoints.get(container_id)
    if checkpoint is not None and not checkpoint.thawed:
        checkpoint.cut.set()
    supervision.cut_start(node, container_id)
    # The lock is held only to let a start or checkpoint under way come to its end: a long grace must not keep another
    # call, with a shorter one, from ending the container at once.
    async with node.lock(container_id):
        container = node.registry.containers.get(container_id)
        if container is not None and container.state is ContainerState.STARTING:
            await _end_start(node, container)
            return
    if container is None or container.state is not ContainerState.RUNNING:
        return
    # From here on no checkpoint freezes it; whoever else did, a frozen process takes no signal, not even SIGKILL.
    node.stopping.add(container_id)
    cgroups.thaw(cgroups.path(node.registry.sandbox(container.sandbox_id).cgroup_parent, container_id))
    ended = node.exits[container_id]
    if grace > 0:
        supervision.send_signal(container, container.stop_signal)
        try:
            async with asyncio.timeout(grace):
                await ended.wait()
            return
        except TimeoutError:
            log.info("grace is over", container=container_id, seconds=grace)
    supervision.send_signal(container, signal.SIGKILL)
    try:
        async with asyncio.timeout(KILL_TIMEOUT):
            while not ended.is_set():
                try:
                    await asyncio.wait_for(ended.wait(), SHIM_PATIENCE)
                except TimeoutError:
                    await supervision.replace_stuck_shim(node, container)
    except TimeoutError:
        raise DeadlineExceededError(
            f"container {container_id} (PID {container.pid}) has not ended {KILL_TIMEOUT:g} s after SIGKILL"
        ) from None


async def _end_start(node: Node, container: Container) -> None:
    """End a start that an earlier daemon began, under the container's lock: one of our own would hold that."""
    sandbox = node.registry.sandbox(container.sandbox_id)
    with supervision.under_way(node, container.id):
        await supervision.end_start(node, container.id, sandbox.runtime, sandbox.cgroup_parent)
    supervision.start_failed(node, container.id, supervision.STOPPED)
