"""StopPodSandbox: everything of a pod that holds resources is let go; its record and logs stay."""

from __future__ import annotations

import asyncio
import dataclasses
import os

import structlog

from criserver.errors import CriError, NotFoundError
from criserver.network import Attachment, namespaces
from criserver.runtime import cgroups, filesystems, passage, sandbox_files, supervision
from criserver.runtime.container_stop import kill
from criserver.runtime.lifecycle import SandboxState
from criserver.runtime.node import Node
from criserver.runtime.records import Sandbox
from snapshotter import mounts, tree

log = structlog.get_logger(__name__)


async def stop_sandbox(node: Node, given: str) -> None:
    """Stop a sandbox: its containers are killed, its network and namespaces released. Idempotent (CRI).

    Raises CriError where the network plugins refuse to let go; the next call tries again.
    """
    try:
        sandbox_id = node.registry.sandbox(given).id
    except NotFoundError:
        return
    await node.finish(_stop(node, sandbox_id))


async def _stop(node: Node, sandbox_id: str) -> None:
    supervision.cut_start(node, sandbox_id)  # of its infra process, while it is made
    async with node.lock(sandbox_id):
        sandbox = node.registry.sandboxes.get(sandbox_id)
        if sandbox is not None:
            await stop_locked(node, sandbox)


async def stop_locked(node: Node, sandbox: Sandbox) -> Sandbox:
    """Stop the sandbox under its lock, which the caller holds. Every step succeeds where its thing is gone."""
    if sandbox.state is SandboxState.READY:
        # First of all: no container is made or started in it any more, whatever fails below. On a full disk too:
        # stopping and removing is what frees it.
        sandbox = dataclasses.replace(sandbox, state=SandboxState.NOT_READY)
        node.registry.observe(sandbox)
        node.attempts.drop(f"pod sandbox {sandbox.config.full_name}")
    await asyncio.gather(*(kill(node, c) for c in node.registry.containers_of(sandbox.id)))
    await release(node, sandbox)
    if sandbox.attachment:
        sandbox = dataclasses.replace(sandbox, attachment="")
        node.registry.observe(sandbox)
    return sandbox


async def release(node: Node, sandbox: Sandbox) -> None:
    """Undo all that running a sandbox did, in reverse; what is gone, or was never made, is no error."""
    await stop_infra(node, sandbox)
    if sandbox.attachment:
        await node.network.delete(Attachment.from_json(sandbox.attachment))
    pins = node.namespaces_dir(sandbox.id)
    node.stats.networks.forget(os.path.join(pins, "net"))
    await asyncio.to_thread(namespaces.unpin, pins)
    await asyncio.to_thread(sandbox_files.remove, node.sandbox_files_dir(sandbox.id), node.sandbox_dir(sandbox.id))
    if sandbox.config.namespaces.user is not None:
        passage.update(node, leaving=sandbox.id)
    if sandbox.cgroup_owned:
        await cgroups.remove_pod(sandbox.cgroup_parent)
        if not any(s.cgroup_owned and s.id != sandbox.id for s in node.registry.sandboxes.values()):
            # Not while another pod may be making its own in there.
            cgroups.remove_own()


def pid_pin(node: Node, sandbox_id: str) -> str:
    """Where the PID namespace is pinned that the containers of a pod share."""
    return os.path.join(node.namespaces_dir(sandbox_id), "pid")


def unpin_pids(node: Node, sandbox_id: str) -> None:
    """Let go of a shared PID namespace; where none is pinned that is no error. Raises CriError."""
    pin = pid_pin(node, sandbox_id)
    try:
        mounts.unmount(pin)
        tree.remove_path(pin)
    except OSError as e:
        raise CriError(f"cannot remove the pinned namespace {pin}: {e}") from e


async def stop_infra(node: Node, sandbox: Sandbox) -> None:
    """End the process that holds the pod's PID namespace, where it has one."""
    unpin_pids(node, sandbox.id)
    directory = node.container_dir(sandbox.id)
    if not os.path.lexists(directory):
        return
    await supervision.destroy(node, sandbox.id, sandbox.runtime, sandbox.cgroup_parent)
    await supervision.wait_gone(node, sandbox.id)
    node.exits.pop(sandbox.id, None)
    node.gone.pop(sandbox.id, None)
    await filesystems.delete(directory)
