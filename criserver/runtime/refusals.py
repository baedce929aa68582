"""Refuses requests that no node, or not this node, can carry out: InvalidArgumentError before anything is made.

Only requests are checked. Stored records are not: ``parse.py`` must read whatever an earlier release accepted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from criserver.errors import InvalidArgumentError
from criserver.model import MAX_ID, NamespaceMode, PodConfig
from criserver.network.sysctls import sysctl_path
from criserver.oci import cdi
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import parse
from criserver.text import quoted

# A part of a SELinux label. Mount options contain the label, so it must have no other characters.
_LABEL_PART = re.compile(r"[A-Za-z0-9_.:,-]*")
# The characters that end a word or a line in the pod's files: resolv.conf(5), hosts(5).
_WORD_END = re.compile(r"[\s\x00-\x1f\x7f]")
# The annotations that ask for a class of resources (goresctrl, pkg/rdt and pkg/blockio): of containers, and of pods.
_CLASSES = {
    "RDT": ("io.kubernetes.cri.rdt-class", "rdt.resources.beta.kubernetes.io/"),
    "block I/O": ("io.kubernetes.cri.blockio-class", "blockio.resources.beta.kubernetes.io/"),
}


def check_pod(sent: cri.PodSandboxConfig) -> None:
    """Raises InvalidArgumentError for a request for a pod that no node could run."""
    meta = sent.metadata
    for field in ("name", "namespace", "uid"):
        if not getattr(meta, field):
            raise InvalidArgumentError(f"the pod sandbox's metadata.{field} is empty; it must be given")
    _check_no_windows(sent, f"pod {meta.namespace}/{meta.name}")
    _check_classes(sent.annotations, f"pod {meta.namespace}/{meta.name}")
    security = sent.linux.security_context
    _check_pod_namespaces(security.namespace_options)
    _check_words("hostname", [sent.hostname] if sent.hostname else [])
    if len(sent.hostname) > 64:
        raise InvalidArgumentError(
            f"hostname {quoted(sent.hostname)} has {len(sent.hostname)} characters; the kernel takes 64"
        )
    _check_words("dns_config.servers", sent.dns_config.servers)
    for field in ("searches", "options"):
        _check_words(f"dns_config.{field}", parse.words(getattr(sent.dns_config, field)))
    _check_absolute("log_directory", sent.log_directory)
    for port in sent.port_mappings:
        _check_port(port)
    if ".." in sent.linux.cgroup_parent.split("/"):
        raise InvalidArgumentError(f"cgroup_parent = {quoted(sent.linux.cgroup_parent)} must not contain '..'")
    for name in sent.linux.sysctls:
        _check_sysctl(name, security.namespace_options)
    # These fields have no effect yet: a sandbox has no process, or one that does nothing.
    _check_known("supplemental_groups_policy", security.supplemental_groups_policy, parse.STRICT)
    _check_seccomp(security, "pod sandbox")
    _check_apparmor(security, "", "pod sandbox")
    _check_selinux(security.selinux_options)


def check_container(sent: cri.ContainerConfig, pod: PodConfig, described: cri.PodSandboxConfig) -> None:
    """Raises InvalidArgumentError for a request for a container that no node could run in ``pod``.

    ``described`` is the pod as the request describes it. It may have become privileged since it was run: by `kubectl
    debug --profile=sysadmin` it gets a privileged container.
    """
    name = sent.metadata.name
    if not name:
        raise InvalidArgumentError("the container's metadata.name is empty; it must be given")
    what = f"container {name}"
    _check_no_windows(sent, what)
    _check_classes(sent.annotations, what)
    if not sent.image.image:
        raise InvalidArgumentError(f"{what}: image.image is empty; an image must be named")
    security = sent.linux.security_context
    if security.privileged and not (pod.privileged or described.linux.security_context.privileged):
        raise InvalidArgumentError(
            f"{what} is privileged, but its pod sandbox is not; set security_context.privileged of both"
        )
    for env in sent.envs:
        _check_env(env, what)
    for mount in sent.mounts:
        _check_mount(mount, what)
    for device in sent.devices:
        _check_device(device, what)
    for device_name in parse.cdi_devices(sent):
        cdi.parse_name(device_name)
    _check_log_path(sent.log_path, pod)
    check_resources(sent.linux.resources)
    _check_security(security, what)
    if security.HasField("namespace_options"):
        _check_container_namespaces(security, pod)
    _check_known("stop_signal", sent.stop_signal, parse.SIGNALS)


def check_resources(sent: cri.LinuxContainerResources) -> None:
    """Raises InvalidArgumentError for limits that this node cannot set."""
    if sent.unified and not os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        raise InvalidArgumentError("resources.unified is set, but this node has cgroup version 1")
    if not -1000 <= sent.oom_score_adj <= 1000:
        raise InvalidArgumentError(f"resources.oom_score_adj = {sent.oom_score_adj} is not between -1000 and 1000")


def _check_known(field: str, number: int, values: Collection[int]) -> None:
    """Raises InvalidArgumentError for a number that only a later version of CRI may have."""
    if number not in values:
        raise InvalidArgumentError(f"{field} = {number} is not known to this version of CRI")


def _check_words(field: str, words: Iterable[str]) -> None:
    """Check values that become words of a line in one of the pod's files."""
    for word in words:
        if not word or _WORD_END.search(word):
            raise InvalidArgumentError(
                f"{field}: {quoted(word)} must be a word, without white space or control characters"
            )


def _check_absolute(field: str, path: str) -> None:
    if path and not path.startswith("/"):
        raise InvalidArgumentError(f"{field} = {quoted(path)} must be an absolute path")


def _check_classes(annotations: Mapping[str, str], what: str) -> None:
    """Refuse a class, as the daemon cannot apply classes. An empty value asks for no class."""
    for name, value in annotations.items():
        for kind, (own, of_pod) in _CLASSES.items():
            if value and (name == own or name.startswith(of_pod)):
                raise InvalidArgumentError(
                    f"{what}: annotation {quoted(name)} asks for the {kind} class {quoted(value)}, and "
                    f"criserver has no {kind} classes; remove the annotation"
                )


def _check_no_windows(sent: cri.PodSandboxConfig | cri.ContainerConfig, what: str) -> None:
    if sent.HasField("windows"):
        raise InvalidArgumentError(f"{what}: the windows section is set, but this node runs Linux")


def _check_log_path(path: str, pod: PodConfig) -> None:
    if path and pod.log_directory and not parse.log_path(path, pod):
        raise InvalidArgumentError(
            f"log_path = {quoted(path)} leads out of the pod's log_directory {pod.log_directory}"
        )


def _check_pod_namespaces(options: cri.NamespaceOption) -> None:
    _check_namespaces(options)
    for kind in ("network", "ipc"):
        if getattr(options, kind) == cri.CONTAINER:
            raise InvalidArgumentError(f"namespace_options.{kind} = CONTAINER: containers of a pod share it")
    if options.pid == cri.TARGET:
        raise InvalidArgumentError("namespace_options.pid = TARGET: only a container can have it, not a pod sandbox")


def _check_container_namespaces(security: cri.LinuxContainerSecurityContext, pod: PodConfig) -> None:
    _check_namespaces(security.namespace_options)
    own = parse.container_namespaces(security, pod)
    if own.user != pod.namespaces.user:
        raise InvalidArgumentError("namespace_options.userns_options differ from the pod sandbox's; both must agree")
    if own.pid is NamespaceMode.POD and pod.namespaces.pid is not NamespaceMode.POD:
        raise InvalidArgumentError(
            "namespace_options.pid = POD, but the pod sandbox was made without a shared PID namespace "
            f"(its mode is {pod.namespaces.pid.name}); both must agree"
        )


def _check_namespaces(options: cri.NamespaceOption) -> None:
    for kind in ("network", "ipc"):
        if getattr(options, kind) == cri.TARGET:
            raise InvalidArgumentError(f"namespace_options.{kind} = TARGET: only the PID namespace can be a target's")
    if (options.pid == cri.TARGET) != bool(options.target_id):
        raise InvalidArgumentError("namespace_options: pid = TARGET and target_id must be set together")
    for kind in ("network", "pid", "ipc"):
        _check_known(f"namespace_options.{kind}", getattr(options, kind), parse.MODES)
    if options.HasField("userns_options"):
        _check_user_namespace(options.userns_options)


def _check_user_namespace(sent: cri.UserNamespace) -> None:
    what = "namespace_options.userns_options"
    _check_known(f"{what}.mode", sent.mode, parse.MODES)
    if sent.mode == cri.NODE:
        if sent.uids or sent.gids:
            raise InvalidArgumentError(f"{what}: mode = NODE allows no mappings; leave uids and gids empty")
        return
    if sent.mode != cri.POD:
        raise InvalidArgumentError(f"{what}: mode = {parse.MODES[sent.mode].name} is neither POD nor NODE")
    _check_only_mapping(f"{what}.uids", sent.uids)
    _check_only_mapping(f"{what}.gids", sent.gids)


def _check_only_mapping(what: str, sent: Sequence[cri.IDMapping]) -> None:
    if len(sent) != 1:
        raise InvalidArgumentError(f"{what} has {len(sent)} mappings; there must be one")
    _check_id_mapping(what, sent[0])
    if sent[0].container_id != 0:
        raise InvalidArgumentError(
            f"{what} maps IDs from {sent[0].container_id} on; the container's ID 0 must be mapped"
        )


def _check_id_mapping(what: str, sent: cri.IDMapping) -> None:
    if not sent.length or max(sent.host_id, sent.container_id) + sent.length > MAX_ID + 1:
        raise InvalidArgumentError(
            f"{what}: host_id = {sent.host_id}, container_id = {sent.container_id}, length = {sent.length} is not a "
            f"range of IDs from 0 to {MAX_ID}"
        )


def _check_sysctl(name: str, options: cri.NamespaceOption) -> None:
    user = options.userns_options.mode if options.HasField("userns_options") else cri.NODE
    own = {"net": options.network, "uts": options.network, "ipc": options.ipc, "user": user}
    sysctl_path(name, [kind for kind, mode in own.items() if mode != cri.NODE])


def _check_port(sent: cri.PortMapping) -> None:
    for field in ("container_port", "host_port"):
        if not 0 <= getattr(sent, field) <= 65535:
            raise InvalidArgumentError(f"port_mappings: {field} = {getattr(sent, field)} is not a port")
    _check_known("port_mappings: protocol", sent.protocol, parse.PROTOCOLS)


def _check_env(sent: cri.KeyValue, what: str) -> None:
    if not sent.key or "=" in sent.key or "\0" in sent.key or b"\0" in sent.value:
        raise InvalidArgumentError(f"{what}: environment variable {quoted(sent.key)} is not well formed")
    try:
        sent.value.decode()
    except UnicodeDecodeError as e:
        raise InvalidArgumentError(f"{what}: environment variable {sent.key} is not UTF-8") from e


def _check_mount(sent: cri.Mount, container: str) -> None:
    if not sent.container_path.startswith("/"):
        raise InvalidArgumentError(
            f"{container}: mount container_path = {quoted(sent.container_path)} must be an absolute path"
        )
    what = f"{container}: mount {sent.container_path}"
    if bool(sent.uidMappings) != bool(sent.gidMappings):
        raise InvalidArgumentError(f"{what}: uidMappings and gidMappings must be set together")
    if sent.recursive_read_only and not (sent.readonly and sent.propagation == cri.PROPAGATION_PRIVATE):
        raise InvalidArgumentError(f"{what}: recursive_read_only needs readonly, and PROPAGATION_PRIVATE")
    if sent.HasField("image"):
        if not sent.image.image:
            raise InvalidArgumentError(f"{what}: image.image is empty; an image must be named")
        if not sent.readonly:
            raise InvalidArgumentError(f"{what}: an image volume must be readonly")
        if sent.host_path:
            raise InvalidArgumentError(f"{what}: image and host_path = {quoted(sent.host_path)} are both set; give one")
    elif sent.image_sub_path:
        raise InvalidArgumentError(f"{what}: image_sub_path is set without an image")
    elif not sent.host_path:
        raise InvalidArgumentError(f"{what}: host_path is empty; it must be given")
    _check_absolute(f"{what}: host_path", sent.host_path)
    _check_known(f"{what}: propagation", sent.propagation, parse.PROPAGATIONS)
    if sent.image_sub_path.startswith("/") or ".." in sent.image_sub_path.split("/"):
        raise InvalidArgumentError(
            f"{what}: image_sub_path = {quoted(sent.image_sub_path)} must be a relative path without '..'"
        )
    for field in ("uidMappings", "gidMappings"):
        for mapping in getattr(sent, field):
            _check_id_mapping(f"{what}: {field}", mapping)


def _check_device(sent: cri.Device, what: str) -> None:
    if set(sent.permissions) - set("rwm"):
        raise InvalidArgumentError(
            f"{what}: device {sent.host_path}: permissions {quoted(sent.permissions)} must consist of r, w and m"
        )
    _check_absolute(f"{what}: device container_path", sent.container_path or sent.host_path)
    _check_absolute(f"{what}: device host_path", sent.host_path)


def _check_apparmor(
    security: cri.LinuxContainerSecurityContext | cri.LinuxSandboxSecurityContext, deprecated: str, what: str
) -> None:
    if security.privileged:
        return
    if security.HasField("apparmor"):
        _check_known(f"{what}: apparmor.profile_type", security.apparmor.profile_type, parse.PROFILES)
        if security.apparmor.profile_type != cri.SecurityProfile.Localhost:
            return
        name = security.apparmor.localhost_ref.removeprefix("localhost/")
    else:
        if deprecated in parse.DEPRECATED_APPARMOR:
            return
        kind, _, name = deprecated.partition("/")
        if kind != "localhost":
            raise InvalidArgumentError(
                f"{what}: apparmor_profile = {quoted(deprecated)} must be runtime/default, unconfined or localhost/NAME"
            )
    if not name:
        raise InvalidArgumentError(f"{what}: the AppArmor profile of type Localhost has no name")


def _check_seccomp(security: cri.LinuxContainerSecurityContext | cri.LinuxSandboxSecurityContext, what: str) -> None:
    if security.privileged:
        return
    if security.HasField("seccomp"):
        _check_known(f"{what}: seccomp.profile_type", security.seccomp.profile_type, parse.PROFILES)
        if security.seccomp.profile_type != cri.SecurityProfile.Localhost:
            return
        path = security.seccomp.localhost_ref
    else:
        deprecated = security.seccomp_profile_path
        if deprecated in parse.DEPRECATED_SECCOMP:
            return
        kind, _, path = deprecated.partition("/")
        if kind != "localhost":
            raise InvalidArgumentError(
                f"{what}: seccomp_profile_path = {quoted(deprecated)} must be runtime/default, unconfined or "
                "localhost/PATH"
            )
    if not path.startswith("/"):
        raise InvalidArgumentError(f"{what}: the seccomp profile {quoted(path)} must be an absolute path")


def _check_selinux(sent: cri.SELinuxOption) -> None:
    for part in (sent.user, sent.role, sent.type, sent.level):
        if not _LABEL_PART.fullmatch(part):
            raise InvalidArgumentError(f"selinux_options: {quoted(part)} cannot be a part of a SELinux label")


def _check_security(sent: cri.LinuxContainerSecurityContext, what: str) -> None:
    if sent.HasField("run_as_user") and sent.run_as_username:
        raise InvalidArgumentError(f"{what}: run_as_user and run_as_username are both set; give one")
    if sent.HasField("run_as_group") and not (sent.HasField("run_as_user") or sent.run_as_username):
        raise InvalidArgumentError(f"{what}: run_as_group is set without run_as_user or run_as_username")
    ids = [("run_as_user", sent.run_as_user.value), ("run_as_group", sent.run_as_group.value)]
    for field, number in (*ids, *(("supplemental_groups", g) for g in sent.supplemental_groups)):
        if not 0 <= number <= MAX_ID:
            raise InvalidArgumentError(f"{what}: {field} = {number} is not a user or group ID")
    _check_known(f"{what}: supplemental_groups_policy", sent.supplemental_groups_policy, parse.STRICT)
    _check_seccomp(sent, what)
    _check_apparmor(sent, sent.apparmor_profile, what)
    _check_selinux(sent.selinux_options)
