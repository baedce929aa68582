"""Parts of a pod's and a container's configuration, as a kubelet would send them."""

from __future__ import annotations

from typing import Any

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.node import Node


def secured(**security: Any) -> dict[str, cri.LinuxContainerConfig]:
    return {"linux": cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(**security))}


def limited(**limits: Any) -> dict[str, cri.LinuxContainerConfig]:
    return {"linux": cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(**limits))}


def sandbox(**security: Any) -> cri.LinuxPodSandboxConfig:
    """A pod's linux section whose containers have a PID namespace each, where nothing else is said."""
    options = security.pop("namespace_options", cri.NamespaceOption(pid=cri.CONTAINER))
    return cri.LinuxPodSandboxConfig(
        security_context=cri.LinuxSandboxSecurityContext(namespace_options=options, **security)
    )


def shared(**modes: Any) -> cri.LinuxPodSandboxConfig:
    """A pod's linux section with namespace modes."""
    options = cri.NamespaceOption(**{"pid": cri.CONTAINER, **modes})
    return cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(namespace_options=options))


BASE = 1_000_000


def userns(
    mode: cri.NamespaceMode = cri.POD, uids: list[tuple[int, int, int]] | None = None
) -> cri.LinuxPodSandboxConfig:
    mappings = [
        cri.IDMapping(container_id=c, host_id=h, length=n)
        for c, h, n in (uids if uids is not None else [(0, BASE, 65536)])
    ]
    options = cri.NamespaceOption(
        pid=cri.CONTAINER, userns_options=cri.UserNamespace(mode=mode, uids=mappings, gids=mappings)
    )
    return cri.LinuxPodSandboxConfig(security_context=cri.LinuxSandboxSecurityContext(namespace_options=options))


def run(node: Node, name: str, linux: cri.LinuxPodSandboxConfig, **fields: Any) -> tuple[str, str]:
    config = node.pod(name, linux=linux)
    pod = node.client.RunPodSandbox(config=config, runtime_handler="newer").pod_sandbox_id
    node.pods.add(pod)
    return pod, node.run(pod, "c", ["sleep", "1000"], **fields)
