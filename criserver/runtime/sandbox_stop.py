"""StopPodSandbox: the pod's containers, network and namespaces are released. Its record and its logs stay."""

from __future__ import annotations

import asyncio
import dataclasses
import os

import structlog

from criserver.errors import NotFoundError
from criserver.network import Attachment, namespaces
from criserver.runtime import (
    cadvisor_cgroup,
    cgroups,
    filesystems,
    pod_namespaces,
    process_records,
    sandbox_files,
    userns_access,
)
from criserver.runtime.container_stop import kill
from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.node import Node
from criserver.runtime.records import Container, Sandbox

log = structlog.get_logger(__name__)


async def stop_sandbox(node: Node, id_or_prefix: str) -> None:
    """Stop a sandbox: its containers are killed, its network and namespaces released. Idempotent (CRI).

    Raises CriError where a network plugin fails; the next call tries again.
    """
    try:
        sandbox_id = node.records.sandbox(id_or_prefix).id
    except NotFoundError:
        return
    await node.finish(_stop(node, sandbox_id))


async def _stop(node: Node, sandbox_id: str) -> None:
    cut_infra_start(node, sandbox_id)
    async with node.lock(sandbox_id):
        sandbox = node.records.sandboxes.get(sandbox_id)
        if sandbox is not None:
            await stop_locked(node, sandbox)


async def stop_locked(node: Node, sandbox: Sandbox, left: list[str] | None = None) -> Sandbox:
    """Stop the sandbox; the caller holds its lock. Every step succeeds where nothing is left to do.

    :func:`release` says what ``left`` is.
    """
    if sandbox.state is SandboxState.READY:
        # This comes first: from now on no container is made or started in it, even if a step below fails. A full disk
        # must not prevent it, as stopping and removing pods is what frees the disk.
        sandbox = sandbox.not_ready("it was stopped")
        await node.records.observe(sandbox)
        node.attempts.drop(f"pod sandbox {sandbox.config.full_name}")
    await asyncio.gather(*(_end(node, c) for c in node.records.containers_of(sandbox.id)))
    await node.plugins.sandbox_stopped(sandbox)
    await release(node, sandbox, left)
    if sandbox.attachment:
        sandbox = dataclasses.replace(sandbox, attachment="")
        await node.records.observe(sandbox)
    return sandbox


async def _end(node: Node, container: Container) -> None:
    """End a container with all its processes. Those that are left after the first one would use the pod's network."""
    await kill(node, container)
    async with node.lock(container.id):
        ended = node.records.containers.get(container.id)
        if ended is not None and ended.state in (ContainerState.EXITED, ContainerState.REMOVING):
            process = process_records.of_container(node, ended)
            await process.wait_cleaned_up()
            await process.destroy()
    if ended is not None and ended.state is ContainerState.EXITED:
        await node.plugins.container_stopped(ended)


async def release(node: Node, sandbox: Sandbox, left: list[str] | None = None) -> None:
    """Undo what RunPodSandbox did, in reverse order. It is no error where a part is gone or was never made.

    Raises CriError where a network plugin fails. With a list ``left`` its failure goes there, and the rest goes on.
    """
    if sandbox.has_infra:
        await stop_infra(node, sandbox)
    if sandbox.attachment:
        attachment = Attachment.from_json(sandbox.attachment)
        if left is None:
            await node.network.delete(attachment)
        else:
            left += await node.network.delete_by_force(attachment)
    node.stats.networks.forget(pod_namespaces.network_pin(node, sandbox.id))
    await asyncio.to_thread(_remove_pins_and_files, node, sandbox)
    if sandbox.config.namespaces.user is not None:
        userns_access.update(node, leaving=sandbox.id)
    await cadvisor_cgroup.remove(node, sandbox)
    if sandbox.cgroup_owned:
        await cgroups.remove_pod(sandbox.cgroup_parent)
        if not any(s.cgroup_owned and s.id != sandbox.id for s in node.records.sandboxes.values()):
            # Only with the last pod: another one may be making its cgroup below it at this moment.
            cgroups.remove_own()


def cut_infra_start(node: Node, sandbox_id: str) -> None:
    """End the start of the pod's infra process, where one is under way."""
    process = node.processes.get(sandbox_id)
    if process is not None:
        process.cut_start()


def _remove_pins_and_files(node: Node, sandbox: Sandbox) -> None:
    """Undo what the pod has below the state directory. Blocks. Raises CriError."""
    namespaces.unpin(node.namespaces_dir(sandbox.id))
    sandbox_files.remove(node.sandbox_files_dir(sandbox.id), node.sandbox_dir(sandbox.id))


async def stop_infra(node: Node, sandbox: Sandbox) -> None:
    """End the pod's own process; there may be none any more."""
    await asyncio.to_thread(pod_namespaces.unpin_pids, node, sandbox.id)
    directory = node.container_dir(sandbox.id)
    if not os.path.lexists(directory):
        return
    process = process_records.of_infra(node, sandbox)
    if process.started is not None:
        # The runtime's own delete polls for the end of the process, ten times a second.
        await process.kill(node.config.ctr_stop_timeout)
        await process.wait_cleaned_up()
    await process.destroy()
    await process.wait_cleaned_up()
    node.let_go_of_process(sandbox.id)
    await filesystems.delete(directory)
