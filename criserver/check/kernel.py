"""The features of the kernel that containers need."""

from __future__ import annotations

from collections.abc import Iterator

from criserver.check.examined_node import ExaminedNode
from criserver.check.finding import Finding, missing, ok, warning
from criserver.config import Config

_NAMESPACES = ("mnt", "pid", "net", "ipc", "uts")


def check(host: ExaminedNode, _: Config) -> Iterator[Finding]:
    """System calls, namespaces, seccomp, security modules."""
    release = host.read("/proc/sys/kernel/osrelease") or "unknown"
    if calls := host.calls():
        yield missing(
            f"Linux {release} lacks {', '.join(calls)}",
            "run Linux 5.10 or newer, and remove the seccomp filter of this process if it has one",
        )
    else:
        yield ok(f"Linux {release} has the system calls")
    if lacking := [name for name in _NAMESPACES if not host.exists(f"/proc/self/ns/{name}")]:
        yield missing(
            f"the kernel has no {', '.join(lacking)} namespaces", "use a kernel that was configured for containers"
        )
    else:
        yield ok("namespaces of processes, networks, mounts, IPC and host names")
    yield _users(host)
    if host.exists("/proc/sys/kernel/seccomp/actions_avail"):
        yield ok("seccomp filters")
    else:
        yield warning(
            "no seccomp: pods with the profile RuntimeDefault or Localhost cannot start",
            "use a kernel with CONFIG_SECCOMP_FILTER",
        )
    if host.read("/sys/module/apparmor/parameters/enabled") == "Y":
        if host.which("apparmor_parser") is None:
            yield warning(
                "AppArmor is enabled, but apparmor_parser is not there: no profile can be loaded for containers",
                "apt-get install apparmor",
            )
        else:
            yield ok("AppArmor is enabled; selinux_options of pods have no effect")
    elif host.exists("/sys/fs/selinux/enforce"):
        if host.labelled():
            yield ok("SELinux has a policy, with types for containers")
        else:
            yield warning(
                "SELinux's policy has no types for containers (container_t, container_file_t, spc_t): it does not "
                "separate pods from each other",
                "install the policy for containers (package container-selinux)",
            )
    else:
        yield ok("neither AppArmor nor SELinux is enabled; options of pods for SELinux have no effect")


def _users(host: ExaminedNode) -> Finding:
    if not host.exists("/proc/self/ns/user"):
        return warning(
            "the kernel has no user namespaces: pods with hostUsers: false cannot start",
            "use a kernel with CONFIG_USER_NS",
        )
    if host.read("/proc/sys/user/max_user_namespaces") == "0":
        return warning(
            "user.max_user_namespaces is 0: pods with hostUsers: false cannot start",
            "sysctl -w user.max_user_namespaces=15000, and the same in a file below /etc/sysctl.d",
        )
    return ok("user namespaces")
