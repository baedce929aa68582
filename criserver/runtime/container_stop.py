"""StopContainer: the stop signal, the grace, and SIGKILL."""

from __future__ import annotations

import structlog

from criserver.errors import NotFoundError
from criserver.runtime import cgroups, process_records
from criserver.runtime.container_process import STOPPED
from criserver.runtime.lifecycle import ContainerState
from criserver.runtime.node import Node
from criserver.runtime.records import Container

log = structlog.get_logger(__name__)


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
    process = node.processes.get(container_id)
    if process is not None:
        if process.checkpoint is not None and not process.checkpoint.thawed:
            process.checkpoint.cut.set()
        process.cut_start()
    # The lock is held only to let a start or checkpoint under way come to its end: a long grace must not keep another
    # call, with a shorter one, from ending the container at once.
    async with node.lock(container_id):
        container = node.registry.containers.get(container_id)
        if container is None or container.state not in (ContainerState.STARTING, ContainerState.RUNNING):
            return
        process = process_records.of_container(node, container)
        if container.state is ContainerState.STARTING:
            # An earlier daemon began this start: one of our own would hold the lock.
            await process.end_start()
            process.start_failed(STOPPED)
            return
    # From here on no checkpoint freezes it. If somebody else did: a frozen process takes no signal, not even SIGKILL.
    process.stopping = True
    cgroups.thaw(process.cgroup)
    if grace > 0:
        process.signal(container.stop_signal)
        if await process.wait(grace):
            return
        log.info("grace is over", container=container_id, seconds=grace)
    await process.kill()
