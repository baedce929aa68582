"""The kubelet's requests as values. All rooms but the API use these; only the parser reads gRPC messages.

All values are frozen. Any room may import this module; it imports none.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

# The largest ID of a user or group: 2^32-1 means "none" to the kernel (setreuid(2), chown(2)).
MAX_ID = 2**32 - 2
# Supplementary groups of a process (NGROUPS_MAX, getgroups(2)).
MAX_GROUPS = 65_536


class NamespaceMode(enum.Enum):
    """Whose namespace a pod or container uses (CRI NamespaceMode)."""

    POD = "pod"
    CONTAINER = "container"
    NODE = "node"
    TARGET = "target"


class Propagation(enum.Enum):
    """Whether later mounts propagate between host and container (CRI MountPropagation)."""

    PRIVATE = "rprivate"
    HOST_TO_CONTAINER = "rslave"
    BIDIRECTIONAL = "rshared"


@dataclass(frozen=True, slots=True)
class PortMapping:
    """A port of the host that leads to a port of the pod.

    ``protocol`` is "tcp", "udp" or "sctp". A ``host_ip`` of "" means every address of the host. A ``host_port`` of 0
    means that the pod requests no port of the host.
    """

    protocol: str
    container_port: int
    host_port: int
    host_ip: str


@dataclass(frozen=True, slots=True)
class Dns:
    """The contents of the pod's resolv.conf. If all are empty, the pod gets the host's file."""

    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class IdMapping:
    """``length`` IDs from ``container_id`` on are mapped to host IDs from ``host_id`` on (user_namespaces(7))."""

    container_id: int
    host_id: int
    length: int

    def host_id_of(self, container_id: int) -> int | None:
        """The host ID of an ID in the namespace; None for one that is not mapped."""
        offset = container_id - self.container_id
        return self.host_id + offset if 0 <= offset < self.length else None


@dataclass(frozen=True, slots=True)
class UserNamespace:
    """The ID mappings of a pod with its own user namespace."""

    uids: IdMapping
    gids: IdMapping


@dataclass(frozen=True, slots=True)
class Namespaces:
    """The namespace modes of a pod or container.

    ``target`` is the container whose PID namespace TARGET means. ``user`` is None in the host's user namespace.
    """

    network: NamespaceMode = NamespaceMode.POD
    pid: NamespaceMode = NamespaceMode.POD
    ipc: NamespaceMode = NamespaceMode.POD
    target: str = ""
    user: UserNamespace | None = None


@dataclass(frozen=True, slots=True)
class Resources:
    """Limits of a container (CRI LinuxContainerResources); 0 and empty mean unset."""

    cpu_period: int = 0
    cpu_quota: int = 0
    cpu_shares: int = 0
    memory_limit: int = 0
    memory_swap_limit: int = 0
    oom_score_adj: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    hugepage_limits: tuple[tuple[str, int], ...] = ()
    unified: Mapping[str, str] = field(default_factory=dict)


class SelinuxOptions(NamedTuple):
    """The requested parts of a SELinux label; "" for a part that is not requested (CRI SELinuxOption)."""

    user: str = ""
    role: str = ""
    type: str = ""
    level: str = ""


NO_SELINUX_OPTIONS = SelinuxOptions()


@dataclass(frozen=True, slots=True)
class PodConfig:
    """A pod as the kubelet describes it (CRI PodSandboxConfig)."""

    name: str
    namespace: str
    uid: str
    attempt: int
    hostname: str
    log_directory: str
    dns: Dns
    port_mappings: tuple[PortMapping, ...]
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    cgroup_parent: str
    sysctls: Mapping[str, str]
    namespaces: Namespaces
    privileged: bool
    selinux: SelinuxOptions = NO_SELINUX_OPTIONS

    @property
    def full_name(self) -> str:
        """The name of the sandbox, which is unique on the node."""
        return f"{self.name}_{self.namespace}_{self.uid}_{self.attempt}"


@dataclass(frozen=True, slots=True)
class Mount:
    """A path of the host, or an image or a path in it, that is mounted in the container.

    ``uids`` and ``gids`` map the owners of the files; () leaves them unmapped. In a ``guarded`` mount, which only the
    daemon itself asks for, set-user-ID programs and device nodes do not work.
    """

    container_path: str
    host_path: str
    readonly: bool
    propagation: Propagation
    recursive_readonly: bool = False
    image: str = ""
    image_sub_path: str = ""
    uids: tuple[IdMapping, ...] = ()
    gids: tuple[IdMapping, ...] = ()
    selinux_relabel: bool = False
    guarded: bool = False


@dataclass(frozen=True, slots=True)
class Device:
    """A device of the host that the container gets. ``permissions`` is a subset of "rwm"."""

    container_path: str
    host_path: str
    permissions: str


@dataclass(frozen=True, slots=True)
class Security:
    """The user that the container runs as, and its permissions (CRI LinuxContainerSecurityContext).

    ``seccomp`` is "" for no filter, "default" for the runtime's own, or the absolute path of a profile;
    ``apparmor`` is "" if the request says nothing, "runtime/default" for the runtime's own, "unconfined", or the
    name of a loaded profile.
    """

    privileged: bool = False
    run_as_user: int | None = None
    run_as_group: int | None = None
    run_as_username: str = ""
    supplemental_groups: tuple[int, ...] = ()
    supplemental_groups_strict: bool = False
    readonly_rootfs: bool = False
    no_new_privs: bool = False
    add_capabilities: tuple[str, ...] = ()
    drop_capabilities: tuple[str, ...] = ()
    ambient_capabilities: tuple[str, ...] = ()
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    seccomp: str = ""
    apparmor: str = ""
    selinux: SelinuxOptions = NO_SELINUX_OPTIONS


@dataclass(frozen=True, slots=True)
class ContainerConfig:
    """A container as the kubelet describes it (CRI ContainerConfig)."""

    name: str
    attempt: int
    image: str
    command: tuple[str, ...]
    args: tuple[str, ...]
    working_dir: str
    envs: tuple[tuple[str, str], ...]
    mounts: tuple[Mount, ...]
    devices: tuple[Device, ...]
    cdi_devices: tuple[str, ...]
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    log_path: str
    stdin: bool
    stdin_once: bool
    tty: bool
    resources: Resources
    security: Security
    namespaces: Namespaces
    stop_signal: str


@dataclass(frozen=True, slots=True)
class User:
    """The IDs that a process runs with. ``groups`` are the supplementary groups and the primary one, sorted."""

    uid: int
    gid: int
    groups: tuple[int, ...]
