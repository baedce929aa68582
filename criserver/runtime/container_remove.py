"""RemoveContainer: the container's process, writable layer, bundle and record are removed. Its log is the kubelet's."""

from __future__ import annotations

import dataclasses

import structlog

from criserver import logs
from criserver.errors import NotFoundError
from criserver.runtime import container_checkpoint, filesystems, process_records
from criserver.runtime.container_stop import kill
from criserver.runtime.lifecycle import ContainerState
from criserver.runtime.node import Node
from criserver.runtime.records import Container

log = structlog.get_logger(__name__)


async def remove_container(node: Node, id_or_prefix: str) -> None:
    """Remove a container, running or not. Idempotent (CRI)."""
    try:
        container = node.records.container(id_or_prefix)
    except NotFoundError:
        return
    await node.finish(remove_locked(node, container))


async def remove_locked(node: Node, container: Container) -> None:
    """Remove a container. The caller may hold the lock of its sandbox, but not the container's own."""
    await kill(node, container)
    await node.plugins.container_stopped(container)
    async with node.lock(container.id):
        found = node.records.containers.get(container.id)
        if found is None:
            return
        name = node.records.container_name(found)
        found = dataclasses.replace(found, state=ContainerState.REMOVING)
        await node.records.observe(found)
        process = process_records.of_container(node, found)
        await process.wait_cleaned_up()
        await process.destroy()
        await filesystems.discard(node, found.id)
        if process.checkpoint is None:
            await container_checkpoint.discard_rest(node, found.id)
        await node.plugins.container_removed(found)
        await node.records.forget(found)
        for attempt in (f"container {name}", f"start {found.id}"):
            node.attempts.drop(attempt)
        node.let_go_of_process(found.id)
    # Its image, or an image that it had as a volume, may have been removed before the container.
    node.background(node.images.collect(), "garbage collection after a container's removal failed")
    log.info("container removed", container=container.id, seconds=logs.elapsed())
