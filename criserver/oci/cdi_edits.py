"""The edits of CDI files, and how they are made to an OCI spec."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from criserver.errors import FailedPreconditionError
from criserver.oci.adjustment_faults import RuntimeFacts
from criserver.oci.spec_inputs import Spec
from criserver.oci.spec_mounts import device_mount, in_mount_order, normal_path

StatCall = Callable[[str], os.stat_result]


@dataclass(frozen=True, slots=True)
class CdiDeviceNode:
    """A device node to make at ``path``. A value of None or "" is taken from the node ``host_path`` of the host.

    ``permissions`` are for the device cgroup: a part of "rwm", or "" for none.
    """

    path: str
    host_path: str
    kind: str
    major: int | None
    minor: int | None
    mode: int | None
    uid: int | None
    gid: int | None
    permissions: str


@dataclass(frozen=True, slots=True)
class ContainerEdits:
    """Changes of a spec. ``mounts`` and ``hooks`` (with the hook's name) are OCI objects.

    ``net_devices`` are pairs: the name of an interface of the node, and its name in the container.
    """

    env: tuple[str, ...] = ()
    nodes: tuple[CdiDeviceNode, ...] = ()
    mounts: tuple[Mapping[str, Any], ...] = ()
    hooks: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    groups: tuple[int, ...] = ()
    intel_rdt: Mapping[str, Any] | None = None
    net_devices: tuple[tuple[str, str], ...] = ()

    def __add__(self, other: ContainerEdits) -> ContainerEdits:
        """These edits, then ``other``."""
        return ContainerEdits(
            self.env + other.env,
            self.nodes + other.nodes,
            self.mounts + other.mounts,
            self.hooks + other.hooks,
            self.groups + other.groups,
            other.intel_rdt or self.intel_rdt,
            self.net_devices + other.net_devices,
        )

    def lacking(self, runtime: RuntimeFacts) -> str:
        """What these edits need and an OCI runtime does not report, which would leave it out silently; "" for none."""
        rdt = self.intel_rdt or {}
        needed = (
            ("netDevices", bool(self.net_devices), runtime.net_devices),
            ("intelRdt.schemata", bool(rdt.get("schemata")), runtime.rdt_schemata),
            ("intelRdt.enableMonitoring", bool(rdt.get("enableMonitoring")), runtime.rdt_monitoring),
        )
        return ", ".join(name for name, asked, has in needed if asked and not has)


def apply(spec: Spec, edits: ContainerEdits, stat_of: StatCall = os.stat) -> Spec:
    """A copy of ``spec`` with ``edits``. To apply them twice is the same as once.

    ``stat_of`` is os.stat for device nodes of the host. A node without an owner in the file belongs to the container's
    user, who could not open it otherwise; for root it has the owner on the host. Raises FailedPreconditionError for a
    device that the host does not have.
    """
    process, linux = dict(spec["process"]), dict(spec["linux"])
    edited = {**spec, "process": process, "linux": linux}
    if edits.env:
        process["env"] = _environment(process.get("env", ()), edits.env)
    if edits.groups:
        user = process["user"]
        groups = dict.fromkeys((*user.get("additionalGids", ()), *(g for g in edits.groups if g)))
        process["user"] = {**user, "additionalGids": list(groups)}
    # In a user namespace an OCI runtime mounts the node's device, and looks for it at the path in the container.
    within = any(namespace["type"] == "user" for namespace in linux.get("namespaces", ()))
    renamed = [device_mount(n.path, n.host_path) for n in edits.nodes if within and n.path != n.host_path]
    if edits.nodes:
        _add_nodes(process["user"], linux, edits.nodes, stat_of)
        places = {mount["destination"] for mount in renamed}
        linux["devices"] = [device for device in linux["devices"] if device["path"] not in places]
    if more := [*edits.mounts, *renamed]:
        replaced = {normal_path(m["destination"]) for m in more}
        last = {normal_path(m["destination"]): dict(m) for m in more}
        mounts = [m for m in spec.get("mounts", ()) if normal_path(m["destination"]) not in replaced]
        edited["mounts"] = in_mount_order([*mounts, *last.values()])
    if edits.hooks:
        hooks = {name: list(listed) for name, listed in spec.get("hooks", {}).items()}
        for name, hook in edits.hooks:
            if hook not in hooks.setdefault(name, []):
                hooks[name].append(dict(hook))
        edited["hooks"] = hooks
    if edits.intel_rdt is not None:
        linux["intelRdt"] = dict(edits.intel_rdt)
    if edits.net_devices:
        linux["netDevices"] = {**linux.get("netDevices", {}), **{name: {"name": to} for name, to in edits.net_devices}}
    return edited


def _environment(lines: Iterable[str], more: Iterable[str]) -> list[str]:
    by_name = {line.partition("=")[0]: line for line in lines}
    by_name |= {line.partition("=")[0]: line for line in more}
    return list(by_name.values())


def _add_nodes(user: Mapping[str, Any], linux: Spec, nodes: Iterable[CdiDeviceNode], stat_of: StatCall) -> None:
    devices = {normal_path(d["path"]): d for d in linux.get("devices", ())}
    limits = dict(linux.get("resources", {}))
    rules = list(limits.get("devices", ()))
    for node in nodes:
        device = _device(node, user, stat_of)
        devices.pop(normal_path(node.path), None)
        devices[normal_path(node.path)] = device
        if device["type"] != "p" and node.permissions:
            numbers = {key: device[key] for key in ("type", "major", "minor")}
            rule = {"allow": True, **numbers, "access": node.permissions}
            if rule not in rules:
                rules.append(rule)
    linux["devices"] = list(devices.values())
    linux["resources"] = {**limits, "devices": rules}


def _device(node: CdiDeviceNode, user: Mapping[str, Any], stat_of: StatCall) -> Spec:
    """The OCI device. With its type and number in the file, the node may be missing on the host."""
    is_complete = node.kind == "p" or (node.kind and node.major is not None)
    device: Spec = {"path": node.path, "type": node.kind}
    if node.major is not None:
        device |= {"major": node.major, "minor": node.minor or 0}
    try:
        host = stat_of(node.host_path)
    except OSError as e:
        if not is_complete:
            raise FailedPreconditionError(
                f"CDI device {node.path}: {node.host_path} of the host: {e.strerror}; is the device's driver loaded?"
            ) from e
        owner: dict[str, int] = {}
    else:
        owner = {"fileMode": stat.S_IMODE(host.st_mode), "uid": host.st_uid, "gid": host.st_gid}
        if not is_complete:
            device |= _numbers(node, host)
    if user.get("uid"):
        owner["uid"] = user["uid"]
    if user.get("gid"):
        owner["gid"] = user["gid"]
    from_file = {"fileMode": node.mode, "uid": node.uid, "gid": node.gid}
    return {**device, **owner, **{key: value for key, value in from_file.items() if value is not None}}


def _numbers(node: CdiDeviceNode, host: os.stat_result) -> Spec:
    kind = {stat.S_IFCHR: "c", stat.S_IFBLK: "b", stat.S_IFIFO: "p"}.get(stat.S_IFMT(host.st_mode), "")
    if not kind or node.kind not in ("", kind):
        expected = {"c": "character device", "b": "block device"}.get(node.kind, "device")
        raise FailedPreconditionError(f"CDI device {node.path}: {node.host_path} of the host is no {expected}")
    if kind == "p":
        return {"type": kind}
    return {"type": kind, "major": os.major(host.st_rdev), "minor": os.minor(host.st_rdev)}
