"""Adjustments and updates of plugins as values: from NRI's messages to the shapes of the OCI runtime specification."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from google.protobuf.message import Message

from criserver.errors import FailedPreconditionError
from criserver.nri.ownership import removed
from criserver.oci.adjustment_faults import AdjustmentFault, resource_faults
from criserver.oci.adjustment_value import SpecAdjustment
from criserver.oci.spec_inputs import HostFacts
from criserver.pb.nri.v1alpha1 import api_pb2 as nri

_HOOKS = {
    "prestart": "prestart",
    "create_runtime": "createRuntime",
    "create_container": "createContainer",
    "start_container": "startContainer",
    "poststart": "poststart",
    "poststop": "poststop",
}
_MEMORY = {
    "limit": "limit",
    "reservation": "reservation",
    "swap": "swap",
    "kernel": "kernel",
    "kernel_tcp": "kernelTCP",
    "swappiness": "swappiness",
    "disable_oom_killer": "disableOOMKiller",
    "use_hierarchy": "useHierarchy",
}
_CPU = {
    "shares": "shares",
    "quota": "quota",
    "period": "period",
    "realtime_runtime": "realtimeRuntime",
    "realtime_period": "realtimePeriod",
    "cpus": "cpus",
    "mems": "mems",
}


def spec_adjustment(
    container_id: str, adjustment: nri.ContainerAdjustment, owners: nri.OwningPlugins
) -> SpecAdjustment:
    """The value of a merged adjustment. ``owners`` are named in errors."""
    linux = adjustment.linux
    return SpecAdjustment(
        container_id=container_id,
        annotations=_texts(adjustment.annotations.items()),
        env=_texts((one.key, one.value) for one in adjustment.env),
        args=tuple(adjustment.args),
        hooks=tuple((oci, _hook(hook)) for name, oci in _HOOKS.items() for hook in getattr(adjustment.hooks, name)),
        cdi_devices=tuple(device.name for device in adjustment.CDI_devices),
        devices=dict(_marked((one.path, _device(one)) for one in linux.devices)),
        resources=oci_resources(linux.resources),
        unsupported=unsupported_classes(linux.resources),
        cgroups_path=linux.cgroups_path,
        oom_score_adj=linux.oom_score_adj.value if linux.HasField("oom_score_adj") else None,
        io_priority=_io_priority(linux.io_priority),
        scheduler=_scheduler(linux.scheduler),
        seccomp=_seccomp(linux.seccomp_policy) if linux.HasField("seccomp_policy") else None,
        namespaces=dict(_marked((one.type, one.path) for one in linux.namespaces)),
        sysctls=_texts(linux.sysctl.items()),
        net_devices=dict(
            _marked((name, {"name": one.name} if one.name else {}) for name, one in linux.net_devices.items())
        ),
        memory_policy=_memory_policy(linux.memory_policy) if linux.HasField("memory_policy") else None,
        rdt=_rdt(linux.rdt),
        # A class of "" removes what the spec has, as the plugins' own removal does.
        rdt_removed=linux.rdt.remove or (linux.resources.HasField("rdt_class") and not linux.resources.rdt_class.value),
        mounts=dict(_marked((one.destination, _mount(one)) for one in adjustment.mounts)),
        rlimits=tuple({"type": one.type, "hard": one.hard, "soft": one.soft} for one in adjustment.rlimits),
        owners=_named_owners(container_id, owners),
    )


def update_limits(
    container_id: str,
    asked: nri.LinuxResources,
    owners: nri.OwningPlugins,
    host: HostFacts,
) -> dict[str, Any]:
    """The OCI limits of an update of a container.

    Raises FailedPreconditionError, with the plugin's name, for what plugins ask for and this node cannot give. Limits
    that no plugin owns are the kubelet's, which may ask for more than the node has.
    """
    limits = oci_resources(asked)
    asking = SpecAdjustment(container_id=container_id, resources=limits, owners=_named_owners(container_id, owners))
    reasons = (AdjustmentFault(field, "", reason) for field, reason in unsupported_classes(asked).items())
    for fault in (*reasons, *resource_faults(limits, host)):
        if (fault.field, fault.key) in asking.owners:
            raise FailedPreconditionError(f"{asking.asked_by(fault.field, fault.key)}: {fault.reason}")
    return limits


def oci_resources(asked: nri.LinuxResources) -> dict[str, Any]:
    """The OCI ``linux.resources`` with what ``asked`` sets. A memory limit of 0 sets none."""
    memory = _set_values(asked.memory, _MEMORY)
    resources: dict[str, Any] = {
        "memory": {key: value for key, value in memory.items() if key not in ("limit", "swap") or value},
        "cpu": _set_values(asked.cpu, _CPU),
        "hugepageLimits": [{"pageSize": one.page_size, "limit": one.limit} for one in asked.hugepage_limits],
        "unified": dict(asked.unified),
        "devices": [_device_rule(one) for one in asked.devices],
    }
    if asked.HasField("pids"):
        resources["pids"] = {"limit": asked.pids.limit}
    # A node has one hierarchy: these ask for what it does already.
    if memory.get("useHierarchy") is True:
        del resources["memory"]["useHierarchy"]
    return {key: value for key, value in resources.items() if value}


def unsupported_classes(asked: nri.LinuxResources) -> dict[str, str]:
    """The reasons to refuse classes, by the name of their field. "" asks for no class, which every container has."""
    reasons = {}
    if asked.blockio_class.value:
        reasons["BlockioClass"] = f"this daemon has no block I/O class {asked.blockio_class.value!r}; it has none"
    if asked.rdt_class.value:
        reasons["RdtClass"] = (
            f"this daemon has no RDT class {asked.rdt_class.value!r}; it has none, but a plugin can set linux.rdt"
        )
    return reasons


def _set_values(message: Message, names: Mapping[str, str]) -> dict[str, Any]:
    """The values that the message sets, by their OCI names. A value is a text or a message with a ``value``."""
    return {
        names[field.name]: value if isinstance(value, str) else value.value for field, value in message.ListFields()
    }


def _marked(items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The items, with None for what a name marks for removal."""
    for name, value in items:
        key = removed(name)
        yield (name, value) if key is None else (key, None)


def _texts(items: Iterable[tuple[str, str]]) -> dict[str, str | None]:
    return dict(_marked(items))


def _named_owners(container_id: str, owners: nri.OwningPlugins) -> dict[tuple[str, str], str]:
    """The plugins by the name of the field and its key, or "". A plugin that has removed a value counts too."""
    found: dict[tuple[str, str], str] = {}
    if container_id not in owners.owners:
        return found
    for number, plugin in owners.owners[container_id].simple.items():
        found[nri.Field.Name(nri.Field.ValueType(number)), ""] = removed(plugin) or plugin
    for number, compound in owners.owners[container_id].compound.items():
        name = nri.Field.Name(nri.Field.ValueType(number))
        for key, plugin in compound.owners.items():
            found[name, key] = removed(plugin) or plugin
    return found


def _hook(hook: nri.Hook) -> dict[str, Any]:
    oci: dict[str, Any] = {"path": hook.path}
    if hook.args:
        oci["args"] = list(hook.args)
    if hook.env:
        oci["env"] = list(hook.env)
    if hook.HasField("timeout"):
        oci["timeout"] = hook.timeout.value
    return oci


def _mount(mount: nri.Mount) -> dict[str, Any]:
    return {
        "destination": mount.destination,
        "type": mount.type,
        "source": mount.source,
        "options": list(mount.options),
    }


def _device(device: nri.LinuxDevice) -> dict[str, Any]:
    oci: dict[str, Any] = {"path": device.path, "type": device.type, "major": device.major, "minor": device.minor}
    for name, key in (("file_mode", "fileMode"), ("uid", "uid"), ("gid", "gid")):
        if device.HasField(name):
            oci[key] = getattr(device, name).value
    return oci


def _device_rule(rule: nri.LinuxDeviceCgroup) -> dict[str, Any]:
    oci: dict[str, Any] = {"allow": rule.allow, "type": rule.type, "access": rule.access}
    for name in ("major", "minor"):
        if rule.HasField(name):
            oci[name] = getattr(rule, name).value
    return oci


def _io_priority(priority: nri.LinuxIOPriority) -> dict[str, Any] | None:
    if getattr(priority, "class") == nri.IOPRIO_CLASS_NONE:
        return None
    return {"class": nri.IOPrioClass.Name(getattr(priority, "class")), "priority": priority.priority}


def _scheduler(scheduler: nri.LinuxScheduler) -> dict[str, Any] | None:
    if scheduler.policy == nri.SCHED_NONE:
        return None
    oci: dict[str, Any] = {"policy": nri.LinuxSchedulerPolicy.Name(scheduler.policy)}
    for name in ("nice", "priority", "runtime", "deadline", "period"):
        if value := getattr(scheduler, name):
            oci[name] = value
    if scheduler.flags:
        oci["flags"] = [nri.LinuxSchedulerFlag.Name(flag) for flag in scheduler.flags]
    return oci


def _memory_policy(policy: nri.LinuxMemoryPolicy) -> dict[str, Any]:
    oci: dict[str, Any] = {"mode": nri.MpolMode.Name(policy.mode)}
    if policy.nodes:
        oci["nodes"] = policy.nodes
    if policy.flags:
        oci["flags"] = [nri.MpolFlag.Name(flag) for flag in policy.flags]
    return oci


def _rdt(rdt: nri.LinuxRdt) -> dict[str, Any] | None:
    oci: dict[str, Any] = {}
    if rdt.HasField("clos_id"):
        oci["closID"] = rdt.clos_id.value
    if rdt.HasField("schemata"):
        oci["schemata"] = list(rdt.schemata.value)
    if rdt.HasField("enable_monitoring"):
        oci["enableMonitoring"] = rdt.enable_monitoring.value
    return oci or None


def _seccomp(policy: nri.LinuxSeccomp) -> dict[str, Any]:
    oci: dict[str, Any] = {"defaultAction": policy.default_action}
    if policy.HasField("default_errno"):
        oci["defaultErrnoRet"] = policy.default_errno.value
    for name, key in (("architectures", "architectures"), ("flags", "flags")):
        if getattr(policy, name):
            oci[key] = list(getattr(policy, name))
    if policy.listener_path:
        oci["listenerPath"] = policy.listener_path
    if policy.listener_metadata:
        oci["listenerMetadata"] = policy.listener_metadata
    oci["syscalls"] = [_syscall(call) for call in policy.syscalls]
    return oci


def _syscall(call: nri.LinuxSyscall) -> dict[str, Any]:
    oci: dict[str, Any] = {"names": list(call.names), "action": call.action}
    if call.HasField("errno_ret"):
        oci["errnoRet"] = call.errno_ret.value
    if call.args:
        oci["args"] = [
            {"index": one.index, "value": one.value, "valueTwo": one.value_two, "op": one.op} for one in call.args
        ]
    return oci
