"""Why an adjustment cannot be made: the kernel or the OCI runtime of this node, or of every node, does not have it."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from criserver.oci.adjustment_value import SpecAdjustment
from criserver.oci.spec_inputs import HostFacts, Spec
from criserver.text import quoted

# Resource limits that Linux has (getrlimit(2)).
_RLIMITS = frozenset(
    f"RLIMIT_{name}"
    for name in (
        "AS CORE CPU DATA FSIZE LOCKS MEMLOCK MSGQUEUE NICE NOFILE NPROC RSS RTPRIO RTTIME SIGPENDING STACK".split()
    )
)
_MAX_RLIMIT = 2**64 - 1
# The namespace that keeps a sysctl of a container from the node (namespaces(7), ipc_namespaces(7)).
_SYSCTL_NAMESPACES = (
    (re.compile(r"net[./]"), "network"),
    (re.compile(r"fs[./]mqueue[./]|kernel[./](msg|sem|shm)"), "ipc"),
    (re.compile(r"kernel[./](domainname|hostname)\Z"), "uts"),
)
# Names that systemd takes for a slice (systemd.unit(5), systemd.slice(5)).
_SLICE = re.compile(r"[A-Za-z0-9_.\\@]+(-[A-Za-z0-9_.\\@]+)*\.slice")
_DIRECTORY = re.compile(r"(/[^/\0-\x1f\x7f]+)+")
# Options that an old OCI runtime would hand to the file system as data.
_RUNTIME_OPTIONS = frozenset({"rro", "idmap", "ridmap"})
# Settings that only cgroup version 1 has, with the value that asks for nothing.
_VERSION_1_MEMORY = {"swappiness": ("MemSwappiness", None), "disableOOMKiller": ("MemDisableOomKiller", False)}
_VERSION_1_MEMORY |= {"kernelTCP": ("MemTCPLimit", None)}
_VERSION_1_CPU = {"realtimeRuntime": "CPURealtimeRuntime", "realtimePeriod": "CPURealtimePeriod"}


class AdjustmentFault(NamedTuple):
    """A part of an adjustment that cannot be made: the name of its NRI field, its key or "", and the reason."""

    field: str
    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class RuntimeFacts:
    """The parts of an adjustment that an OCI runtime can make (runtime specification, features.md).

    ``hooks``, ``namespaces``, ``mount_options`` and ``seccomp_actions`` are None if the runtime does not report them.
    ``process_priorities``: ioPriority and scheduler, which are in specification 1.1.0 and in no report of features.
    """

    hooks: frozenset[str] | None = None
    namespaces: frozenset[str] | None = None
    mount_options: frozenset[str] | None = None
    seccomp: bool = True
    seccomp_actions: frozenset[str] | None = None
    rdt: bool = False
    rdt_schemata: bool = False
    rdt_monitoring: bool = False
    net_devices: bool = False
    memory_policies: frozenset[str] = frozenset()
    process_priorities: bool = False


def runtime_facts(report: Mapping[str, Any] | None) -> RuntimeFacts:
    """The facts in the report of a runtime (``OciRuntime.features``); None for a runtime that does not report."""
    if report is None:
        return RuntimeFacts()
    linux = report.get("linux") or {}
    seccomp, rdt = linux.get("seccomp") or {}, linux.get("intelRdt") or {}
    version = re.match(r"([0-9]{1,4})\.([0-9]{1,4})", str(report.get("ociVersionMax", "")))
    return RuntimeFacts(
        hooks=_names(report.get("hooks")),
        namespaces=_names(linux.get("namespaces")),
        mount_options=_names(report.get("mountOptions")),
        seccomp=seccomp.get("enabled") is not False,
        seccomp_actions=_names(seccomp.get("actions")),
        rdt=rdt.get("enabled") is True,
        rdt_schemata=rdt.get("schemata") is True,
        rdt_monitoring=rdt.get("monitoring") is True,
        net_devices=(linux.get("netDevices") or {}).get("enabled") is True,
        memory_policies=_names((linux.get("memoryPolicy") or {}).get("modes")) or frozenset(),
        process_priorities=version is not None and (int(version[1]), int(version[2])) >= (1, 1),
    )


def cgroups_parent(path: str) -> str:
    """The slice in a ``cgroupsPath`` of the form SLICE:PREFIX:NAME; the parent directory in a path."""
    return path.partition(":")[0] if ":" in path else posixpath.dirname(path)


def _names(value: object) -> frozenset[str] | None:
    return frozenset(map(str, value)) if isinstance(value, list) else None


def faults(
    before: Spec, after: Spec, asked: SpecAdjustment, host: HostFacts, runtime: RuntimeFacts
) -> Iterator[AdjustmentFault]:
    """The parts of ``asked`` that cannot be made. ``asked`` makes the spec ``after`` out of ``before``."""
    for nri_field, reason in asked.unsupported.items():
        yield AdjustmentFault(nri_field, "", reason)
    yield from resource_faults(asked.resources, host)
    yield from _mount_faults(asked, runtime)
    yield from _process_faults(asked, host, runtime)
    yield from _hook_faults(asked, runtime)
    yield from _device_faults(asked)
    yield from _namespace_faults(after, asked, runtime)
    yield from _feature_faults(asked, host, runtime)
    if asked.cgroups_path:
        yield from _cgroup_faults(asked.cgroups_path, before["linux"]["cgroupsPath"])


def resource_faults(asked: Mapping[str, Any], host: HostFacts) -> Iterator[AdjustmentFault]:
    """The parts of the ``resources`` of an adjustment or an update that cannot be set."""
    memory, cpu = asked.get("memory", {}), asked.get("cpu", {})
    if "kernel" in memory:
        yield AdjustmentFault(
            "MemKernelLimit", "", "OCI runtimes ignore a limit of kernel memory, which Linux does not have any more"
        )
    if memory.get("useHierarchy") is False:
        yield AdjustmentFault(
            "MemUseHierarchy", "", "Linux always counts the memory of a cgroup's children with its own"
        )
    if host.unified_cgroups:
        for name, (nri_field, nothing) in _VERSION_1_MEMORY.items():
            if name in memory and (nothing is None or memory[name] is not nothing):
                yield AdjustmentFault(nri_field, "", "the node has cgroup version 2, which has no such setting")
        for name, nri_field in _VERSION_1_CPU.items():
            if name in cpu:
                yield AdjustmentFault(nri_field, "", "the node has cgroup version 2, which has no such setting")
    else:
        for key in asked.get("unified", {}):
            yield AdjustmentFault("CgroupsUnified", key, "the node has cgroup version 1; unified needs version 2")
    if not host.swap_accounting and memory.get("swap"):
        yield AdjustmentFault("MemSwapLimit", "", "the node's kernel does not count swap for cgroups")
    for one in asked.get("hugepageLimits", ()):
        if one["pageSize"] not in host.hugepage_sizes:
            sizes = ", ".join(sorted(host.hugepage_sizes)) or "none"
            yield AdjustmentFault("HugepageLimits", one["pageSize"], f"this node can limit page sizes: {sizes}")


def _cgroup_faults(asked: str, own: str) -> Iterator[AdjustmentFault]:
    """A plugin may give another parent. The daemon finds the cgroup, and all processes of the container, by its name.

    The name has the container's ID, so no other container can have it: the end of this one kills all that is in it.
    """
    parent, own_end = cgroups_parent(asked), own.removeprefix(cgroups_parent(own))
    fits = (_SLICE if ":" in own else _DIRECTORY).fullmatch(parent)
    if not fits or {".", ".."} & set(parent.split("/")) or asked != parent + own_end:
        wanted = "SLICE" if ":" in own else "/PARENT"
        yield AdjustmentFault("CgroupsPath", "", f"{quoted(asked)} is not of the form {wanted}{own_end}, as {own} is")


def _mount_faults(asked: SpecAdjustment, runtime: RuntimeFacts) -> Iterator[AdjustmentFault]:
    for destination, mount in asked.mounts.items():
        if mount is None:
            continue
        options: Iterable[str] = mount["options"]
        if not destination.startswith("/"):
            yield AdjustmentFault("Mounts", destination, "the path in the container must be absolute")
        if "relabel" in options:
            yield AdjustmentFault("Mounts", destination, "this daemon does not relabel the mounts of plugins")
        if {"bind", "rbind"} & set(options) and not mount["source"].startswith("/"):
            yield AdjustmentFault(
                "Mounts", destination, f"the source {quoted(mount['source'])} must be an absolute path"
            )
        for option in sorted(_RUNTIME_OPTIONS & set(options)):
            if option not in (runtime.mount_options or ()):
                yield AdjustmentFault("Mounts", destination, f"the OCI runtime does not have the mount option {option}")


def _process_faults(asked: SpecAdjustment, host: HostFacts, runtime: RuntimeFacts) -> Iterator[AdjustmentFault]:
    score = asked.oom_score_adj
    if score is not None and not -1000 <= score <= 1000:
        yield AdjustmentFault("OomScoreAdj", "", f"{score} is not between -1000 and 1000")
    elif score is not None and score < host.oom_score_adj_floor:
        yield AdjustmentFault(
            "OomScoreAdj", "", f"the daemon may not set less than {host.oom_score_adj_floor}: {score}"
        )
    for nri_field, value in (("IoPriority", asked.io_priority), ("LinuxSched", asked.scheduler)):
        if value and not runtime.process_priorities:
            yield AdjustmentFault(
                nri_field, "", "the OCI runtime does not have version 1.1 of the runtime specification"
            )
    if asked.io_priority and not 0 <= asked.io_priority["priority"] <= 7:
        yield AdjustmentFault("IoPriority", "", f"priority {asked.io_priority['priority']} is not between 0 and 7")
    for limit in asked.rlimits:
        if limit["type"] not in _RLIMITS:
            yield AdjustmentFault("Rlimits", limit["type"], "Linux has no such limit; an example is RLIMIT_NOFILE")
        elif limit["soft"] > limit["hard"]:
            yield AdjustmentFault(
                "Rlimits", limit["type"], f"soft limit {limit['soft']} exceeds hard limit {limit['hard']}"
            )


def _hook_faults(asked: SpecAdjustment, runtime: RuntimeFacts) -> Iterator[AdjustmentFault]:
    for name, hook in asked.hooks:
        if runtime.hooks is not None and name not in runtime.hooks:
            yield AdjustmentFault("OciHooks", "", f"the OCI runtime has no {name} hooks")
        if not hook["path"].startswith("/"):
            yield AdjustmentFault(
                "OciHooks", "", f"the program {quoted(hook['path'])} of a {name} hook must have an absolute path"
            )


def _device_faults(asked: SpecAdjustment) -> Iterator[AdjustmentFault]:
    for path, device in asked.devices.items():
        if not path.startswith("/"):
            yield AdjustmentFault("Devices", path, "the path in the container must be absolute")
        if device is not None and device["type"] not in ("b", "c", "u", "p"):
            yield AdjustmentFault("Devices", path, f"type {quoted(device['type'])} is none of b, c, u and p")


def _namespace_faults(spec: Spec, asked: SpecAdjustment, runtime: RuntimeFacts) -> Iterator[AdjustmentFault]:
    for kind, path in asked.namespaces.items():
        if path is not None and runtime.namespaces is not None and kind not in runtime.namespaces:
            yield AdjustmentFault("Namespace", kind, "the OCI runtime has no such namespace")
        if path and not path.startswith("/"):
            yield AdjustmentFault("Namespace", kind, f"the path {quoted(path)} must be absolute")
    kinds = {one["type"] for one in spec["linux"]["namespaces"]}
    for name, value in asked.sysctls.items():
        if value is None:
            continue
        kind = next((kind for pattern, kind in _SYSCTL_NAMESPACES if pattern.match(name)), "")
        if not kind:
            yield AdjustmentFault("Sysctl", name, "it is of the whole node, as no namespace of a container has it")
        elif kind not in kinds:
            yield AdjustmentFault("Sysctl", name, f"the container has the node's {kind} namespace")
    if "network" not in kinds:
        for name, device in asked.net_devices.items():
            if device is not None:
                yield AdjustmentFault("LinuxNetDevices", name, "the container has the node's network namespace")


def _feature_faults(asked: SpecAdjustment, host: HostFacts, runtime: RuntimeFacts) -> Iterator[AdjustmentFault]:
    if asked.seccomp:
        yield from _seccomp_faults(asked.seccomp, runtime)
    if not runtime.net_devices:
        for name, device in asked.net_devices.items():
            if device is not None:
                yield AdjustmentFault("LinuxNetDevices", name, "the OCI runtime cannot move network devices")
    if asked.memory_policy and asked.memory_policy["mode"] not in runtime.memory_policies:
        yield AdjustmentFault("MemoryPolicy", "", f"the OCI runtime does not have mode {asked.memory_policy['mode']}")
    rdt = {"closID": ("RdtClosID", runtime.rdt), "schemata": ("RdtSchemata", runtime.rdt_schemata)}
    rdt["enableMonitoring"] = ("RdtEnableMonitoring", runtime.rdt_monitoring)
    for name, (nri_field, has) in rdt.items():
        if not (asked.rdt or {}).get(name):
            continue
        if not host.resctrl:
            yield AdjustmentFault(nri_field, "", "the node has no resctrl file system at /sys/fs/resctrl")
        elif not has:
            yield AdjustmentFault(nri_field, "", f"the OCI runtime does not have {name} of intelRdt")


def _seccomp_faults(asked: Mapping[str, Any], runtime: RuntimeFacts) -> Iterator[AdjustmentFault]:
    if not runtime.seccomp:
        yield AdjustmentFault("SeccompPolicy", "", "the OCI runtime is built without seccomp")
    if runtime.seccomp_actions is None:
        return
    for action in (asked["defaultAction"], *(call["action"] for call in asked.get("syscalls", ()))):
        if action not in runtime.seccomp_actions:
            yield AdjustmentFault("SeccompPolicy", "", f"the OCI runtime does not have the action {quoted(action)}")
            return
