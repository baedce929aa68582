"""The cgroup by which a kubelet's cAdvisor finds the network of a pod.

cAdvisor looks for a cgroup that has the ID of a pod sandbox as its name. It asks for the process of the sandbox, once,
and then reads the network counters in that process's /proc directory (cAdvisor, container/containerd/handler.go). With
containerd this is the pause container. A pod has no process of its own here, so one of its containers stands for it:

1. The process is that of the container that has run for the longest time. The cgroup has no process in it.
2. The cgroup is made when cAdvisor asks for the process of a container of the pod. A node without cAdvisor has no such
   cgroup.
3. When the container of 1 ends, the cgroup is removed. If another container runs, the cgroup is made anew, so that
   cAdvisor asks for the process again.
4. A pod with a process of its own (see Sandbox.has_infra) has a cgroup with the right name already.
5. A pod in the node's network has no network of its own, and no such cgroup.
6. A daemon may end between the end of the container and step 3. The next daemon does step 3 then.
7. The cgroup is removed with the pod. This is a step of its own, because a parent that the kubelet has
   made stays.
"""

from __future__ import annotations

import asyncio

from criserver.model import NamespaceMode
from criserver.runtime import cgroups
from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.node import Node
from criserver.runtime.records import Container, Record, Sandbox


def process_of(node: Node, sandbox: Sandbox) -> int:
    """The PID of a process in the pod's network namespace, 0 if there is none."""
    if sandbox.state is not SandboxState.READY or sandbox.config.namespaces.network is NamespaceMode.NODE:
        return 0
    if sandbox.has_infra:
        infra = node.processes.get(sandbox.id)
        return infra.started.pid if infra is not None and infra.started is not None else 0
    running = [c for c in node.records.containers_of(sandbox.id) if c.state is ContainerState.RUNNING]
    return min(running, key=lambda c: c.started_at).pid if running else 0


def watch(node: Node) -> None:
    """Remove the cgroup of a pod, or make it anew, when the container that stands for the pod ends."""

    def changed(old: Record | None, new: Record | None) -> None:
        if not isinstance(old, Container) or old.state is not ContainerState.RUNNING:
            return
        if new is None or new.state is not ContainerState.RUNNING:
            node.background(_renew(node, old), "the cgroup of a pod cannot be renewed")

    node.records.watch(changed)


async def make(node: Node, sandbox: Sandbox) -> None:
    """Make the cgroup of a pod that has a process and no such cgroup yet."""
    async with node.lock(f"cadvisor {sandbox.id}"):
        cgroup = cgroups.path(sandbox.cgroup_parent, sandbox.id)
        if process_of(node, sandbox) and not await asyncio.to_thread(cgroups.exists, cgroup):
            await asyncio.to_thread(cgroups.make_empty, cgroup)


async def recover(node: Node, sandbox: Sandbox) -> None:
    """Renew the cgroup of a pod if an earlier daemon may have ended before it did."""
    for container in node.records.containers_of(sandbox.id):
        if container.state is ContainerState.EXITED and not _outlived(node, container):
            await _renew(node, container)
            return


async def remove(node: Node, sandbox: Sandbox) -> None:
    """Remove the cgroup of a pod; there may be none. Raises CriError."""
    if sandbox.has_infra:
        return
    async with node.lock(f"cadvisor {sandbox.id}"):
        cgroup = cgroups.path(sandbox.cgroup_parent, sandbox.id)
        if await asyncio.to_thread(cgroups.exists, cgroup):
            await asyncio.to_thread(cgroups.remove, cgroup)


async def _renew(node: Node, ended: Container) -> None:
    sandbox = node.records.sandboxes.get(ended.sandbox_id)
    if sandbox is None or sandbox.has_infra:
        return
    cgroup = cgroups.path(sandbox.cgroup_parent, sandbox.id)
    async with node.lock(f"cadvisor {sandbox.id}"):
        if not await asyncio.to_thread(cgroups.exists, cgroup) or _outlived(node, ended):
            return
        await asyncio.to_thread(cgroups.remove, cgroup)
        if process_of(node, sandbox):
            await asyncio.to_thread(cgroups.make_empty, cgroup)


def _outlived(node: Node, ended: Container) -> bool:
    """Whether another container runs that has run for longer: that one stands for the pod."""
    others = node.records.containers_of(ended.sandbox_id)
    return any(c.state is ContainerState.RUNNING and c.started_at < ended.started_at for c in others)
