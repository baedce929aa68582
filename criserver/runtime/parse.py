"""From the kubelet's messages to this room's values: every field is taken over or refused, none is dropped.

Refusals come before any side effect: InvalidArgumentError for what can never be right.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from criserver.errors import InvalidArgumentError
from criserver.model import (
    ContainerConfig,
    Device,
    Dns,
    IdMapping,
    Mount,
    NamespaceMode,
    Namespaces,
    PodConfig,
    PortMapping,
    Propagation,
    Resources,
    Security,
    SelinuxOptions,
    UserNamespace,
)
from criserver.oci import cdi
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.text import quoted

_Value = TypeVar("_Value")

_MODES = {
    cri.POD: NamespaceMode.POD,
    cri.CONTAINER: NamespaceMode.CONTAINER,
    cri.NODE: NamespaceMode.NODE,
    cri.TARGET: NamespaceMode.TARGET,
}
_PROTOCOLS = {cri.TCP: "tcp", cri.UDP: "udp", cri.SCTP: "sctp"}
_PROPAGATIONS = {
    cri.PROPAGATION_PRIVATE: Propagation.PRIVATE,
    cri.PROPAGATION_HOST_TO_CONTAINER: Propagation.HOST_TO_CONTAINER,
    cri.PROPAGATION_BIDIRECTIONAL: Propagation.BIDIRECTIONAL,
}
# It becomes a part of a label, and a label one of mount options.
_OF_A_LABEL = re.compile(r"[A-Za-z0-9_.:,-]*")
_KINDS = {
    cri.SecurityProfile.RuntimeDefault: "default",
    cri.SecurityProfile.Unconfined: "unconfined",
    cri.SecurityProfile.Localhost: "localhost",
}
_STRICT = {cri.Merge: False, cri.Strict: True}
_SIGNALS = {number: "" if number == cri.RUNTIME_DEFAULT else name for name, number in cri.Signal.items()}
# What ends a line, or a word, of the pod's files: resolv.conf(5), hosts(5).
_NOT_A_WORD = re.compile(r"[\s\x00-\x1f\x7f]")
_SYSCTL = re.compile(r"[a-zA-Z0-9_-]+([./][a-zA-Z0-9_-]+)+")
# Sysctls that belong to a namespace of the pod, and so cannot touch the host (kernel Documentation/admin-guide/sysctl).
_IPC_SYSCTLS = ("kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue.")


def pod_config(sent: cri.PodSandboxConfig) -> PodConfig:
    """The pod that a PodSandboxConfig describes. Raises InvalidArgumentError."""
    meta = sent.metadata
    for field in ("name", "namespace", "uid"):
        if not getattr(meta, field):
            raise InvalidArgumentError(f"the pod sandbox's metadata.{field} is empty; it must be given")
    _no_windows(sent, f"pod {meta.namespace}/{meta.name}")
    linux, security = sent.linux, sent.linux.security_context
    namespaces = _namespaces(security.namespace_options)
    for kind in ("network", "ipc"):
        if getattr(namespaces, kind) is NamespaceMode.CONTAINER:
            raise InvalidArgumentError(f"namespace_options.{kind} = CONTAINER: containers of a pod share it")
    if namespaces.pid is NamespaceMode.TARGET:
        raise InvalidArgumentError("namespace_options.pid = TARGET: a pod sandbox has no target, a container has")
    if namespaces.user is not None and namespaces.network is NamespaceMode.NODE:
        raise InvalidArgumentError("a pod with a user namespace of its own cannot use the host's network")
    _words("hostname", [sent.hostname] if sent.hostname else [])
    if len(sent.hostname) > 64:
        raise InvalidArgumentError(
            f"hostname {quoted(sent.hostname)} has {len(sent.hostname)} characters; the kernel takes 64"
        )
    # Checked alone: a sandbox has no process, or one that can do nothing.
    _known("supplemental_groups_policy", security.supplemental_groups_policy, _STRICT)
    _seccomp(security, "pod sandbox")
    _apparmor(security, "", "pod sandbox")
    return PodConfig(
        name=meta.name,
        namespace=meta.namespace,
        uid=meta.uid,
        attempt=meta.attempt,
        hostname=sent.hostname,
        log_directory=_absolute("log_directory", sent.log_directory),
        dns=Dns(
            _words("dns_config.servers", sent.dns_config.servers),
            _words("dns_config.searches", sent.dns_config.searches),
            _words("dns_config.options", sent.dns_config.options),
        ),
        port_mappings=tuple(_port_mapping(p) for p in sent.port_mappings),
        labels=dict(sent.labels),
        annotations=dict(sent.annotations),
        cgroup_parent=_cgroup_parent(linux.cgroup_parent),
        sysctls=_sysctls(linux.sysctls, namespaces),
        namespaces=namespaces,
        privileged=security.privileged,
        selinux=_selinux(security.selinux_options),
    )


def container_config(sent: cri.ContainerConfig, pod: PodConfig) -> ContainerConfig:
    """The container that a ContainerConfig describes, in ``pod``. Raises as :func:`pod_config` does."""
    name = sent.metadata.name
    if not name:
        raise InvalidArgumentError("the container's metadata.name is empty; it must be given")
    _no_windows(sent, f"container {name}")
    if not sent.image.image:
        raise InvalidArgumentError(f"container {name}: image.image is empty; an image must be named")
    security = sent.linux.security_context
    if security.privileged and not pod.privileged:
        raise InvalidArgumentError(
            f"container {name} is privileged and its pod sandbox is not: CRI wants security_context.privileged of both"
        )
    return ContainerConfig(
        name=name,
        attempt=sent.metadata.attempt,
        image=sent.image.image,
        command=tuple(sent.command),
        args=tuple(sent.args),
        working_dir=sent.working_dir,
        envs=tuple(_env(e, name) for e in sent.envs),
        mounts=tuple(_mount(m, name) for m in sent.mounts),
        devices=tuple(_device(d, name) for d in sent.devices),
        cdi_devices=_cdi_devices(sent),
        labels=dict(sent.labels),
        annotations=dict(sent.annotations),
        log_path=_log_path(sent.log_path, pod),
        stdin=sent.stdin,
        stdin_once=sent.stdin_once,
        tty=sent.tty,
        resources=resources(sent.linux.resources),
        security=_security(security, name),
        namespaces=_container_namespaces(security, pod),
        stop_signal=_known("stop_signal", sent.stop_signal, _SIGNALS),
    )


def _known(field: str, number: int, values: Mapping[Any, _Value]) -> _Value:
    """What a number of an enumeration means; a later CRI than this one may have more of them."""
    if number not in values:
        raise InvalidArgumentError(f"{field} = {number} is not known to this version of CRI")
    return values[number]


def _words(field: str, given: Iterable[str]) -> tuple[str, ...]:
    """Values that become words of a line in a file of the pod's."""
    found = tuple(given)
    for word in found:
        if not word or _NOT_A_WORD.search(word):
            raise InvalidArgumentError(
                f"{field}: {quoted(word)} must be a word, without white space or control characters"
            )
    return found


def _no_windows(sent: cri.PodSandboxConfig | cri.ContainerConfig, what: str) -> None:
    if sent.HasField("windows"):
        raise InvalidArgumentError(f"{what}: the windows section is set, and this node runs Linux")


def _absolute(field: str, path: str) -> str:
    if path and not path.startswith("/"):
        raise InvalidArgumentError(f"{field} = {quoted(path)} must be an absolute path")
    return os.path.normpath(path) if path else ""


def _log_path(path: str, pod: PodConfig) -> str:
    """The log's absolute path, or "" where the kubelet wants no log. It stays below the pod's directory."""
    if not path or not pod.log_directory:
        return ""
    full = os.path.normpath(os.path.join(pod.log_directory, path))
    if not full.startswith(pod.log_directory.rstrip("/") + "/"):
        raise InvalidArgumentError(
            f"log_path = {quoted(path)} leads out of the pod's log_directory {pod.log_directory}"
        )
    return full


def _cgroup_parent(parent: str) -> str:
    if not parent:
        return ""
    if ".." in parent.split("/"):
        raise InvalidArgumentError(f"cgroup_parent = {quoted(parent)} must not contain '..'")
    if parent.endswith(".slice"):
        return parent
    return os.path.normpath("/" + parent.strip("/"))


def _namespaces(options: cri.NamespaceOption) -> Namespaces:
    for kind in ("network", "ipc"):
        if getattr(options, kind) == cri.TARGET:
            raise InvalidArgumentError(f"namespace_options.{kind} = TARGET: only a PID namespace can be a target's")
    if (options.pid == cri.TARGET) != bool(options.target_id):
        raise InvalidArgumentError("namespace_options: pid = TARGET and target_id go together")
    return Namespaces(
        _known("namespace_options.network", options.network, _MODES),
        _known("namespace_options.pid", options.pid, _MODES),
        _known("namespace_options.ipc", options.ipc, _MODES),
        options.target_id,
        _user_namespace(options.userns_options) if options.HasField("userns_options") else None,
    )


def _user_namespace(sent: cri.UserNamespace) -> UserNamespace | None:
    """The pod's user namespace, None for the host's (CRI UserNamespace: one mapping each, from ID 0 on)."""
    what = "namespace_options.userns_options"
    if sent.mode == cri.NODE:
        if sent.uids or sent.gids:
            raise InvalidArgumentError(f"{what}: mode = NODE has no mappings, and some are given")
        return None
    if sent.mode != cri.POD:
        mode = _known(f"{what}.mode", sent.mode, _MODES)
        raise InvalidArgumentError(f"{what}: mode = {mode.name} is neither POD nor NODE")
    return UserNamespace(_only_mapping(f"{what}.uids", sent.uids), _only_mapping(f"{what}.gids", sent.gids))


def _only_mapping(what: str, sent: Sequence[cri.IDMapping]) -> IdMapping:
    if len(sent) != 1:
        raise InvalidArgumentError(f"{what} has {len(sent)} mappings; there must be one")
    mapping = _id_mapping(what, sent[0])
    if mapping.container_id != 0:
        raise InvalidArgumentError(
            f"{what} maps IDs from {mapping.container_id} on; the container's ID 0 must be mapped"
        )
    return mapping


def _id_mapping(what: str, sent: cri.IDMapping) -> IdMapping:
    if not sent.length or max(sent.host_id, sent.container_id) + sent.length > 2**32 - 1:
        raise InvalidArgumentError(
            f"{what}: {sent.length} IDs from {sent.container_id} and {sent.host_id} on do not exist"
        )
    return IdMapping(sent.container_id, sent.host_id, sent.length)


def _container_namespaces(security: cri.LinuxContainerSecurityContext, pod: PodConfig) -> Namespaces:
    if not security.HasField("namespace_options"):
        return pod.namespaces
    asked = _namespaces(security.namespace_options)
    if not security.namespace_options.HasField("userns_options"):
        asked = dataclasses.replace(asked, user=pod.namespaces.user)
    if asked.user != pod.namespaces.user:
        raise InvalidArgumentError("namespace_options.userns_options differ from the pod sandbox's; both must agree")
    if asked.pid is NamespaceMode.POD and pod.namespaces.pid is not NamespaceMode.POD:
        raise InvalidArgumentError(
            "namespace_options.pid = POD, but the pod sandbox was made without a shared PID namespace "
            f"(its mode is {pod.namespaces.pid.name}); both must agree"
        )
    for kind in ("network", "ipc"):
        if getattr(asked, kind) is not getattr(pod.namespaces, kind):
            raise InvalidArgumentError(
                f"namespace_options.{kind} = {getattr(asked, kind).name} differs from the pod sandbox's "
                f"{getattr(pod.namespaces, kind).name}; a container uses its pod's"
            )
    return asked


def _sysctls(sysctls: Mapping[str, str], namespaces: Namespaces) -> dict[str, str]:
    found = dict(sysctls)
    for name in found:
        if not _SYSCTL.fullmatch(name):
            raise InvalidArgumentError(f"sysctl {quoted(name)} is not a sysctl's name")
        dotted = name.replace("/", ".")
        if dotted.startswith("net."):
            owner = namespaces.network
        elif dotted.startswith(_IPC_SYSCTLS):
            owner = namespaces.ipc
        else:
            raise InvalidArgumentError(
                f"sysctl {name} does not belong to a namespace of the pod; it would change the node"
            )
        if owner is NamespaceMode.NODE:
            raise InvalidArgumentError(f"sysctl {name} would change the node: the pod uses the host's namespace for it")
    return found


def _port_mapping(sent: cri.PortMapping) -> PortMapping:
    for field in ("container_port", "host_port"):
        if not 0 <= getattr(sent, field) <= 65535:
            raise InvalidArgumentError(f"port_mappings: {field} = {getattr(sent, field)} is not a port")
    protocol = _known("port_mappings: protocol", sent.protocol, _PROTOCOLS)
    return PortMapping(protocol, sent.container_port, sent.host_port, sent.host_ip)


def _env(sent: cri.KeyValue, name: str) -> tuple[str, str]:
    if not sent.key or "=" in sent.key or "\0" in sent.key or b"\0" in sent.value:
        raise InvalidArgumentError(f"container {name}: environment variable {quoted(sent.key)} is not well formed")
    try:
        return sent.key, sent.value.decode()
    except UnicodeDecodeError as e:
        raise InvalidArgumentError(f"container {name}: environment variable {sent.key} is not UTF-8") from e


def _mount(sent: cri.Mount, name: str) -> Mount:
    if not sent.container_path.startswith("/"):
        raise InvalidArgumentError(
            f"container {name}: mount container_path = {quoted(sent.container_path)} must be an absolute path"
        )
    what = f"container {name}: mount {sent.container_path}"
    if bool(sent.uidMappings) != bool(sent.gidMappings):
        raise InvalidArgumentError(f"{what}: uidMappings and gidMappings go together")
    if sent.recursive_read_only and not (sent.readonly and sent.propagation == cri.PROPAGATION_PRIVATE):
        raise InvalidArgumentError(f"{what}: recursive_read_only needs readonly, and PROPAGATION_PRIVATE")
    image = sent.image.image
    if sent.HasField("image"):
        if not image:
            raise InvalidArgumentError(f"{what}: image.image is empty; an image must be named")
        if not sent.readonly:
            raise InvalidArgumentError(f"{what}: an image volume must be readonly")
        if sent.host_path:
            raise InvalidArgumentError(f"{what}: image and host_path = {quoted(sent.host_path)} are both set; give one")
    elif sent.image_sub_path:
        raise InvalidArgumentError(f"{what}: image_sub_path is set without an image")
    elif not sent.host_path:
        raise InvalidArgumentError(f"{what}: host_path is empty; it must be given")
    return Mount(
        container_path=os.path.normpath(sent.container_path),
        host_path=_absolute(f"{what}: host_path", sent.host_path),
        readonly=sent.readonly,
        propagation=_known(f"{what}: propagation", sent.propagation, _PROPAGATIONS),
        recursive_readonly=sent.recursive_read_only,
        image=image,
        image_sub_path=_sub_path(what, sent.image_sub_path),
        uids=tuple(_id_mapping(f"{what}: uidMappings", m) for m in sent.uidMappings),
        gids=tuple(_id_mapping(f"{what}: gidMappings", m) for m in sent.gidMappings),
        selinux_relabel=sent.selinux_relabel,
    )


def _sub_path(what: str, path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise InvalidArgumentError(f"{what}: image_sub_path = {quoted(path)} must be a relative path without '..'")
    return path


def _device(sent: cri.Device, name: str) -> Device:
    permissions = sent.permissions or "rwm"
    if set(permissions) - set("rwm"):
        raise InvalidArgumentError(
            f"container {name}: device {sent.host_path}: permissions {quoted(permissions)} are not of r, w, m"
        )
    return Device(
        _absolute(f"container {name}: device container_path", sent.container_path or sent.host_path),
        _absolute(f"container {name}: device host_path", sent.host_path),
        permissions,
    )


def resources(sent: cri.LinuxContainerResources) -> Resources:
    """The limits that a LinuxContainerResources names. Raises InvalidArgumentError for what the host cannot do."""
    if sent.unified and not os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        raise InvalidArgumentError("resources.unified is set, and this node has cgroup version 1")
    if not -1000 <= sent.oom_score_adj <= 1000:
        raise InvalidArgumentError(f"resources.oom_score_adj = {sent.oom_score_adj} is not between -1000 and 1000")
    return Resources(
        cpu_period=sent.cpu_period,
        cpu_quota=sent.cpu_quota,
        cpu_shares=sent.cpu_shares,
        memory_limit=sent.memory_limit_in_bytes,
        memory_swap_limit=sent.memory_swap_limit_in_bytes,
        oom_score_adj=sent.oom_score_adj,
        cpuset_cpus=sent.cpuset_cpus,
        cpuset_mems=sent.cpuset_mems,
        hugepage_limits=tuple((h.page_size, h.limit) for h in sent.hugepage_limits),
        unified=dict(sent.unified),
    )


def _apparmor(
    security: cri.LinuxContainerSecurityContext | cri.LinuxSandboxSecurityContext, deprecated: str, what: str
) -> str:
    """The profile as Security has it, from the new field or, where that is not set, the deprecated one."""
    if security.privileged:
        return "unconfined"
    if security.HasField("apparmor"):
        kind = _known(f"{what}: apparmor.profile_type", security.apparmor.profile_type, _KINDS)
        if kind != "localhost":
            return "runtime/default" if kind == "default" else kind
        # Kubelets write the name alone, others as the deprecated field has it.
        name = security.apparmor.localhost_ref.removeprefix("localhost/")
    else:
        if deprecated in ("", "runtime/default", "unconfined"):
            return deprecated
        kind, _, name = deprecated.partition("/")
        if kind != "localhost":
            raise InvalidArgumentError(f"{what}: apparmor_profile = {quoted(deprecated)} is of no known form")
    if not name:
        raise InvalidArgumentError(f"{what}: the AppArmor profile of type Localhost has no name")
    return name


def _selinux(sent: cri.SELinuxOption) -> SelinuxOptions:
    options = SelinuxOptions(sent.user, sent.role, sent.type, sent.level)
    for given in options:
        if not _OF_A_LABEL.fullmatch(given):
            raise InvalidArgumentError(f"selinux_options: {quoted(given)} is no part of a SELinux label")
    return options


def _seccomp(security: cri.LinuxContainerSecurityContext | cri.LinuxSandboxSecurityContext, what: str) -> str:
    """The profile as Security has it, from the new field or, where that is not set, the deprecated one."""
    if security.privileged:
        return ""
    if security.HasField("seccomp"):
        kind = _known(f"{what}: seccomp.profile_type", security.seccomp.profile_type, _KINDS)
        if kind != "localhost":
            return "" if kind == "unconfined" else kind
        path = security.seccomp.localhost_ref
    else:
        given = security.seccomp_profile_path
        if given in ("", "unconfined"):
            return ""
        if given in ("runtime/default", "docker/default"):
            return "default"
        kind, _, path = given.partition("/")
        if kind != "localhost":
            raise InvalidArgumentError(f"{what}: seccomp_profile_path = {quoted(given)} is of no known form")
    if not path.startswith("/"):
        raise InvalidArgumentError(f"{what}: the seccomp profile {quoted(path)} must be an absolute path")
    return path


def _cdi_devices(sent: cri.ContainerConfig) -> tuple[str, ...]:
    """The CDI devices by name, from the field and from the annotations that kubelets used before it."""
    names = (*(device.name for device in sent.CDI_devices), *cdi.from_annotations(sent.annotations))
    for name in names:
        cdi.parse(name)
    return tuple(dict.fromkeys(names))


def _security(sent: cri.LinuxContainerSecurityContext, name: str) -> Security:
    what = f"container {name}"
    if sent.HasField("run_as_user") and sent.run_as_username:
        raise InvalidArgumentError(f"{what}: run_as_user and run_as_username are both set; give one")
    if sent.HasField("run_as_group") and not (sent.HasField("run_as_user") or sent.run_as_username):
        raise InvalidArgumentError(f"{what}: run_as_group is set without run_as_user or run_as_username")
    ids = [("run_as_user", sent.run_as_user.value), ("run_as_group", sent.run_as_group.value)]
    for field, number in (*ids, *(("supplemental_groups", g) for g in sent.supplemental_groups)):
        if not 0 <= number < 2**32 - 1:
            raise InvalidArgumentError(f"{what}: {field} = {number} is not a user or group ID")
    capabilities = sent.capabilities
    return Security(
        privileged=sent.privileged,
        run_as_user=sent.run_as_user.value if sent.HasField("run_as_user") else None,
        run_as_group=sent.run_as_group.value if sent.HasField("run_as_group") else None,
        run_as_username=sent.run_as_username,
        supplemental_groups=tuple(sent.supplemental_groups),
        supplemental_groups_strict=_known(
            f"{what}: supplemental_groups_policy", sent.supplemental_groups_policy, _STRICT
        ),
        readonly_rootfs=sent.readonly_rootfs,
        no_new_privs=sent.no_new_privs,
        add_capabilities=tuple(capabilities.add_capabilities),
        drop_capabilities=tuple(capabilities.drop_capabilities),
        ambient_capabilities=tuple(capabilities.add_ambient_capabilities),
        masked_paths=tuple(sent.masked_paths),
        readonly_paths=tuple(sent.readonly_paths),
        seccomp=_seccomp(sent, what),
        apparmor=_apparmor(sent, sent.apparmor_profile, what),
        selinux=_selinux(sent.selinux_options),
    )
