"""StopContainer: the stop signal, the grace, and SIGKILL."""

from __future__ import annotations

import asyncio
import dataclasses
import signal

import structlog

from criserver.errors import NotFoundError
from criserver.runtime import cgroups, process_records
from criserver.runtime.container_process import STOPPED, ContainerProcess
from criserver.runtime.lifecycle import ContainerState
from criserver.runtime.node import Node
from criserver.runtime.records import Container
from criserver.telemetry import operations

log = structlog.get_logger(__name__)


async def stop_container(node: Node, id_or_prefix: str, grace: float) -> None:
    """Stop a container: its stop signal, ``grace`` seconds, then SIGKILL. Idempotent (CRI).

    Only the first call for a container sends the stop signal: many programs end at once with a second one. Each call
    waits for its own grace. A grace of 0 or less kills at once. A start under way is ended at once, as no process can
    take a signal yet. Raises DeadlineExceededError where even SIGKILL does not end the container.
    """
    try:
        container = node.records.container(id_or_prefix)
    except NotFoundError:
        return
    await node.finish(_stop_and_tell(node, container, grace))


async def _stop_and_tell(node: Node, container: Container, grace: float) -> None:
    await _stop(node, container.id, grace)
    stopped = node.records.containers.get(container.id)
    if stopped is not None and stopped.state is ContainerState.EXITED:
        await node.plugins.container_stopped(stopped)


async def kill(node: Node, container: Container) -> None:
    """End a container at once; it is no error where it does not run."""
    await _stop(node, container.id, 0)


async def _stop(node: Node, container_id: str, grace: float) -> None:
    process = node.processes.get(container_id)
    if process is not None:
        if process.checkpoint is not None and not process.checkpoint.thawed:
            process.checkpoint.cut.set()
        process.cut_start()
    # The lock is held until a start or checkpoint under way has ended, and not during the grace: another call with a
    # shorter grace must be able to end the container at once.
    async with node.lock(container_id):
        container = node.records.containers.get(container_id)
        if container is None or container.state not in (ContainerState.STARTING, ContainerState.RUNNING):
            return
        process = process_records.of_container(node, container)
        if container.state is ContainerState.STARTING:
            # A start of this daemon would hold the lock, so an earlier daemon began this one.
            await process.end_start()
            process.start_failed(STOPPED)
            return
    # From here on no checkpoint freezes the container. Somebody else may have frozen it, and a frozen process takes no
    # signal, not even SIGKILL.
    process.stopping = True
    await asyncio.to_thread(cgroups.thaw, process.cgroup)
    if grace > 0:
        with operations.STOP.timed(_signal_name(container.stop_signal)):
            _signal_once(node, container_id, process)
            if await process.wait(grace):
                return
        log.info("grace is over", container=container_id, seconds=grace)
    await process.kill(node.config.ctr_stop_timeout)


def _signal_once(node: Node, container_id: str, process: ContainerProcess) -> None:
    """Send the stop signal unless an earlier call has. A later daemon knows of it too."""
    container = node.records.containers.get(container_id)
    if container is None or container.stop_signalled:
        return
    process.signal(container.stop_signal)
    node.records.observe(dataclasses.replace(container, stop_signalled=True))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between the first and the last one
        return str(number)
