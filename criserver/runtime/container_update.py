"""UpdateContainerResources: new limits for a container, running or not yet."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os

from criserver.errors import FailedPreconditionError
from criserver.model import Resources
from criserver.oci.spec_inputs import Spec
from criserver.oci.spec_resources import merge_limits, resource_limits
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups, host, pidfd
from criserver.runtime.lifecycle import ContainerState
from criserver.runtime.node import Node
from criserver.runtime.parse import container_config, resources
from criserver.runtime.records import Container, Sandbox
from criserver.stats import CgroupUsage


async def update_container(node: Node, id_or_prefix: str, asked: cri.LinuxContainerResources) -> None:
    """Set the limits that ``asked`` has; a limit that it does not set stays as it is.

    For a container that has exited this only changes the limits in its record, as in containerd: the kubelet may ask
    for it as the container ends. Raises FailedPreconditionError for a container that is being removed, for a memory
    limit below the container's present use, and where the kernel refuses a limit. Nothing has changed then.
    """
    container_id = node.records.container(id_or_prefix).id
    await node.finish(_update(node, container_id, asked))


async def _update(node: Node, container_id: str, asked: cri.LinuxContainerResources) -> None:
    async with node.lock(container_id):
        container = node.records.container(container_id)
        if container.state not in (ContainerState.CREATED, ContainerState.RUNNING, ContainerState.EXITED):
            raise FailedPreconditionError(f"container {container_id} is {container.state.value}; it has no limits")
        sent = cri.ContainerConfig.FromString(container.sent)
        _merge(sent.linux.resources, asked)
        sandbox = node.records.sandbox(container.sandbox_id)
        changed = dataclasses.replace(
            container,
            config=container_config(sent, sandbox.config),
            sent=sent.SerializeToString(deterministic=True),
        )
        limits = _limits(asked, changed)
        if container.state is ContainerState.RUNNING:
            await _apply(node, sandbox, changed, limits)
        if container.state is not ContainerState.EXITED:
            _rewrite(node, container.id, resource_limits(limits, host.facts()), asked.oom_score_adj)
        # The container may have exited meanwhile. Only the limits in its record are replaced.
        current = node.records.container(container_id)
        await node.records.save(dataclasses.replace(current, config=changed.config, sent=changed.sent))


def _merge(into: cri.LinuxContainerResources, asked: cri.LinuxContainerResources) -> None:
    """Merge as protobuf does, with two exceptions:

    1. A new list of limits replaces the old one.
    2. A new memory limit without a swap limit replaces both, as for a new container.
    """
    if asked.hugepage_limits:
        del into.hugepage_limits[:]
    if asked.memory_limit_in_bytes:
        into.memory_swap_limit_in_bytes = 0
    into.MergeFrom(asked)


def _limits(asked: cri.LinuxContainerResources, changed: Container) -> Resources:
    """The limits that ``asked`` sets, with those in force that they need beside them."""
    limits, merged = resources(asked), changed.config.resources
    if limits.cpu_quota and not limits.cpu_period:
        limits = dataclasses.replace(limits, cpu_period=merged.cpu_period)
    if limits.memory_swap_limit and not limits.memory_limit:  # version 2 needs the difference of both
        limits = dataclasses.replace(limits, memory_limit=merged.memory_limit)
    return limits


async def _apply(node: Node, sandbox: Sandbox, container: Container, limits: Resources) -> None:
    usage = node.stats.cgroups.reader(cgroups.path(sandbox.cgroup_parent, container.id)).usage
    if host.facts().unified_cgroups:
        _check_memory(container.id, limits, usage())
    try:
        await node.oci_runtime(sandbox.runtime).update(
            container.id, sandbox.cgroup_parent, resource_limits(limits, host.facts())
        )
    except FailedPreconditionError as e:
        if _has_ended(container):
            return
        memory = usage().memory
        if memory is not None and 0 < limits.memory_limit < memory.usage:
            raise _below_use(container.id, limits.memory_limit, memory.usage) from e
        raise
    if limits.oom_score_adj:
        await asyncio.to_thread(_set_oom_score, node, container, limits.oom_score_adj)


def _check_memory(container_id: str, limits: Resources, usage: CgroupUsage) -> None:
    """Refuse a memory limit below the anonymous memory of a container that may not swap.

    The kernel of cgroup version 1 itself refuses such a limit. That of version 2 would kill processes of the container.
    Raises FailedPreconditionError.
    """
    memory, swap = usage.memory, usage.swap
    if memory is None or memory.rss is None or (swap is not None and swap.limit != 0):
        return
    if 0 < limits.memory_limit < memory.rss:
        raise _below_use(container_id, limits.memory_limit, memory.rss)


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
    for pid in cgroups.processes(cgroups.path(sandbox.cgroup_parent, container.id)):
        try:
            with open(f"/proc/{pid}/oom_score_adj", "w") as f:
                f.write(str(max(score, host.facts().oom_score_adj_floor)))
        except ProcessLookupError:
            continue


def _rewrite(node: Node, container_id: str, limits: Spec, oom_score_adj: int) -> None:
    """Write the new limits into the bundle: the container may be started from it, and an exec reads it."""
    path = os.path.join(node.container_dir(container_id), "config.json")
    with open(path) as f:
        document = json.load(f)
    document["linux"]["resources"] = merge_limits(document["linux"]["resources"], limits, host.facts())
    if oom_score_adj:
        document["process"]["oomScoreAdj"] = max(oom_score_adj, host.facts().oom_score_adj_floor)
    with open(path + ".new", "w") as f:
        json.dump(document, f)
    os.rename(path + ".new", path)
