"""The namespaces of a spec: new ones, and those that the container joins."""

from __future__ import annotations

from criserver.model import ContainerConfig, NamespaceMode
from criserver.oci.spec_inputs import HostFacts, PodFacts, Spec


def _joined(*pairs: tuple[str, str | None]) -> list[Spec]:
    """The namespaces to join, by their paths. A namespace without a path is not listed: it is the host's."""
    return [{"type": kind, "path": path} for kind, path in pairs if path]


def container_namespaces(config: ContainerConfig, pod: PodFacts, host: HostFacts) -> list[Spec]:
    """The namespaces of a container."""
    namespaces: list[Spec] = [{"type": "mount"}]
    if host.unified_cgroups and not config.security.privileged:
        namespaces.append(
            {"type": "cgroup"}
        )  # without it the container sees the node's whole tree (cgroup_namespaces(7))
    if config.namespaces.pid is NamespaceMode.CONTAINER:
        namespaces.append({"type": "pid"})
    elif config.namespaces.pid in (NamespaceMode.POD, NamespaceMode.TARGET):
        namespaces += _joined(("pid", pod.pid_namespace))
    return namespaces + pod_namespaces(pod)


def pod_namespaces(pod: PodFacts) -> list[Spec]:
    """The namespaces of the pod, which all its processes join."""
    return _joined(
        ("user", pod.user_namespace),
        ("network", pod.net_namespace),
        ("ipc", pod.ipc_namespace),
        ("uts", pod.uts_namespace),
    )


def sandbox_namespaces(pod: PodFacts) -> list[Spec]:
    """All namespaces that a pod has for itself, by the paths at which they are pinned."""
    return _joined(("pid", pod.pid_namespace)) + pod_namespaces(pod)
