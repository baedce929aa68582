"""An adjustment of an OCI spec that plugins of the node ask for (NRI), and how it is made: a pure function.

Runtime specification 1.3.0 (config.md, config-linux.md). The order of the steps is that of NRI: CDI devices come before
the devices and mounts of plugins, which replace those of CDI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from criserver.errors import CriError, FailedPreconditionError
from criserver.oci import cdi
from criserver.oci.adjustment_faults import RuntimeFacts, faults
from criserver.oci.adjustment_value import SpecAdjustment
from criserver.oci.spec_inputs import HostFacts, Spec
from criserver.oci.spec_mounts import in_mount_order, normal_path
from criserver.oci.spec_resources import merge_limits

_PROPAGATIONS = ("rprivate", "rslave", "rshared")


def adjust(
    spec: Spec,
    adjustment: SpecAdjustment,
    host: HostFacts,
    runtime: RuntimeFacts,
    catalog: cdi.CdiCatalog | None = None,
) -> Spec:
    """A copy of ``spec`` with the adjustment. ``catalog`` is needed where it has CDI devices (``cdi.load``).

    Raises FailedPreconditionError, with the plugin's name and the field, for what this node or its OCI runtime cannot
    give, and for what no OCI spec can have.
    """
    process, linux = dict(spec["process"]), dict(spec["linux"])
    adjusted: Spec = {**spec, "process": process, "linux": linux}
    adjusted["annotations"] = _changed(spec.get("annotations", {}), adjustment.annotations)
    process["env"] = _environment(process.get("env", ()), adjustment.env)
    if adjustment.args:
        process["args"] = list(adjustment.args)
    if adjustment.hooks:
        adjusted["hooks"] = _with_hooks(spec.get("hooks", {}), adjustment.hooks)
    if adjustment.cdi_devices:
        adjusted = _with_cdi(adjusted, adjustment, runtime, catalog)
        process, linux = adjusted["process"], adjusted["linux"]
    _adjust_process(process, adjustment)
    _adjust_linux(linux, adjustment, host)
    if adjustment.mounts:
        _adjust_mounts(adjusted, adjustment.mounts)
    for fault in faults(spec, adjusted, adjustment, host, runtime):
        raise FailedPreconditionError(f"{adjustment.asked_by(fault.field, fault.key)}: {fault.reason}")
    return adjusted


def _changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the changes; a change to None removes the value."""
    merged = {**values, **changes}
    return {key: value for key, value in merged.items() if value is not None}


def _environment(lines: Iterable[str], changes: Mapping[str, str | None]) -> list[str]:
    """The variables with the changes. A variable that changes keeps its place, a new one comes last."""
    known = {name: value for name, _, value in (line.partition("=") for line in lines)}
    return [f"{name}={value}" for name, value in _changed(known, changes).items()]


def _with_hooks(hooks: Mapping[str, Iterable[Spec]], more: Iterable[tuple[str, Mapping[str, Any]]]) -> Spec:
    merged = {name: list(listed) for name, listed in hooks.items()}
    for name, hook in more:
        merged.setdefault(name, []).append(dict(hook))
    return merged


def _with_cdi(spec: Spec, adjustment: SpecAdjustment, runtime: RuntimeFacts, catalog: cdi.CdiCatalog | None) -> Spec:
    for name in adjustment.cdi_devices:
        try:
            spec = cdi.apply(spec, cdi.resolve([name], catalog or cdi.CdiCatalog((), (), {}), runtime))
        except CriError as e:
            raise FailedPreconditionError(f"{adjustment.asked_by('CdiDevices', name)}: {e}") from e
    return spec


def _adjust_process(process: Spec, adjustment: SpecAdjustment) -> None:
    if adjustment.oom_score_adj is not None:
        process["oomScoreAdj"] = adjustment.oom_score_adj
    if adjustment.io_priority:
        process["ioPriority"] = dict(adjustment.io_priority)
    if adjustment.scheduler:
        process["scheduler"] = dict(adjustment.scheduler)
    if adjustment.rlimits:
        kinds = {limit["type"] for limit in adjustment.rlimits}
        kept = [limit for limit in process.get("rlimits", ()) if limit["type"] not in kinds]
        process["rlimits"] = [*kept, *(dict(limit) for limit in adjustment.rlimits)]


def _adjust_linux(linux: Spec, adjustment: SpecAdjustment, host: HostFacts) -> None:
    if adjustment.devices:
        _adjust_devices(linux, adjustment.devices)
    if adjustment.resources:
        linux["resources"] = merge_limits(linux.get("resources", {}), dict(adjustment.resources), host)
    if adjustment.cgroups_path:
        linux["cgroupsPath"] = adjustment.cgroups_path
    if adjustment.seccomp:
        linux["seccomp"] = dict(adjustment.seccomp)
    if adjustment.memory_policy:
        linux["memoryPolicy"] = dict(adjustment.memory_policy)
    if adjustment.namespaces:
        _adjust_namespaces(linux, adjustment.namespaces)
    for key, changes in (("sysctl", adjustment.sysctls), ("netDevices", adjustment.net_devices)):
        if changes:
            linux[key] = _changed(linux.get(key, {}), changes)
    if adjustment.rdt_removed:
        linux.pop("intelRdt", None)
    if adjustment.rdt:
        linux["intelRdt"] = {**linux.get("intelRdt", {}), **adjustment.rdt}


def _adjust_devices(linux: Spec, changes: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Set and remove devices, and what the device cgroup allows for them."""
    changed = {normal_path(path) for path in changes}
    kept = [d for d in linux.get("devices", ()) if normal_path(d["path"]) not in changed]
    gone = [d for d in linux.get("devices", ()) if normal_path(d["path"]) in changed]
    numbers_kept = [_numbers(d) for d in kept]
    numbers_gone = [n for n in map(_numbers, gone) if n not in numbers_kept]
    resources = dict(linux.get("resources", {}))
    rules = [r for r in resources.get("devices", ()) if not (r["allow"] and _numbers(r) in numbers_gone)]
    added = [dict(device) for device in changes.values() if device is not None]
    for device in added:
        if device["type"] != "p":
            access = "rwm" if device["type"] == "b" else "rw"
            rules.append({"allow": True, **_numbers(device), "access": access})
    linux["devices"] = [*kept, *added]
    linux["resources"] = {**resources, "devices": rules}


def _numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry.get(key) for key in ("type", "major", "minor")}


def _adjust_namespaces(linux: Spec, changes: Mapping[str, str | None]) -> None:
    """Set and remove namespaces. A path of "" is a new namespace."""
    namespaces = {one["type"]: one for one in linux.get("namespaces", ())}
    for kind, path in changes.items():
        namespaces[kind] = {"type": kind, **({"path": path} if path else {})}
        if path is None:
            del namespaces[kind]
    linux["namespaces"] = list(namespaces.values())


def _adjust_mounts(spec: Spec, changes: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Set and remove mounts. The root of the container propagates as far as one of its new mounts has to."""
    changed = {normal_path(path) for path in changes}
    kept = [m for m in spec["mounts"] if normal_path(m["destination"]) not in changed]
    added = [mount for mount in changes.values() if mount is not None]
    spec["mounts"] = in_mount_order([*kept, *added])
    rank: Callable[[str], int] = _PROPAGATIONS.index
    asked = [option for mount in added for option in mount["options"] if option in _PROPAGATIONS]
    widest = max([*asked, spec["linux"].get("rootfsPropagation", "rprivate")], key=rank)
    if rank(widest):
        spec["linux"]["rootfsPropagation"] = widest
