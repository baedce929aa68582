"""UpdateContainerResources: new limits for a container, running or not yet."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os

import structlog

from criserver.errors import FailedPreconditionError
from criserver.oci.spec_inputs import Spec
from criserver.oci.spec_resources import merge_limits, resource_limits
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups, host
from criserver.runtime.lifecycle import ContainerState
from criserver.runtime.node import Node
from criserver.runtime.parse import container_config, resources
from criserver.runtime.records import Container

log = structlog.get_logger(__name__)


async def update_container(node: Node, id_or_prefix: str, asked: cri.LinuxContainerResources) -> None:
    """Set the limits that ``asked`` has; a limit that it does not set stays as it is.

    Raises FailedPreconditionError for a container that has exited, and where the kernel refuses a limit. Nothing has
    changed then.
    """
    container_id = node.records.container(id_or_prefix).id
    await node.finish(_update(node, container_id, asked))


async def _update(node: Node, container_id: str, asked: cri.LinuxContainerResources) -> None:
    async with node.lock(container_id):
        container = node.records.container(container_id)
        if container.state not in (ContainerState.CREATED, ContainerState.RUNNING):
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
            await node.oci_runtime(sandbox.runtime).update(container.id, sandbox.cgroup_parent, limits)
            if asked.oom_score_adj:
                await asyncio.to_thread(_set_oom_score, node, changed, asked.oom_score_adj)
        _rewrite(node, container.id, limits, asked.oom_score_adj)
        # The container may have exited meanwhile. Only the limits in its record are replaced.
        current = node.records.container(container_id)
        await node.records.save(dataclasses.replace(current, config=changed.config, sent=changed.sent))


def _merge(into: cri.LinuxContainerResources, asked: cri.LinuxContainerResources) -> None:
    """Merge as protobuf does, except that a new list of limits replaces the old one."""
    hugepages = list(asked.hugepage_limits)
    if hugepages:
        del into.hugepage_limits[:]
    into.MergeFrom(asked)


def _limits(asked: cri.LinuxContainerResources, changed: Container) -> Spec:
    """The OCI limits that ``asked`` sets. A quota needs the period that is in force."""
    limits = resources(asked)
    if limits.cpu_quota and not limits.cpu_period:
        limits = dataclasses.replace(limits, cpu_period=changed.config.resources.cpu_period)
    return resource_limits(limits, host.facts())


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
