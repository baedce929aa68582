"""The annotations of a spec: those that name the pod and the container, and those of a request that the runtime gets.

The names are containerd's. gVisor (runsc/specutils) and Kata Containers (virtcontainers/pkg/oci) read them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping

from criserver.errors import InvalidArgumentError
from criserver.model import ContainerConfig, PodConfig
from criserver.text import quoted

_CRI = "io.kubernetes.cri."
# CRI-O's name, and the one that its later releases have too.
SHM_SIZES = ("io.kubernetes.cri-o.ShmSize", "shm-size.crio.io")
_SIZE = re.compile(r"([0-9]{1,19})(?:([kmg])?i?b?)")
_SHIFTS = {"": 0, "k": 10, "m": 20, "g": 30}


def of_container(
    config: ContainerConfig,
    pod: PodConfig,
    sandbox_id: str,
    pod_patterns: Iterable[str],
    container_patterns: Iterable[str],
) -> dict[str, str]:
    """The annotations of a container's spec. The request's annotations never replace those that identify it."""
    return {
        **passed(pod.annotations, pod_patterns),
        **passed(config.annotations, container_patterns),
        f"{_CRI}container-type": "container",
        f"{_CRI}container-name": config.name,
        f"{_CRI}image-name": config.image,
        **_of_pod(pod, sandbox_id),
    }


def of_sandbox(pod: PodConfig, sandbox_id: str, pod_patterns: Iterable[str]) -> dict[str, str]:
    """The annotations of the spec of a pod's sandbox container."""
    return {
        **passed(pod.annotations, pod_patterns),
        f"{_CRI}container-type": "sandbox",
        f"{_CRI}sandbox-log-directory": pod.log_directory,
        **_of_pod(pod, sandbox_id),
    }


def shm_size(pod: PodConfig, pod_patterns: Iterable[str]) -> int | None:
    """The size of /dev/shm in bytes that a pod's annotation asks for. None without one that the handler allows.

    The annotation is CRI-O's. Raises InvalidArgumentError for a value that is not a number with one of k, m, g or Ki,
    Mi, Gi. As in CRI-O all of them are powers of 1024.
    """
    allowed = passed(pod.annotations, pod_patterns)
    name = next((name for name in SHM_SIZES if name in allowed), None)
    if name is None:
        return None
    text = allowed[name]
    found = _SIZE.fullmatch(text.strip().lower())
    size = int(found[1]) << _SHIFTS[found[2] or ""] if found else 0
    if not 0 < size < 1 << 63:
        raise InvalidArgumentError(
            f"annotation {name} = {quoted(text)} of pod {pod.namespace}/{pod.name} is not a size; write 128Mi or so"
        )
    return size


def passed(annotations: Mapping[str, str], patterns: Iterable[str]) -> dict[str, str]:
    """The annotations whose names match one of the patterns. "*" and "?" do not match "/", as in containerd."""
    split = [pattern.split("/") for pattern in patterns]
    return {name: value for name, value in annotations.items() if any(_matches(name.split("/"), p) for p in split)}


def _matches(parts: list[str], patterns: list[str]) -> bool:
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _of_pod(pod: PodConfig, sandbox_id: str) -> dict[str, str]:
    return {
        f"{_CRI}sandbox-id": sandbox_id,
        f"{_CRI}sandbox-name": pod.name,
        f"{_CRI}sandbox-namespace": pod.namespace,
        f"{_CRI}sandbox-uid": pod.uid,
    }
