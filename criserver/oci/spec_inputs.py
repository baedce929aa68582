"""The inputs of an OCI runtime spec: defaults of the image, and facts of the host and the pod."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Spec = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ImageDefaults:
    """An image's defaults for values that the kubelet does not set (OCI image-spec, config)."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = ""


@dataclass(frozen=True, slots=True)
class SpecDefaults:
    """What the node gives to every container.

    ``env``: lines NAME=VALUE. ``rlimits``: the soft and the hard limit by their name, such as RLIMIT_NOFILE.
    ``mounts``: pairs of a path of the node and a path of the container. ``base``: the spec to start from, whose own
    environment, rlimits and mounts win over these. ``cgroup_writable``: containers may write to their own cgroup.
    """

    env: tuple[str, ...] = ()
    rlimits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    mounts: tuple[tuple[str, str], ...] = ()
    cgroup_writable: bool = False
    base: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DeviceNode:
    """A device node of the host: ``kind`` is "c" or "b"."""

    path: str
    kind: str
    major: int
    minor: int
    mode: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The facts of this host that a spec depends on.

    ``capabilities``: all that the kernel knows and the daemon may give. ``open_files``: the soft and hard limit of
    descriptors; with None the container inherits the limits of its shim, which some builds of runc raise.
    ``oom_score_adj_floor``: the lowest value that the daemon may set; without CAP_SYS_RESOURCE it is the daemon's own.
    ``hugepage_sizes``: the page sizes that cgroups can limit, such as "2MB".
    ``resctrl``: whether the kernel's file system for classes of RDT is mounted.
    """

    capabilities: tuple[str, ...]
    open_files: tuple[int, int] | None = None
    oom_score_adj_floor: int = -1000
    unified_cgroups: bool = False
    swap_accounting: bool = False
    hugepage_sizes: frozenset[str] = frozenset()
    resctrl: bool = False


@dataclass(frozen=True, slots=True)
class PodFacts:
    """The parts of a sandbox for its containers: paths of files and namespaces, "" or None where it has none."""

    hostname: str
    resolv_conf: str
    hosts: str
    hostname_file: str
    shm: str
    net_namespace: str | None
    ipc_namespace: str | None
    uts_namespace: str | None
    pid_namespace: str | None
    user_namespace: str | None = None
