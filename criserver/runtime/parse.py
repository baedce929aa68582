"""Converts the kubelet's messages to the values of ``criserver.model``. It reads every field, and refuses nothing.

Any message gives a value, on any host. Stored records are read by this too, and a pod that runs must not be lost
because a later release, or another kernel, would refuse its message. ``refusals.py`` refuses bad requests before
anything is made. A bad value that is read from a record nevertheless gets the strictest meaning.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence

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

# The meaning of the numbers of CRI's enumerations. A later version of CRI may have more numbers.
MODES = {
    cri.POD: NamespaceMode.POD,
    cri.CONTAINER: NamespaceMode.CONTAINER,
    cri.NODE: NamespaceMode.NODE,
    cri.TARGET: NamespaceMode.TARGET,
}
PROTOCOLS = {cri.TCP: "tcp", cri.UDP: "udp", cri.SCTP: "sctp"}
PROPAGATIONS = {
    cri.PROPAGATION_PRIVATE: Propagation.PRIVATE,
    cri.PROPAGATION_HOST_TO_CONTAINER: Propagation.HOST_TO_CONTAINER,
    cri.PROPAGATION_BIDIRECTIONAL: Propagation.BIDIRECTIONAL,
}
PROFILES = {
    cri.SecurityProfile.RuntimeDefault: "default",
    cri.SecurityProfile.Unconfined: "unconfined",
    cri.SecurityProfile.Localhost: "localhost",
}
STRICT = {cri.Merge: False, cri.Strict: True}
SIGNALS = {number: "" if number == cri.RUNTIME_DEFAULT else name for name, number in cri.Signal.items()}
# Values of the deprecated fields apparmor_profile and seccomp_profile_path, besides localhost/NAME and localhost/PATH.
DEPRECATED_APPARMOR = frozenset({"", "unconfined", "runtime/default"})
DEPRECATED_SECCOMP = {"": "", "unconfined": "", "runtime/default": "default", "docker/default": "default"}


def pod_config(sent: cri.PodSandboxConfig) -> PodConfig:
    """The pod that a PodSandboxConfig describes."""
    meta, linux, security = sent.metadata, sent.linux, sent.linux.security_context
    return PodConfig(
        name=meta.name,
        namespace=meta.namespace,
        uid=meta.uid,
        attempt=meta.attempt,
        hostname=sent.hostname,
        log_directory=_normal(sent.log_directory),
        dns=Dns(
            tuple(sent.dns_config.servers),
            words(sent.dns_config.searches),
            words(sent.dns_config.options),
        ),
        port_mappings=tuple(_port_mapping(p) for p in sent.port_mappings),
        labels=dict(sent.labels),
        annotations=dict(sent.annotations),
        cgroup_parent=_cgroup_parent(linux.cgroup_parent),
        sysctls=dict(linux.sysctls),
        namespaces=namespaces(security.namespace_options),
        privileged=security.privileged,
        selinux=_selinux(security.selinux_options),
    )


def words(texts: Iterable[str]) -> tuple[str, ...]:
    """The words of a line of resolv.conf(5). A text may be empty or have several: Kubernetes does not check options."""
    return tuple(word for text in texts for word in text.replace("\t", " ").split(" ") if word)


def container_config(sent: cri.ContainerConfig, pod: PodConfig) -> ContainerConfig:
    """The container that a ContainerConfig describes, in ``pod``."""
    security = sent.linux.security_context
    return ContainerConfig(
        name=sent.metadata.name,
        attempt=sent.metadata.attempt,
        image=sent.image.image,
        command=tuple(sent.command),
        args=tuple(sent.args),
        working_dir=sent.working_dir,
        envs=tuple((e.key, e.value.decode(errors="replace")) for e in sent.envs),
        mounts=tuple(_mount(m) for m in sent.mounts),
        devices=tuple(_device(d) for d in sent.devices),
        cdi_devices=cdi_devices(sent),
        labels=dict(sent.labels),
        annotations=dict(sent.annotations),
        log_path=log_path(sent.log_path, pod),
        stdin=sent.stdin,
        stdin_once=sent.stdin_once,
        tty=sent.tty,
        resources=resources(sent.linux.resources),
        security=_security(security),
        namespaces=container_namespaces(security, pod),
        stop_signal=SIGNALS.get(sent.stop_signal, ""),
    )


def resources(sent: cri.LinuxContainerResources) -> Resources:
    """The limits of a LinuxContainerResources."""
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


def cdi_devices(sent: cri.ContainerConfig) -> tuple[str, ...]:
    """The names of the CDI devices, from the field and from the annotations that older kubelets use instead."""
    names = (*(device.name for device in sent.CDI_devices), *cdi.from_annotations(sent.annotations))
    return tuple(dict.fromkeys(names))


def _normal(path: str) -> str:
    return os.path.normpath(path) if path else ""


def log_path(path: str, pod: PodConfig) -> str:
    """The log's absolute path, below the pod's log directory; "" if there is no log, or if it would be elsewhere."""
    if not path or not pod.log_directory:
        return ""
    full = os.path.normpath(os.path.join(pod.log_directory, path))
    return full if full.startswith(pod.log_directory.rstrip("/") + "/") else ""


def _cgroup_parent(parent: str) -> str:
    if not parent or (parent.endswith(".slice") and ".." not in parent.split("/")):
        return parent
    return os.path.normpath("/" + parent.strip("/"))


def namespaces(options: cri.NamespaceOption) -> Namespaces:
    return Namespaces(
        MODES.get(options.network, NamespaceMode.POD),
        MODES.get(options.pid, NamespaceMode.CONTAINER),
        MODES.get(options.ipc, NamespaceMode.POD),
        options.target_id,
        _user_namespace(options.userns_options) if options.HasField("userns_options") else None,
    )


def _user_namespace(sent: cri.UserNamespace) -> UserNamespace | None:
    """The pod's user namespace; None for the host's, which only the mode NODE selects."""
    return None if sent.mode == cri.NODE else UserNamespace(_mapping(sent.uids), _mapping(sent.gids))


def _mapping(sent: Sequence[cri.IDMapping]) -> IdMapping:
    """The first mapping: CRI allows one only (UserNamespace). Without any it is a mapping of no IDs."""
    return _id_mapping(sent[0]) if sent else IdMapping(0, 0, 0)


def _id_mapping(sent: cri.IDMapping) -> IdMapping:
    return IdMapping(sent.container_id, sent.host_id, sent.length)


def container_namespaces(security: cri.LinuxContainerSecurityContext, pod: PodConfig) -> Namespaces:
    """The namespaces of a container. Network and IPC are always its pod's, as with containerd and CRI-O."""
    if not security.HasField("namespace_options"):
        return pod.namespaces
    own = namespaces(security.namespace_options)
    own = dataclasses.replace(own, network=pod.namespaces.network, ipc=pod.namespaces.ipc)
    if not security.namespace_options.HasField("userns_options"):
        own = dataclasses.replace(own, user=pod.namespaces.user)
    return own


def _port_mapping(sent: cri.PortMapping) -> PortMapping:
    protocol = PROTOCOLS.get(sent.protocol, str(sent.protocol))
    return PortMapping(protocol, sent.container_port, sent.host_port, sent.host_ip)


def _mount(sent: cri.Mount) -> Mount:
    return Mount(
        container_path=_normal(sent.container_path),
        host_path=_normal(sent.host_path),
        readonly=sent.readonly,
        propagation=PROPAGATIONS.get(sent.propagation, Propagation.PRIVATE),
        recursive_readonly=sent.recursive_read_only,
        image=sent.image.image,
        image_sub_path=sent.image_sub_path,
        uids=tuple(_id_mapping(m) for m in sent.uidMappings),
        gids=tuple(_id_mapping(m) for m in sent.gidMappings),
        selinux_relabel=sent.selinux_relabel,
    )


def _device(sent: cri.Device) -> Device:
    permissions = "".join(p for p in sent.permissions or "rwm" if p in "rwm")
    return Device(_normal(sent.container_path or sent.host_path), _normal(sent.host_path), permissions)


def _apparmor(security: cri.LinuxContainerSecurityContext) -> str:
    """The profile in the form of ``Security``, from the new field; from the deprecated field if that is not set."""
    if security.privileged:
        return "unconfined"
    if security.HasField("apparmor"):
        kind = PROFILES.get(security.apparmor.profile_type, "default")
        if kind == "unconfined":
            return kind
        # Kubelets write NAME. Other clients write localhost/NAME, as in the deprecated field.
        name = security.apparmor.localhost_ref.removeprefix("localhost/")
    elif (deprecated := security.apparmor_profile) in DEPRECATED_APPARMOR:
        return deprecated
    else:
        kind, _, name = deprecated.partition("/")
    return name if kind == "localhost" and name else "runtime/default"


def _selinux(sent: cri.SELinuxOption) -> SelinuxOptions:
    return SelinuxOptions(sent.user, sent.role, sent.type, sent.level)


def _seccomp(security: cri.LinuxContainerSecurityContext) -> str:
    """The profile in the form of ``Security``, from the new field; from the deprecated field if that is not set."""
    if security.privileged:
        return ""
    if security.HasField("seccomp"):
        kind, path = PROFILES.get(security.seccomp.profile_type, "default"), security.seccomp.localhost_ref
        if kind == "unconfined":
            return ""
    elif (deprecated := security.seccomp_profile_path) in DEPRECATED_SECCOMP:
        return DEPRECATED_SECCOMP[deprecated]
    else:
        kind, _, path = deprecated.partition("/")
    return path if kind == "localhost" and path.startswith("/") else "default"


def _security(sent: cri.LinuxContainerSecurityContext) -> Security:
    capabilities = sent.capabilities
    return Security(
        privileged=sent.privileged,
        run_as_user=sent.run_as_user.value if sent.HasField("run_as_user") else None,
        run_as_group=sent.run_as_group.value if sent.HasField("run_as_group") else None,
        run_as_username=sent.run_as_username,
        supplemental_groups=tuple(sent.supplemental_groups),
        supplemental_groups_strict=STRICT.get(sent.supplemental_groups_policy, True),
        readonly_rootfs=sent.readonly_rootfs,
        no_new_privs=sent.no_new_privs,
        add_capabilities=tuple(capabilities.add_capabilities),
        drop_capabilities=tuple(capabilities.drop_capabilities),
        ambient_capabilities=tuple(capabilities.add_ambient_capabilities),
        masked_paths=tuple(sent.masked_paths),
        readonly_paths=tuple(sent.readonly_paths),
        seccomp=_seccomp(sent),
        apparmor=_apparmor(sent),
        selinux=_selinux(sent.selinux_options),
    )
