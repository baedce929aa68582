"""The OCI runtime spec of a container, as a pure function of its configuration, its image and facts of the host.

Runtime specification 1.0.2 (config.md, config-linux.md), with what Kubernetes adds to it by CRI.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from criserver.errors import InvalidArgumentError
from criserver.model import ContainerConfig, Propagation, User
from criserver.oci import base_spec
from criserver.oci.capabilities import capability_sets
from criserver.oci.spec_inputs import DeviceNode, HostFacts, ImageDefaults, PodFacts, Spec, SpecDefaults
from criserver.oci.spec_mounts import container_mounts, renamed_devices
from criserver.oci.spec_namespaces import container_namespaces
from criserver.oci.spec_resources import device_rules, in_force, oci_device, resource_limits

_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def build(
    *,
    config: ContainerConfig,
    image: ImageDefaults,
    user: User,
    pod: PodFacts,
    host: HostFacts,
    cgroups_path: str,
    rootfs: str,
    devices: Iterable[DeviceNode] = (),
    host_devices: bool = True,
    seccomp: Spec | None = None,
    apparmor_profile: str = "",
    selinux_label: str = "",
    mount_label: str = "",
    annotations: Mapping[str, str] | None = None,
    defaults: SpecDefaults | None = None,
    real_paths: Mapping[str, str] = MappingProxyType({}),
) -> Spec:
    """The whole spec.

    ``devices`` are the host's nodes for ``config.devices``, in their order. A privileged container may use all devices
    with ``host_devices``, and all other nodes of the host come before them. ``seccomp`` is the filter
    (config-linux.md, "Seccomp") or None. ``defaults`` are what the node gives to every container. ``real_paths`` are as
    for :func:`container_mounts`.

    Raises InvalidArgumentError for a container without a command, and for an unknown capability.
    """
    security, resources = config.security, config.resources
    nodes, defaults = list(devices), defaults or SpecDefaults()
    renamed = renamed_devices(config)
    base: Mapping[str, Any] = defaults.base
    base_process = base.get("process", {})
    spec: Spec = {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": config.tty,
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
            "args": process_args(config, image),
            "env": environment(config, image, pod.hostname, (*defaults.env, *base_process.get("env", ()))),
            "cwd": config.working_dir or image.working_dir or "/",
            "capabilities": capability_sets(config, host),
            "noNewPrivileges": security.no_new_privs,
            "oomScoreAdj": in_force(resources, host).oom_score_adj,
        },
        "root": {"path": rootfs, "readonly": security.readonly_rootfs},
        "mounts": container_mounts(
            config,
            pod,
            base.get("mounts", ()),
            defaults.mounts,
            cgroup_writable=defaults.cgroup_writable,
            real_paths=real_paths,
        ),
        "annotations": dict(annotations or {}),
        "linux": {
            "cgroupsPath": cgroups_path,
            "namespaces": container_namespaces(config, pod, host),
            "resources": {**resource_limits(resources, host), "devices": device_rules(config, nodes, host_devices)},
            "devices": [oci_device(n) for n in nodes if n.path not in renamed],
            "maskedPaths": [] if security.privileged else list(security.masked_paths),
            "readonlyPaths": [] if security.privileged else list(security.readonly_paths),
        },
    }
    if limits := _rlimits(host, defaults, base_process.get("rlimits", ())):
        spec["process"]["rlimits"] = limits
    if apparmor_profile:
        spec["process"]["apparmorProfile"] = apparmor_profile
    if selinux_label:  # SELinux labels: of the process, and of the file systems that the runtime mounts
        spec["process"]["selinuxLabel"] = selinux_label
        spec["linux"]["mountLabel"] = mount_label
    if seccomp is not None:
        spec["linux"]["seccomp"] = seccomp
    if any(m.propagation is Propagation.BIDIRECTIONAL for m in config.mounts):
        spec["linux"]["rootfsPropagation"] = "rshared"
    elif any(m.propagation is Propagation.HOST_TO_CONTAINER for m in config.mounts):
        spec["linux"]["rootfsPropagation"] = "rslave"
    return base_spec.under(base, spec)


def _rlimits(host: HostFacts, defaults: SpecDefaults, base: Iterable[Mapping[str, Any]]) -> list[Spec]:
    """The limits of the process, one of each type: the base's, else the node's defaults, else the daemon's own."""
    limits = {"RLIMIT_NOFILE": host.open_files} if host.open_files is not None else {}
    limits |= defaults.rlimits
    limits |= {limit["type"]: (limit["soft"], limit["hard"]) for limit in base}
    return [{"type": kind, "soft": soft, "hard": hard} for kind, (soft, hard) in limits.items()]


def exec_process(spec: Spec, command: Iterable[str], *, tty: bool) -> Spec:
    """The process of an exec: as the container's own process, with another command line."""
    process: Spec = {**spec["process"], "args": list(command), "terminal": tty}
    if tty and not any(e.startswith("TERM=") for e in process["env"]):
        process["env"] = [*process["env"], "TERM=xterm"]
    return process


def process_args(config: ContainerConfig, image: ImageDefaults) -> list[str]:
    """The command line. The kubelet's command replaces the image's entrypoint and cmd, its args replace the cmd.

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


def environment(
    config: ContainerConfig, image: ImageDefaults, hostname: str, defaults: Iterable[str] = ()
) -> list[str]:
    """The environment as NAME=VALUE lines. The image overrides the defaults, and the kubelet overrides the image.

    ``defaults`` are lines of the node. They override this runtime's own defaults.

    An image's line without "=" takes the default away, as in containerd. A line without a name has no effect: the OCI
    runtime would refuse it.
    """
    variables: dict[str, str] = {}
    base = [_PATH, *(["TERM=xterm"] if config.tty else []), *([f"HOSTNAME={hostname}"] if hostname else [])]
    for line in (*base, *defaults, *image.env):
        name, equals, value = line.partition("=")
        if equals and name:
            variables[name] = value
        else:
            variables.pop(name, None)
    variables.update(config.envs)
    return [f"{name}={value}" for name, value in variables.items()]
