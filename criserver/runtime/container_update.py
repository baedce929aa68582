"""UpdateContainerResources: new limits for a container, running or not yet."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os

import structlog

from criserver.errors import FailedPreconditionError
from criserver.oci import spec
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups, host
from criserver.runtime.lifecycle import ContainerState
from criserver.runtime.node import Node
from criserver.runtime.parse import container_config, resources
from criserver.runtime.records import Container

log = structlog.get_logger(__name__)


async def update_container(node: Node, given: str, asked: cri.LinuxContainerResources) -> None:
    """Set the limits that ``asked`` names; what it leaves unset stays as it is.

    Raises FailedPreconditionError for a container that has exited, and where the kernel refuses a limit: nothing
    has changed then.
    """
    container_id = node.registry.container(given).id
    await node.finish(_update(node, container_id, asked))


async def _update(node: Node, container_id: str, asked: cri.LinuxContainerResources) -> None:
    async with node.lock(container_id):
        container = node.registry.container(container_id)
        if container.state not in (ContainerState.CREATED, ContainerState.RUNNING):
            raise FailedPreconditionError(f"container {container_id} is {container.state.value}; it has no limits")
        sent = cri.ContainerConfig.FromString(container.sent)
        _merge(sent.linux.resources, asked)
        sandbox = node.registry.sandbox(container.sandbox_id)
        changed = dataclasses.replace(
            container,
            config=container_config(sent, sandbox.config),
            sent=sent.SerializeToString(deterministic=True),
        )
        if container.state is ContainerState.RUNNING:
            await _apply(node, sandbox.runtime, changed, asked)
        _rewrite(node, changed)
        # It may have exited meanwhile: only the limits are new, whatever the record says by now.
        current = node.registry.container(container_id)
        node.registry.save(dataclasses.replace(current, config=changed.config, sent=changed.sent))


def _merge(into: cri.LinuxContainerResources, asked: cri.LinuxContainerResources) -> None:
    """Protobuf's own merge, but lists of limits replace each other."""
    hugepages = list(asked.hugepage_limits)
    if hugepages:
        del into.hugepage_limits[:]
    into.MergeFrom(asked)


async def _apply(node: Node, handler: str, container: Container, asked: cri.LinuxContainerResources) -> None:
    parent = node.registry.sandbox(container.sandbox_id).cgroup_parent
    limits = resources(asked)
    if limits.cpu_quota and not limits.cpu_period:  # a quota means nothing without the period that holds
        limits = dataclasses.replace(limits, cpu_period=container.config.resources.cpu_period)
    await node.oci_runtime(handler).update(container.id, parent, spec.limits(limits, host.facts()))
    if asked.oom_score_adj:
        await asyncio.to_thread(_set_oom_score, node, container, asked.oom_score_adj)


def _set_oom_score(node: Node, container: Container, score: int) -> None:
    """Give the score to every process of the container: the OCI runtime's update has none."""
    sandbox = node.registry.sandbox(container.sandbox_id)
    for pid in cgroups.processes(cgroups.path(sandbox.cgroup_parent, container.id)):
        try:
            with open(f"/proc/{pid}/oom_score_adj", "w") as f:
                f.write(str(max(score, host.facts().oom_score_adj_floor)))
        except ProcessLookupError:
            continue


def _rewrite(node: Node, container: Container) -> None:
    """Keep the bundle true: a container not yet started is started from it, and an exec reads it."""
    path = os.path.join(node.container_dir(container.id), "config.json")
    with open(path) as f:
        document = json.load(f)
    linux, asked = document["linux"], container.config.resources
    linux["resources"] = {**spec.limits(asked, host.facts()), "devices": linux["resources"]["devices"]}
    document["process"]["oomScoreAdj"] = max(asked.oom_score_adj, host.facts().oom_score_adj_floor)
    with open(path + ".new", "w") as f:
        json.dump(document, f)
    os.rename(path + ".new", path)
