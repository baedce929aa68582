"""What the configuration gives to a container, beside what the kubelet asks for."""

from __future__ import annotations

import asyncio
import dataclasses

from criserver.config import RuntimeHandler
from criserver.errors import FailedPreconditionError
from criserver.model import ContainerConfig
from criserver.oci import base_spec, hook_files
from criserver.oci.cdi import ContainerEdits
from criserver.oci.spec_inputs import DeviceNode, SpecDefaults
from criserver.runtime import host
from criserver.runtime.node import Node
from criserver.runtime.records import Sandbox


async def spec_defaults(node: Node, handler: RuntimeHandler) -> SpecDefaults:
    """What the spec of a container starts from.

    Raises FailedPreconditionError for a base_runtime_spec, and for cgroup_writable on a node with cgroup version 1,
    where a container could have the node run programs (release_agent).
    """
    given = node.config.pod_defaults
    if handler.cgroup_writable and not host.facts().unified_cgroups:
        raise FailedPreconditionError(
            f"[runtimes.{handler.name}] cgroup_writable needs cgroup version 2, and this node has version 1"
        )
    base = await asyncio.to_thread(base_spec.load, handler.base_runtime_spec) if handler.base_runtime_spec else {}
    return SpecDefaults(
        env=given.env,
        rlimits=given.ulimits,
        mounts=given.mounts,
        cgroup_writable=handler.cgroup_writable,
        base=base,
    )


async def hooks(node: Node, sandbox: Sandbox, config: ContainerConfig, command: str) -> ContainerEdits:
    """The hooks of the node's directories for a container whose program is ``command``.

    Raises FailedPreconditionError for a hook file, InvalidArgumentError for a text that is too long for its patterns.
    """
    directories = node.config.pod_defaults.hooks_dir
    if not directories:
        return ContainerEdits()

    def work() -> ContainerEdits:
        # As in CRI-O, a pod's annotation wins over one of the container with the same name.
        annotations = {**config.annotations, **sandbox.config.annotations}
        found = hook_files.load(directories)
        return ContainerEdits(
            hooks=tuple(hook_files.chosen(found, command, annotations, has_bind_mounts=bool(config.mounts)))
        )

    return await asyncio.to_thread(work)


def owned(node: Node, config: ContainerConfig, device: DeviceNode) -> DeviceNode:
    """The device, which belongs to the container's user and group if the configuration says so.

    As in containerd these are the numbers in the container's security context. Without one, or for 0, the device keeps
    its owner.
    """
    if not node.config.pod_defaults.device_ownership_from_security_context:
        return device
    security = config.security
    return dataclasses.replace(device, uid=security.run_as_user or device.uid, gid=security.run_as_group or device.gid)
