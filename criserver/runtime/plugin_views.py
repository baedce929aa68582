"""Pods and containers as plugins of the node see them: NRI's messages, from records and OCI specs. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from criserver.oci.spec_inputs import Spec
from criserver.pb.nri.v1alpha1 import api_pb2 as nri
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.lifecycle import ContainerState
from criserver.runtime.records import Container, Sandbox

_STATES = {
    # Callers do not see a container that is being made, but plugins do: as one that is created.
    ContainerState.CREATING: nri.CONTAINER_CREATED,
    ContainerState.CREATED: nri.CONTAINER_CREATED,
    ContainerState.STARTING: nri.CONTAINER_CREATED,
    ContainerState.RUNNING: nri.CONTAINER_RUNNING,
    ContainerState.EXITED: nri.CONTAINER_STOPPED,
    ContainerState.REMOVING: nri.CONTAINER_STOPPED,
}
_HOOKS = {
    "prestart": "prestart",
    "createRuntime": "create_runtime",
    "createContainer": "create_container",
    "startContainer": "start_container",
    "poststart": "poststart",
    "poststop": "poststop",
}
_MEMORY = {
    "limit": ("limit", nri.OptionalInt64),
    "reservation": ("reservation", nri.OptionalInt64),
    "swap": ("swap", nri.OptionalInt64),
    "kernel": ("kernel", nri.OptionalInt64),
    "kernelTCP": ("kernel_tcp", nri.OptionalInt64),
    "swappiness": ("swappiness", nri.OptionalUInt64),
    "disableOOMKiller": ("disable_oom_killer", nri.OptionalBool),
    "useHierarchy": ("use_hierarchy", nri.OptionalBool),
}
_CPU = {
    "shares": ("shares", nri.OptionalUInt64),
    "quota": ("quota", nri.OptionalInt64),
    "period": ("period", nri.OptionalUInt64),
    "realtimeRuntime": ("realtime_runtime", nri.OptionalInt64),
    "realtimePeriod": ("realtime_period", nri.OptionalUInt64),
}


def pod_view(sandbox: Sandbox, *, pid: int, cgroups_path: str, namespaces: Iterable[tuple[str, str]]) -> nri.PodSandbox:
    """A pod. ``pid`` is that of its infra process, 0 without one; ``namespaces`` are pairs of type and path."""
    config = sandbox.config
    sent = cri.PodSandboxConfig.FromString(sandbox.sent).linux
    pod = nri.PodSandbox(
        id=sandbox.id,
        name=config.name,
        uid=config.uid,
        namespace=config.namespace,
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=sandbox.handler,
        pid=pid,
        ips=sandbox.ips,
        linux=nri.LinuxPodSandbox(
            cgroup_parent=config.cgroup_parent,
            cgroups_path=cgroups_path,
            namespaces=[nri.LinuxNamespace(type=kind, path=path) for kind, path in namespaces],
        ),
    )
    if sent.HasField("overhead"):
        pod.linux.pod_overhead.CopyFrom(asked_resources(sent.overhead))
    if sent.HasField("resources"):
        pod.linux.pod_resources.CopyFrom(asked_resources(sent.resources))
    return pod


def container_view(container: Container, spec: Spec, image_digest: str = "") -> nri.Container:
    """A container. ``spec`` is its OCI spec, and {} where it has none."""
    config, process = container.config, spec.get("process", {})
    view = nri.Container(
        id=container.id,
        pod_sandbox_id=container.sandbox_id,
        name=config.name,
        labels=config.labels,
        annotations={**config.annotations, **spec.get("annotations", {})},
        args=process.get("args", ()),
        env=process.get("env", ()),
        mounts=[
            nri.Mount(
                destination=m["destination"],
                type=m.get("type", ""),
                source=m.get("source", ""),
                options=m.get("options", ()),
            )
            for m in spec.get("mounts", ())
        ],
        hooks=_hooks(spec.get("hooks", {})),
        linux=_linux(container, spec),
        rlimits=[nri.POSIXRlimit(type=r["type"], hard=r["hard"], soft=r["soft"]) for r in process.get("rlimits", ())],
        CDI_devices=[nri.CDIDevice(name=name) for name in config.cdi_devices],
        image=nri.Image(name=config.image, digest=image_digest, config_digest=container.image_id),
    )
    if "user" in process:
        user = process["user"]
        view.user.CopyFrom(nri.User(uid=user["uid"], gid=user["gid"], additional_gids=user.get("additionalGids", ())))
    set_status(view, container)
    return view


def set_status(view: nri.Container, container: Container) -> None:
    """Set what changes in the life of a container."""
    view.state = _STATES[container.state]
    view.pid = container.pid
    view.created_at = container.created_at
    view.started_at = container.started_at
    view.finished_at = container.finished_at
    view.exit_code = container.exit_code
    view.status_reason = container.reason
    view.status_message = container.message


def _linux(container: Container, spec: Spec) -> nri.LinuxContainer:
    linux, process = spec.get("linux", {}), spec.get("process", {})
    view = nri.LinuxContainer(
        namespaces=[nri.LinuxNamespace(type=n["type"], path=n.get("path", "")) for n in linux.get("namespaces", ())],
        devices=[_device(d) for d in linux.get("devices", ())],
        resources=spec_resources(linux.get("resources", {})),
        cgroups_path=linux.get("cgroupsPath", ""),
        sysctl=linux.get("sysctl", {}),
    )
    if "oomScoreAdj" in process:
        view.oom_score_adj.value = process["oomScoreAdj"]
    if "ioPriority" in process:
        priority = process["ioPriority"]
        view.io_priority.CopyFrom(
            nri.LinuxIOPriority(
                **{"class": priority["class"]},
                priority=priority.get("priority", 0),
            )
        )
    if "scheduler" in process:
        view.scheduler.CopyFrom(_scheduler(process["scheduler"]))
    if "seccomp" in linux:
        view.seccomp_policy.CopyFrom(_seccomp(linux["seccomp"]))
    sent = cri.ContainerConfig.FromString(container.sent).linux.security_context
    if sent.HasField("seccomp"):
        view.seccomp_profile.CopyFrom(
            nri.SecurityProfile(
                profile_type=nri.SecurityProfile.ProfileType.Name(
                    nri.SecurityProfile.ProfileType.ValueType(sent.seccomp.profile_type)
                ),
                localhost_ref=sent.seccomp.localhost_ref,
            )
        )
    for name, device in linux.get("netDevices", {}).items():
        view.net_devices[name].name = device.get("name", "")
    if "intelRdt" in linux:
        view.rdt.CopyFrom(_rdt(linux["intelRdt"]))
    return view


def _hooks(hooks: Mapping[str, Iterable[Spec]]) -> nri.Hooks:
    view = nri.Hooks()
    for oci, name in _HOOKS.items():
        for hook in hooks.get(oci, ()):
            added = getattr(view, name).add(path=hook["path"], args=hook.get("args", ()), env=hook.get("env", ()))
            if "timeout" in hook:
                added.timeout.value = hook["timeout"]
    return view


def _device(device: Spec) -> nri.LinuxDevice:
    view = nri.LinuxDevice(
        path=device["path"], type=device["type"], major=device.get("major", 0), minor=device.get("minor", 0)
    )
    for oci, name in (("fileMode", "file_mode"), ("uid", "uid"), ("gid", "gid")):
        if oci in device:
            getattr(view, name).value = device[oci]
    return view


def spec_resources(resources: Spec) -> nri.LinuxResources:
    """``linux.resources`` of an OCI spec."""
    view = nri.LinuxResources(
        hugepage_limits=[
            nri.HugepageLimit(page_size=one["pageSize"], limit=one["limit"])
            for one in resources.get("hugepageLimits", ())
        ],
        unified=resources.get("unified", {}),
        devices=[_device_rule(rule) for rule in resources.get("devices", ())],
    )
    memory, cpu = resources.get("memory", {}), resources.get("cpu", {})
    for oci, (name, kind) in _MEMORY.items():
        if oci in memory:
            getattr(view.memory, name).CopyFrom(kind(value=memory[oci]))
    for oci, (name, kind) in _CPU.items():
        if oci in cpu:
            getattr(view.cpu, name).CopyFrom(kind(value=cpu[oci]))
    for name in ("cpus", "mems"):
        if name in cpu:
            setattr(view.cpu, name, cpu[name])
    if "pids" in resources:
        view.pids.limit = resources["pids"]["limit"]
    return view


def _device_rule(rule: Spec) -> nri.LinuxDeviceCgroup:
    view = nri.LinuxDeviceCgroup(allow=rule["allow"], type=rule.get("type", ""), access=rule.get("access", ""))
    for name in ("major", "minor"):
        if name in rule:
            getattr(view, name).value = rule[name]
    return view


def _scheduler(scheduler: Spec) -> nri.LinuxScheduler:
    view = nri.LinuxScheduler(
        policy=scheduler["policy"],
        flags=scheduler.get("flags", ()),
    )
    for name in ("nice", "priority", "runtime", "deadline", "period"):
        setattr(view, name, scheduler.get(name, 0))
    return view


def _seccomp(seccomp: Spec) -> nri.LinuxSeccomp:
    view = nri.LinuxSeccomp(
        default_action=seccomp["defaultAction"],
        architectures=seccomp.get("architectures", ()),
        flags=seccomp.get("flags", ()),
        listener_path=seccomp.get("listenerPath", ""),
        listener_metadata=seccomp.get("listenerMetadata", ""),
    )
    if "defaultErrnoRet" in seccomp:
        view.default_errno.value = seccomp["defaultErrnoRet"]
    for call in seccomp.get("syscalls", ()):
        added = view.syscalls.add(names=call["names"], action=call["action"])
        if "errnoRet" in call:
            added.errno_ret.value = call["errnoRet"]
        for one in call.get("args", ()):
            added.args.add(index=one["index"], value=one["value"], value_two=one.get("valueTwo", 0), op=one["op"])
    return view


def _rdt(rdt: Spec) -> nri.LinuxRdt:
    view = nri.LinuxRdt()
    if "closID" in rdt:
        view.clos_id.value = rdt["closID"]
    if "schemata" in rdt:
        view.schemata.value.extend(rdt["schemata"])
    if "enableMonitoring" in rdt:
        view.enable_monitoring.value = rdt["enableMonitoring"]
    return view


def asked_resources(asked: cri.LinuxContainerResources) -> nri.LinuxResources:
    """What the kubelet asks for; 0 and empty are unset."""
    view = nri.LinuxResources(
        hugepage_limits=[nri.HugepageLimit(page_size=h.page_size, limit=h.limit) for h in asked.hugepage_limits],
        unified=asked.unified,
    )
    if asked.memory_limit_in_bytes:
        view.memory.limit.value = asked.memory_limit_in_bytes
    if asked.memory_swap_limit_in_bytes:
        view.memory.swap.value = asked.memory_swap_limit_in_bytes
    for name, value in (("shares", asked.cpu_shares), ("quota", asked.cpu_quota), ("period", asked.cpu_period)):
        if value:
            getattr(view.cpu, name).value = value
    if asked.cpuset_cpus:
        view.cpu.cpus = asked.cpuset_cpus
    if asked.cpuset_mems:
        view.cpu.mems = asked.cpuset_mems
    return view


def cri_resources(asked: nri.LinuxResources) -> cri.LinuxContainerResources:
    """What a plugin asks for, as far as CRI has it: a container's status shows it, and later updates build on it."""
    resources = cri.LinuxContainerResources(
        memory_limit_in_bytes=asked.memory.limit.value,
        memory_swap_limit_in_bytes=asked.memory.swap.value,
        cpu_shares=_int64(asked.cpu.shares.value),
        cpu_quota=asked.cpu.quota.value,
        cpu_period=_int64(asked.cpu.period.value),
        cpuset_cpus=asked.cpu.cpus,
        cpuset_mems=asked.cpu.mems,
        unified=asked.unified,
    )
    for limit in asked.hugepage_limits:
        resources.hugepage_limits.add(page_size=limit.page_size, limit=limit.limit)
    return resources


def _int64(value: int) -> int:
    return min(value, 2**63 - 1)


def namespace_pins(facts: Any) -> list[tuple[str, str]]:
    """The namespaces of a pod, of its :class:`criserver.oci.spec_inputs.PodFacts`."""
    pins = {
        "network": facts.net_namespace,
        "uts": facts.uts_namespace,
        "ipc": facts.ipc_namespace,
        "pid": facts.pid_namespace,
        "user": facts.user_namespace,
    }
    return [(kind, path) for kind, path in pins.items() if path]
