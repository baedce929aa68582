"""The OCI runtime spec of a container, as a pure function of what was asked, the image and facts of the host.

Runtime specification 1.0.2 (config.md, config-linux.md); what Kubernetes expects on top of it is CRI's.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from criserver.errors import FailedPreconditionError, InvalidArgumentError
from criserver.model import ContainerConfig, Device, IdMapping, Mount, NamespaceMode, Propagation, Resources, User
from criserver.text import quoted

Spec = dict[str, Any]

_CPU_PERIOD = 100_000  # the kernel's, in microseconds
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# What a process of an ordinary container may do: the set that Docker fixed and images came to rely on.
DEFAULT_CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
)


@dataclass(frozen=True, slots=True)
class ImageDefaults:
    """What an image's configuration says where the kubelet does not (OCI image-spec, config)."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = ""


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
class Host:
    """Facts of this host that a spec depends on.

    ``capabilities`` are all that the kernel knows and the daemon may give; ``open_files`` is the soft and hard limit
    of descriptors, None for those of whoever starts the container (some builds of runc raise them);
    ``oom_score_adj_floor`` is the lowest value that the daemon may set (its own, where it lacks CAP_SYS_RESOURCE).
    ``hugepage_sizes`` are those whose use cgroups can limit, as "2MB".
    """

    capabilities: tuple[str, ...]
    open_files: tuple[int, int] | None = None
    oom_score_adj_floor: int = -1000
    unified_cgroups: bool = False
    swap_accounting: bool = False
    hugepage_sizes: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class PodFacts:
    """What a container takes from its sandbox: paths of files and namespaces, "" or None where it has none."""

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


def process_args(config: ContainerConfig, image: ImageDefaults) -> list[str]:
    """The command line: the kubelet's command replaces the image's entrypoint and, alone, its cmd too.

    Raises InvalidArgumentError where neither names a command.
    """
    if config.command:
        args = [*config.command, *config.args]
    else:
        args = [*image.entrypoint, *(config.args or image.cmd)]
    if not args:
        raise InvalidArgumentError(
            f"container {config.name}: no command: neither the container nor image {config.image} names one"
        )
    return args


def environment(config: ContainerConfig, image: ImageDefaults, hostname: str) -> list[str]:
    """NAME=VALUE lines: a PATH, the image's, then the kubelet's over them; a name comes once."""
    found: dict[str, str] = {}
    base = [_PATH, *(["TERM=xterm"] if config.tty else []), *([f"HOSTNAME={hostname}"] if hostname else [])]
    for line in (*base, *image.env):
        name, _, value = line.partition("=")
        found[name] = value
    found.update(config.envs)
    return [f"{name}={value}" for name, value in found.items()]


def build(
    *,
    config: ContainerConfig,
    image: ImageDefaults,
    user: User,
    pod: PodFacts,
    host: Host,
    cgroups_path: str,
    rootfs: str,
    devices: Iterable[DeviceNode] = (),
    seccomp: Spec | None = None,
    apparmor_profile: str = "",
    selinux_label: str = "",
    mount_label: str = "",
    annotations: Mapping[str, str] | None = None,
) -> Spec:
    """The whole spec.

    ``devices`` are the host's nodes for ``config.devices``, in their order, before which a privileged container has
    all of the host's; ``seccomp`` is the filter (config-linux.md, "Seccomp") or None. Raises
    InvalidArgumentError for a capability that the kernel does not know.
    """
    security, resources = config.security, config.resources
    own = (*_base_mounts(config, pod), *_sandbox_files(config, pod))
    mounts = [*(m for m in own if _is_wanted(m["destination"], config)), *map(_user_mount, config.mounts)]
    # runc mounts in order: a parent has to come before what lies below it.
    mounts.sort(key=lambda m: m["destination"].rstrip("/").count("/"))
    nodes = list(devices)
    spec: Spec = {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": config.tty,
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
            "args": process_args(config, image),
            "env": environment(config, image, pod.hostname),
            "cwd": config.working_dir or image.working_dir or "/",
            "capabilities": capabilities(config, host),
            "noNewPrivileges": security.no_new_privs,
            "oomScoreAdj": max(resources.oom_score_adj, host.oom_score_adj_floor),
        },
        "root": {"path": rootfs, "readonly": security.readonly_rootfs},
        "mounts": mounts,
        "annotations": dict(annotations or {}),
        "linux": {
            "cgroupsPath": cgroups_path,
            "namespaces": _namespaces(config, pod, host),
            "resources": {**limits(resources, host), "devices": _device_rules(config, nodes)},
            "devices": [_device_node(n) for n in nodes],
            "maskedPaths": [] if security.privileged else list(security.masked_paths),
            "readonlyPaths": [] if security.privileged else list(security.readonly_paths),
        },
    }
    if host.open_files is not None:
        soft, hard = host.open_files
        spec["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": soft, "hard": hard}]
    if apparmor_profile:
        spec["process"]["apparmorProfile"] = apparmor_profile
    if selinux_label:  # SELinux: of the process, and of the file systems that the runtime makes
        spec["process"]["selinuxLabel"] = selinux_label
        spec["linux"]["mountLabel"] = mount_label
    if seccomp is not None:
        spec["linux"]["seccomp"] = seccomp
    if any(m.propagation is Propagation.BIDIRECTIONAL for m in config.mounts):
        spec["linux"]["rootfsPropagation"] = "rshared"
    elif any(m.propagation is Propagation.HOST_TO_CONTAINER for m in config.mounts):
        spec["linux"]["rootfsPropagation"] = "rslave"
    return spec


def infra(
    *,
    program: str,
    rootfs: str,
    pod: PodFacts,
    host: Host,
    cgroups_path: str,
    apparmor_profile: str = "",
    mount_label: str = "",
) -> Spec:
    """The process that holds a pod's shared PID namespace: no capabilities, no files but its own program.

    It has no SELinux label of its own: a policy need not let a container's domain begin with a program of the node.
    """
    spec: Spec = {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 65535, "gid": 65535},
            "args": ["/infra", "-P"],
            "env": [],
            "cwd": "/",
            "noNewPrivileges": True,
            "oomScoreAdj": max(-998, host.oom_score_adj_floor),
        },
        "root": {"path": rootfs, "readonly": True},
        "mounts": [
            {
                "destination": "/proc",
                "type": "proc",
                "source": "proc",
                "options": ["nosuid", "noexec", "nodev"],
            },
            {
                # The OCI runtime puts device nodes there, also where the root directory is not for its user namespace
                # to write to.
                "destination": "/dev",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "noexec", "mode=755", "size=64k"],
            },
            {
                "destination": "/infra",
                "type": "bind",
                "source": program,
                "options": ["bind", "ro", "nosuid", "nodev"],
            },
        ],
        "linux": {
            "cgroupsPath": cgroups_path,
            "namespaces": [
                {"type": "pid"},
                {"type": "mount"},
                *_pods_namespaces(pod),
            ],
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        },
    }
    if apparmor_profile:
        spec["process"]["apparmorProfile"] = apparmor_profile
    if mount_label:
        spec["linux"]["mountLabel"] = mount_label
    return spec


def exec_process(spec: Spec, command: Iterable[str], *, tty: bool) -> Spec:
    """The process of an exec: the container's own, with another command line."""
    process: Spec = {**spec["process"], "args": list(command), "terminal": tty}
    if tty and not any(e.startswith("TERM=") for e in process["env"]):
        process["env"] = [*process["env"], "TERM=xterm"]
    return process


def capabilities(config: ContainerConfig, host: Host) -> dict[str, list[str]]:
    """The process's sets (capabilities(7)): ALL is added or dropped first, single names after it."""
    security = config.security
    if security.privileged:
        granted = set(host.capabilities)
    else:
        add, drop = _names(security.add_capabilities, host), _names(security.drop_capabilities, host)
        granted = set(DEFAULT_CAPABILITIES)
        if "ALL" in add:
            granted = set(host.capabilities)
        if "ALL" in drop:
            granted = set()
        granted = (granted | (add - {"ALL"})) - drop
    ambient = _names(security.ambient_capabilities, host)
    if "ALL" in ambient:
        ambient = set(host.capabilities)
    granted |= ambient
    both = sorted(granted)
    return {
        "bounding": both,
        "effective": both,
        "permitted": both,
        "inheritable": sorted(ambient),
        "ambient": sorted(ambient),
    }


def _names(given: Iterable[str], host: Host) -> set[str]:
    found = set()
    for name in given:
        upper = name.upper()
        full = upper if upper == "ALL" or upper.startswith("CAP_") else f"CAP_{upper}"
        if full != "ALL" and full not in host.capabilities:
            raise InvalidArgumentError(
                f"capability {quoted(name)} is not known to this kernel or not the daemon's to give"
            )
        found.add(full)
    return found


def check_mounts(config: ContainerConfig) -> None:
    """Refuse mounts in which the OCI runtime would mount something of its own, and the node would see that.

    Raises InvalidArgumentError.
    """
    shared = [m.container_path for m in config.mounts if m.propagation is Propagation.BIDIRECTIONAL]
    if "/" in shared:
        raise InvalidArgumentError(
            f"container {config.name}: a mount at / with Bidirectional propagation would give the node the container's "
            "own /proc and /dev; mount it elsewhere"
        )
    security = config.security
    own = () if security.privileged else (*security.masked_paths, *security.readonly_paths)
    for path in (*map(os.path.normpath, own), *(["/dev/console"] if config.tty else [])):
        top = next((s for s in shared if _is_in(path, s)), None)
        if top is not None:
            raise InvalidArgumentError(
                f"container {config.name}: {path} of the container lies in its mount {top} with Bidirectional "
                "propagation, and so would be covered on the node too; mount that elsewhere, or without propagation"
            )


def _is_wanted(destination: str, config: ContainerConfig) -> bool:
    """Whether a mount of ours is to be made there.

    Not where the pod mounts something, nor in a /dev that it brings, nor where the mount would travel to the node.
    """
    for mount in config.mounts:
        if mount.container_path == destination:
            return False
        takes_all = mount.container_path == "/dev" or mount.propagation is Propagation.BIDIRECTIONAL
        if takes_all and _is_in(destination, mount.container_path):
            return False
    return True


def _is_in(path: str, top: str) -> bool:
    """Whether ``path`` is ``top`` or lies below it."""
    return path == top or path.startswith(top.rstrip("/") + "/")


def _base_mounts(config: ContainerConfig, pod: PodFacts) -> list[Spec]:
    privileged = config.security.privileged
    writable = "rw" if privileged else "ro"
    quiet = ["nosuid", "noexec", "nodev"]
    return [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": quiet},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
        },
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        },
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": quiet},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*quiet, writable]},
        {
            "destination": "/sys/fs/cgroup",
            "type": "cgroup",
            "source": "cgroup",
            "options": [*quiet, "relatime", writable],
        },
        {
            "destination": "/dev/shm",  # noqa: S108 - the container's
            "type": "bind",
            "source": pod.shm,
            "options": ["bind", "rw", "nosuid", "nodev", "noexec"],
        },
    ]


def _sandbox_files(config: ContainerConfig, pod: PodFacts) -> list[Spec]:
    access = "ro" if config.security.readonly_rootfs else "rw"
    files = (
        ("/etc/resolv.conf", pod.resolv_conf),
        ("/etc/hosts", pod.hosts),
        ("/etc/hostname", pod.hostname_file),
    )
    options = ["bind", "rprivate", access, "nosuid", "nodev", "noexec"]
    return [{"destination": inside, "type": "bind", "source": outside, "options": options} for inside, outside in files]


def _user_mount(mount: Mount) -> Spec:
    access = "rro" if mount.recursive_readonly else "ro" if mount.readonly else "rw"
    found: Spec = {
        "destination": mount.container_path,
        "type": "bind",
        "source": mount.host_path,
        "options": ["rbind", mount.propagation.value, access, *(["nosuid", "nodev"] if mount.guarded else [])],
    }
    if mount.uids:
        found["uidMappings"], found["gidMappings"] = _id_mappings(mount.uids), _id_mappings(mount.gids)
    return found


def _id_mappings(mappings: Iterable[IdMapping]) -> list[Spec]:
    return [{"containerID": m.container_id, "hostID": m.host_id, "size": m.length} for m in mappings]


def _joined(*pairs: tuple[str, str | None]) -> list[Spec]:
    """Namespaces to join; without a path the container stays in the host's and nothing is listed."""
    return [{"type": kind, "path": path} for kind, path in pairs if path]


def _namespaces(config: ContainerConfig, pod: PodFacts, host: Host) -> list[Spec]:
    found: list[Spec] = [{"type": "mount"}]
    if host.unified_cgroups and not config.security.privileged:
        found.append({"type": "cgroup"})  # or it would see the node's whole tree (cgroup_namespaces(7))
    if config.namespaces.pid is NamespaceMode.CONTAINER:
        found.append({"type": "pid"})
    elif config.namespaces.pid in (NamespaceMode.POD, NamespaceMode.TARGET):
        found += _joined(("pid", pod.pid_namespace))
    return found + _pods_namespaces(pod)


def _pods_namespaces(pod: PodFacts) -> list[Spec]:
    return _joined(
        ("user", pod.user_namespace),
        ("network", pod.net_namespace),
        ("ipc", pod.ipc_namespace),
        ("uts", pod.uts_namespace),
    )


def limits(resources: Resources, host: Host) -> Spec:
    """The ``resources`` of a spec (config-linux.md), without devices; what is unset is not in it.

    Raises FailedPreconditionError for huge pages that this node cannot limit. The kubelet sends a limit of 0 for
    each size of the node's; where nothing can be limited, that is left out.
    """
    for size, limit in resources.hugepage_limits:
        if limit and size not in host.hugepage_sizes:
            able = ", ".join(sorted(host.hugepage_sizes)) or "none: there is no hugetlb cgroup controller"
            raise FailedPreconditionError(
                f"hugepage_limits: {size} = {limit} cannot be enforced; page sizes that this node can limit: {able}"
            )
    cpu = {
        # By name also where it is the kernel's own: under systemd, crun makes nothing of a quota without one.
        "period": resources.cpu_period or (_CPU_PERIOD if resources.cpu_quota else 0),
        "quota": resources.cpu_quota,
        "shares": resources.cpu_shares,
        "cpus": resources.cpuset_cpus,
        "mems": resources.cpuset_mems,
    }
    memory = {"limit": resources.memory_limit, "swap": resources.memory_swap_limit}
    if host.swap_accounting and not resources.memory_swap_limit:
        memory["swap"] = resources.memory_limit  # or swap would be a way around the limit
    unified = dict(resources.unified)
    if host.unified_cgroups and host.swap_accounting and memory["limit"] > 0 and memory["swap"]:
        # Version 2 counts swap alone. crun gives systemd the sum.
        swap = memory.pop("swap")
        unified.setdefault("memory.swap.max", "max" if swap < 0 else str(max(swap - memory["limit"], 0)))
    found: Spec = {"cpu": _given(cpu), "memory": _given(memory), "unified": unified}
    found["hugepageLimits"] = [
        {"pageSize": size, "limit": limit} for size, limit in resources.hugepage_limits if size in host.hugepage_sizes
    ]
    return _given(found)


def _given(table: Mapping[str, Any]) -> Spec:
    return {key: value for key, value in table.items() if value}


def _device_rules(config: ContainerConfig, nodes: list[DeviceNode]) -> list[Spec]:
    """The device cgroup: nothing but what is named; runc adds the nodes that every container has."""
    if config.security.privileged:
        return [{"allow": True, "access": "rwm"}]
    asked: tuple[Device, ...] = config.devices
    rules: list[Spec] = [{"allow": False, "access": "rwm"}]
    for device, node in zip(asked, nodes, strict=True):
        rules.append(
            {
                "allow": True,
                "type": node.kind,
                "major": node.major,
                "minor": node.minor,
                "access": device.permissions,
            }
        )
    return rules


def _device_node(node: DeviceNode) -> Spec:
    return {
        "path": node.path,
        "type": node.kind,
        "major": node.major,
        "minor": node.minor,
        "fileMode": stat.S_IMODE(node.mode),
        "uid": node.uid,
        "gid": node.gid,
    }
