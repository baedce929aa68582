"""The mounts of a container's spec: those of every container, the sandbox's files and the kubelet's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from criserver.errors import InvalidArgumentError
from criserver.model import ContainerConfig, IdMapping, Mount, NamespaceMode, Propagation
from criserver.oci.spec_inputs import PodFacts, Spec, SpecDefaults

# Mounts that a base_runtime_spec cannot give: the pod's shared memory, and the /run of `ctr oci spec`, which would hide
# files of images. containerd leaves both out too.
_SHM = "/dev/shm"  # noqa: S108 - the container's
_NOT_OF_A_BASE = frozenset({_SHM, "/run"})
_RESOLV_CONF, _HOSTS, _HOSTNAME = "/etc/resolv.conf", "/etc/hosts", "/etc/hostname"


def own_paths(defaults: SpecDefaults) -> tuple[str, ...]:
    """The container paths of the daemon's own mounts that may lead through links of the image."""
    of_base = {normal_path(m["destination"]) for m in defaults.base.get("mounts", ())} - _NOT_OF_A_BASE - {""}
    return (_RESOLV_CONF, _HOSTS, _HOSTNAME, *(inside for _, inside in defaults.mounts), *sorted(of_base))


def check_mounts(config: ContainerConfig) -> None:
    """Refuse mounts with Bidirectional propagation in which the OCI runtime would mount something of its own.

    Such a mount would appear on the node too. Raises InvalidArgumentError.
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


def _default_mount(outside: str, inside: str) -> Spec:
    options = ["rbind", "rprivate", "ro", "nosuid", "nodev"]
    return {"destination": inside, "type": "bind", "source": outside, "options": options}


def _writable(mount: Mapping[str, Any]) -> Spec:
    return {**mount, "options": ["rw" if option == "ro" else option for option in mount.get("options", ())]}


def _is_free(destination: str, config: ContainerConfig) -> bool:
    """Whether the daemon's own mount is made at ``destination``. It is not made:

    1. where the pod has a mount of its own,
    2. below a /dev of the pod. The pod's shared memory is made below the node's /dev, which has a directory for it:
       what the pod writes there would stay on the node otherwise, and its containers would not share it.
    3. below a mount with Bidirectional propagation, as it would appear on the node too.
    """
    for mount in config.mounts:
        if mount.container_path == destination:
            return False
        covers_all = mount.container_path == "/dev" or mount.propagation is Propagation.BIDIRECTIONAL
        if destination == _SHM and mount.container_path == mount.host_path == "/dev":
            covers_all = mount.propagation is Propagation.BIDIRECTIONAL
        if covers_all and _is_in(destination, mount.container_path):
            return False
    return True


def _is_in(path: str, top: str) -> bool:
    """Whether ``path`` is ``top`` or lies below it."""
    return path == top or path.startswith(top.rstrip("/") + "/")


def container_mounts(
    config: ContainerConfig,
    pod: PodFacts,
    base: Iterable[Mapping[str, Any]] = (),
    defaults: Iterable[tuple[str, str]] = (),
    *,
    cgroup_writable: bool = False,
    real_paths: Mapping[str, str] = MappingProxyType({}),
) -> list[Spec]:
    """All mounts of a container.

    ``base`` are the mounts of the handler's base_runtime_spec, ``defaults`` the pairs of paths of default_mounts. A
    mount replaces an earlier one at the same path: this runtime's own, the defaults, the base's, the pod's. With
    ``cgroup_writable`` the container may write below /sys/fs/cgroup. ``real_paths`` are the paths to which the image's
    links lead from those of :func:`own_paths`.
    """
    own = {m["destination"]: m for m in _base_mounts(config, pod)}
    own |= {inside: _default_mount(outside, inside) for outside, inside in defaults}
    of_base = {normal_path(m["destination"]): m for m in base}
    own |= {path: dict(m) for path, m in of_base.items() if path not in _NOT_OF_A_BASE}
    if config.security.privileged:
        own["/sys"] = _writable(own["/sys"])
    if config.security.privileged or cgroup_writable:
        own["/sys/fs/cgroup"] = _writable(own["/sys/fs/cgroup"])
    own |= {m["destination"]: m for m in _sandbox_files(config, pod)}
    devices = (device_mount(inside, outside) for inside, outside in renamed_devices(config).items())
    real = ({**m, "destination": real_paths.get(path, m["destination"])} for path, m in own.items())
    free = (m for m in real if _is_free(m["destination"], config))
    return in_mount_order([*free, *map(_user_mount, config.mounts), *devices])


def renamed_devices(config: ContainerConfig) -> dict[str, str]:
    """The devices of a container in a user namespace that have another path than on the node: their paths on both.

    No device node can be made there. An OCI runtime mounts the node's instead, and looks for it at the path that the
    device has in the container. So these devices are mounts of their own: :func:`device_mount`.
    """
    if config.namespaces.user is None:
        return {}
    devices = ((device.container_path, device.host_path) for device in config.devices)
    return {inside: outside for inside, outside in devices if inside != outside}


def device_mount(inside: str, outside: str) -> Spec:
    """The mount of a device of the node at its path in a container."""
    return _user_mount(Mount(inside, outside, False, Propagation.PRIVATE))


def in_mount_order(mounts: Iterable[Mapping[str, Any]]) -> list[Spec]:
    """The mounts with each one behind those of its parent directories: runc mounts in this order."""
    return [dict(m) for m in sorted(mounts, key=lambda m: normal_path(m["destination"]).count("/"))]


def normal_path(path: str) -> str:
    """A path of a container by which two of them can be compared; "" for the root."""
    return os.path.normpath(path).rstrip("/")


def _base_mounts(config: ContainerConfig, pod: PodFacts) -> list[Spec]:
    privileged = config.security.privileged
    writable = "rw" if privileged else "ro"
    quiet = ["nosuid", "noexec", "nodev"]
    # A bind mount without options of its own keeps those of the node's /dev/shm, where programs may be executable.
    shm = [] if config.namespaces.ipc is NamespaceMode.NODE else ["rw", *quiet]
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
        _sys(config, [*quiet, writable]),
        {
            "destination": "/sys/fs/cgroup",
            "type": "cgroup",
            "source": "cgroup",
            "options": [*quiet, "relatime", writable],
        },
        {
            "destination": _SHM,
            "type": "bind",
            "source": pod.shm,
            "options": ["bind", *shm],
        },
    ]


def _sys(config: ContainerConfig, options: list[str]) -> Spec:
    """The kernel mounts sysfs only for the root of the user namespace that owns the network namespace.

    A container in a user namespace with the node's network gets the node's /sys instead, and read-only with all mounts
    below it.
    """
    if config.namespaces.user is None or config.namespaces.network is not NamespaceMode.NODE:
        return {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": options}
    options = ["rbind", "rprivate", "rro", "nosuid", "noexec", "nodev"]
    return {"destination": "/sys", "type": "bind", "source": "/sys", "options": options}


def _sandbox_files(config: ContainerConfig, pod: PodFacts) -> list[Spec]:
    access = "ro" if config.security.readonly_rootfs else "rw"
    files = (
        (_RESOLV_CONF, pod.resolv_conf),
        (_HOSTS, pod.hosts),
        (_HOSTNAME, pod.hostname_file),
    )
    options = ["bind", "rprivate", access, "nosuid", "nodev", "noexec"]
    user = config.namespaces.user
    # The files belong to the node's root. The pod's root may change them in a user namespace too, as in containerd.
    owners = {} if user is None else _mapped((user.uids,), (user.gids,))
    return [
        {"destination": inside, "type": "bind", "source": outside, "options": options, **owners}
        for inside, outside in files
    ]


def _user_mount(mount: Mount) -> Spec:
    access = "rro" if mount.recursive_readonly else "ro" if mount.readonly else "rw"
    oci_mount: Spec = {
        "destination": mount.container_path,
        "type": "bind",
        "source": mount.host_path,
        "options": ["rbind", mount.propagation.value, access, *(["nosuid", "nodev"] if mount.guarded else [])],
    }
    if mount.uids:
        oci_mount |= _mapped(mount.uids, mount.gids)
    return oci_mount


def _mapped(uids: Iterable[IdMapping], gids: Iterable[IdMapping]) -> Spec:
    return {"uidMappings": _id_mappings(uids), "gidMappings": _id_mappings(gids)}


def _id_mappings(mappings: Iterable[IdMapping]) -> list[Spec]:
    return [{"containerID": m.container_id, "hostID": m.host_id, "size": m.length} for m in mappings]
