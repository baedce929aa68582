"""Settings that give pods and containers something that this node does not have.

A daemon starts with such settings, and the pods that they are for fail one by one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from criserver.check.examined_node import ExaminedNode
from criserver.check.finding import Finding, missing, ok, warning
from criserver.config import Config, RuntimeHandler
from criserver.errors import CriError
from criserver.network.cni_config import CniConfigDirectory
from criserver.network.sysctls import sysctl_path
from criserver.oci import base_spec, hook_files

# Directories of /proc/sys that have the names of a pod's own network interfaces.
_OF_INTERFACES = ("conf", "neigh")
_OPEN_FILES = "RLIMIT_NOFILE"
_MOST_OPEN_FILES = "/proc/sys/fs/nr_open"


def check(host: ExaminedNode, config: Config) -> Iterator[Finding]:
    """The options of each handler, what all pods get, and the second socket for a kubelet."""
    found = [*_pod_defaults(host, config), *_hooks(host, config.pod_defaults.hooks_dir)]
    for runtime in config.runtimes.values():
        found += _handler(host, runtime, default=runtime.name == config.default_runtime)
    if config.containerd_address and (program := host.which("containerd")):
        found.append(
            warning(
                f"grpc.containerd_address is not served, as containerd is installed ({program}): the kubelet's "
                "/metrics/cadvisor has no names of pods",
                f"remove containerd, or give the kubelet the flag --containerd={config.grpc_address}",
            )
        )
    yield from found
    if not found:
        yield ok("this node has what the configuration gives to pods")


def _handler(host: ExaminedNode, runtime: RuntimeHandler, *, default: bool) -> Iterator[Finding]:
    # Only pods whose RuntimeClass names another handler need that handler.
    grave = missing if default else warning
    where = f"[runtimes.{runtime.name}]"
    if runtime.cgroup_writable and any(mount.kind == "cgroup" for mount in host.mounts()):
        yield grave(
            f"{where} cgroup_writable needs cgroup version 2, and this node has version 1: no container of the handler "
            "is created",
            "boot with systemd.unified_cgroup_hierarchy=1, or take the key out of the configuration",
        )
    if runtime.base_runtime_spec and host.privileged:
        try:
            base_spec.load(host.path(runtime.base_runtime_spec))
        except CriError as e:
            yield grave(f"{where} {e}: no container of the handler is created", "mend the file, or name another one")
    if runtime.cni_conf_dir:
        try:
            CniConfigDirectory(host.path(runtime.cni_conf_dir)).current()
        except CriError as e:
            yield grave(
                f"{where} cni_conf_dir: {e}: pods of the handler run only on the host's network",
                "install the network's file there, or take the key out of the configuration",
            )


def _pod_defaults(host: ExaminedNode, config: Config) -> Iterator[Finding]:
    given = config.pod_defaults
    for name in given.sysctls:
        try:
            path = sysctl_path(name, ["net", "ipc", "uts", "user"])
        except CriError as e:
            yield missing(f"runtime.default_sysctls: {e}: no pod starts", "take it out of the configuration")
            continue
        if not host.exists(f"/proc/sys/{path}") and not set(_OF_INTERFACES) & set(path.split("/")):
            yield missing(
                f"runtime.default_sysctls has {name}, and this kernel does not: pods that have its namespace for "
                "themselves do not start",
                "take it out of the configuration, or load the module of the kernel that has it",
            )
    for outside, inside in given.mounts:
        if not host.exists(outside):
            yield missing(
                f"runtime.default_mounts has {outside}, which does not exist: containers do not start, except those "
                f"that mount something else at {inside}",
                f"make {outside}, or take it out of the configuration",
            )
    most = host.read(_MOST_OPEN_FILES)
    hard = given.ulimits.get(_OPEN_FILES, (0, 0))[1]
    if most and most.isdecimal() and hard > int(most):
        yield missing(
            f"runtime.default_ulimits has more open files than fs.nr_open ({most}) allows: no container starts",
            f"give nofile a hard limit of at most {most}, or raise fs.nr_open",
        )


def _hooks(host: ExaminedNode, directories: tuple[str, ...]) -> Iterator[Finding]:
    if not directories or not host.privileged:
        return
    try:
        hooks = hook_files.load(map(host.path, directories))
    except CriError as e:
        yield missing(f"{e}: no container is created", "mend the file, or remove it")
        return
    for program in dict.fromkeys(str(found.hook["path"]) for found in hooks):
        if not os.access(host.path(program), os.X_OK):
            yield warning(
                f"a hook in runtime.hooks_dir runs {program}, which is not an executable: containers that get the hook "
                "do not start",
                "install the program, or remove the file of the hook",
            )
