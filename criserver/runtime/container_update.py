"""UpdateContainerResources: new limits for a container, running or not yet."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog

from criserver.errors import FailedPreconditionError
from criserver.model import PodConfig
from criserver.oci.spec_inputs import Spec
from criserver.oci.spec_resources import complete_limits, merge_limits, resource_limits
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups, host, pidfd, process_records
from criserver.runtime.lifecycle import ContainerState
from criserver.runtime.node import Node
from criserver.runtime.node_plugins import Limits
from criserver.runtime.parse import container_config, resources
from criserver.runtime.records import Container, Sandbox
from criserver.runtime.spec_file import read_spec, write_spec
from criserver.stats import CgroupUsage

log = structlog.get_logger(__name__)

_SWAP = "memory.swap.max"


async def update_container(node: Node, id_or_prefix: str, asked: cri.LinuxContainerResources) -> None:
    """Set the limits that ``asked`` has; a limit that it does not set stays as it is.

    For a container that has exited this only changes the limits in its record, as in containerd: the kubelet may ask
    for it as the container ends. Raises FailedPreconditionError for a container that is being removed, for a memory
    limit below the container's present use, and where the kernel refuses a limit. Nothing has changed then.
    """
    container_id = node.records.container(id_or_prefix).id
    await node.finish(_update(node, container_id, asked))


async def set_limits(node: Node, container_id: str, limits: Limits) -> None:
    """Set limits that plugins ask for; no plugin is told. Raises as :func:`update_container` does."""
    await node.finish(_set_limits(node, container_id, limits))


async def _update(node: Node, container_id: str, asked: cri.LinuxContainerResources) -> None:
    async with node.lock(container_id):
        container = _alterable(node, container_id)
        limits = Limits(asked, _limits(node, container, asked))
        if container.state is not ContainerState.EXITED:
            limits = await node.plugins.update_container(container, limits)
        await _change(node, container, limits)
        if container.state is not ContainerState.EXITED:
            await node.plugins.container_updated(node.records.container(container_id))
    await node.plugins.apply(limits.after)


async def _set_limits(node: Node, container_id: str, limits: Limits) -> None:
    async with node.lock(container_id):
        await _change(node, _alterable(node, container_id), limits)


def _alterable(node: Node, container_id: str) -> Container:
    container = node.records.container(container_id)
    if container.state not in (ContainerState.CREATED, ContainerState.RUNNING, ContainerState.EXITED):
        raise FailedPreconditionError(f"container {container_id} is {container.state.value}; it has no limits")
    return container


def _limits(node: Node, container: Container, asked: cri.LinuxContainerResources) -> Spec:
    """The limits that ``asked`` sets. A limit of swap among them is the one that the record will have."""
    limits = resource_limits(resources(asked), host.facts())
    changed = with_resources(container, node.records.sandbox(container.sandbox_id).config, asked)
    in_force = resource_limits(changed.config.resources, host.facts())
    if _SWAP in limits.get("unified", {}):
        limits["unified"][_SWAP] = in_force["unified"][_SWAP]
    return limits


async def _change(node: Node, container: Container, limits: Limits) -> None:
    sandbox, asked = node.records.sandbox(container.sandbox_id), limits.asked
    changed = with_resources(container, sandbox.config, asked)
    in_force = resource_limits(changed.config.resources, host.facts())
    oci = complete_limits(limits.oci, in_force, host.facts())
    if container.state is ContainerState.RUNNING:
        await _apply(node, sandbox, changed, oci, in_force.get("hugepageLimits", ()))
        if asked.oom_score_adj:
            await asyncio.to_thread(_set_oom_score, node, changed, asked.oom_score_adj)
    if container.state is not ContainerState.EXITED:
        _rewrite(node, container.id, oci, asked.oom_score_adj)
    # The container may have exited meanwhile. Only the limits in its record are replaced.
    current = node.records.container(container.id)
    await node.records.save(dataclasses.replace(current, config=changed.config, sent=changed.sent))


def with_resources(container: Container, pod: PodConfig, asked: cri.LinuxContainerResources) -> Container:
    """The record with what ``asked`` sets."""
    sent = cri.ContainerConfig.FromString(container.sent)
    _merge(sent.linux.resources, asked)
    config, message = container_config(sent, pod), sent.SerializeToString(deterministic=True)
    return dataclasses.replace(container, config=config, sent=message)


def _merge(into: cri.LinuxContainerResources, asked: cri.LinuxContainerResources) -> None:
    """Merge as protobuf does, with three exceptions:

    1. A new list of limits replaces the old one.
    2. A new memory limit without a swap limit replaces both, as for a new container.
    3. A new swap limit replaces the one of ``unified``, which would stay in force.
    """
    if asked.hugepage_limits:
        del into.hugepage_limits[:]
    if asked.memory_limit_in_bytes:
        into.memory_swap_limit_in_bytes = 0
    if asked.memory_swap_limit_in_bytes:
        into.unified.pop(_SWAP, None)
    into.MergeFrom(asked)


async def _apply(
    node: Node, sandbox: Sandbox, container: Container, oci: Spec, pages: Sequence[Mapping[str, Any]]
) -> None:
    """Set the limits ``oci``. ``pages`` are all limits of huge pages, also those that stay as they are."""
    limit = oci.get("memory", {}).get("limit", 0)
    cgroup = cgroups.path(container.parent_cgroup(sandbox), container.id)
    usage = node.stats.cgroups.reader(cgroup).usage
    if host.facts().unified_cgroups:
        _check_memory(container.id, limit, usage())
    undo = await _limit_huge_pages(container.id, cgroup, pages)
    try:
        await process_records.of_container(node, container).update(oci)
    except FailedPreconditionError as e:
        await asyncio.to_thread(undo)
        if _has_ended(container):
            return
        memory = usage().memory
        if memory is not None and 0 < limit < memory.usage:
            raise _below_use(container.id, limit, memory.usage) from e
        raise
    except BaseException:
        await asyncio.to_thread(undo)
        raise
    # An update by runc leaves new ones out, and sets those that the container was created with again.
    try:
        await _limit_huge_pages(container.id, cgroup, pages)
    except FailedPreconditionError as e:
        # The container has taken pages meanwhile. All else is changed.
        log.warning("limits of huge pages are not in force", container=container.id, error=str(e))


async def _limit_huge_pages(container_id: str, cgroup: str, limits: Sequence[Mapping[str, Any]]) -> Callable[[], None]:
    """As :func:`cgroups.limit_huge_pages`. Raises FailedPreconditionError where the kernel refuses one."""
    try:
        return await asyncio.to_thread(cgroups.limit_huge_pages, cgroup, limits)
    except OSError as e:
        raise FailedPreconditionError(
            f"container {container_id} cannot be given these limits of huge pages: {e.strerror}; it may use more now"
        ) from e


def _check_memory(container_id: str, limit: int, usage: CgroupUsage) -> None:
    """Refuse a memory limit below the anonymous and shared memory of a container that may not swap.

    The kernel of cgroup version 1 itself refuses such a limit. That of version 2 would kill processes of the container.
    Raises FailedPreconditionError.
    """
    memory, swap = usage.memory, usage.swap
    if memory is None or memory.rss is None or (swap is not None and swap.limit != 0):
        return
    kept = memory.rss + (memory.shmem or 0)
    if 0 < limit < kept:
        raise _below_use(container_id, limit, kept)


def _below_use(container_id: str, limit: int, used: int) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"container {container_id} cannot be given these limits: a memory limit of {limit} bytes is below its present "
        f"use of {used} bytes"
    )


def _has_ended(container: Container) -> bool:
    """Whether the container's process has ended, though the daemon may not know it yet."""
    process = pidfd.open_process(container.pid, container.start_ticks)
    if process is None:
        return True
    os.close(process)
    return pidfd.zombie_code(container.pid) is not None


def _set_oom_score(node: Node, container: Container, score: int) -> None:
    """Set the OOM score of every process of the container. The OCI runtime's update has no option for it."""
    sandbox = node.records.sandbox(container.sandbox_id)
    for pid in cgroups.processes(cgroups.path(container.parent_cgroup(sandbox), container.id)):
        try:
            with open(f"/proc/{pid}/oom_score_adj", "w") as f:
                f.write(str(max(score, host.facts().oom_score_adj_floor)))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile


def _rewrite(node: Node, container_id: str, limits: Spec, oom_score_adj: int) -> None:
    """Write the new limits into the bundle: the container may be started from it, and an exec reads it."""
    document = read_spec(node, container_id)
    document["linux"]["resources"] = merge_limits(document["linux"]["resources"], limits, host.facts())
    if oom_score_adj:
        document["process"]["oomScoreAdj"] = max(oom_score_adj, host.facts().oom_score_adj_floor)
    write_spec(node, container_id, document)
