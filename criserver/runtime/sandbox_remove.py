"""RemovePodSandbox: the pod, its containers and its record are removed."""

from __future__ import annotations

import dataclasses

import structlog

from criserver import logs
from criserver.errors import NotFoundError
from criserver.runtime.container_remove import remove_locked
from criserver.runtime.lifecycle import SandboxState
from criserver.runtime.node import Node
from criserver.runtime.sandbox_stop import cut_infra_start, stop_locked

log = structlog.get_logger(__name__)


async def remove_sandbox(node: Node, id_or_prefix: str) -> None:
    """Remove a sandbox, running or not, with all its containers. Idempotent (CRI)."""
    try:
        sandbox_id = node.records.sandbox(id_or_prefix).id
    except NotFoundError:
        return
    await node.finish(_remove(node, sandbox_id, None))


async def remove_sandbox_by_force(node: Node, id_or_prefix: str) -> list[str]:
    """As :func:`remove_sandbox`, also where the sandbox's network plugins fail.

    The sandbox's namespace and its interfaces end all the same. Returns what the plugins could not undo, in words: the
    cluster's operator must clean up what the network keeps elsewhere, such as a lease. Raises NotFoundError.
    """
    left: list[str] = []
    await node.finish(_remove(node, node.records.sandbox(id_or_prefix).id, left))
    return left


async def _remove(node: Node, sandbox_id: str, left: list[str] | None) -> None:
    cut_infra_start(node, sandbox_id)
    async with node.lock(sandbox_id):
        sandbox = node.records.sandboxes.get(sandbox_id)
        if sandbox is None:
            return
        sandbox = dataclasses.replace(sandbox, state=SandboxState.REMOVING)
        await node.records.observe(sandbox)
        sandbox = await stop_locked(node, sandbox, left)
        for container in node.records.containers_of(sandbox_id):
            await remove_locked(node, container)
        await node.records.forget(sandbox)
        node.attempts.drop(f"pod sandbox {sandbox.config.full_name}")
    log.info("pod sandbox removed", sandbox=sandbox_id, seconds=logs.elapsed())
