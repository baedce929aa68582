"""The cgroup hierarchies, and whether the configured driver fits them."""

from __future__ import annotations

import os
from collections.abc import Iterator

from criserver.check.examined_node import ExaminedNode
from criserver.check.finding import Finding, missing, ok, warning
from criserver.config import Config
from snapshotter.mounts import MountEntry

_NEEDED = ("cpu", "memory", "pids")
_NEEDED_V1 = (*_NEEDED, "devices", "freezer")
_WANTED = {
    "cpuset": "containers cannot be bound to CPUs, and the kubelet's CPU manager does not work",
    "io": "disk traffic of pods is not counted",
    "hugetlb": "huge pages of pods are not limited",
}


def check(host: ExaminedNode, config: Config) -> Iterator[Finding]:
    """Layout, controllers, driver."""
    mounts = host.mounts()
    unified = [m for m in mounts if m.kind == "cgroup2"]
    legacy = [m for m in mounts if m.kind == "cgroup"]
    if legacy:
        yield from _version_1(legacy, hybrid=bool(unified))
    elif unified:
        yield from _version_2(host, unified[0])
    else:
        yield missing(
            "no cgroup hierarchy is mounted", "mount -t cgroup2 cgroup2 /sys/fs/cgroup, or let systemd do so at boot"
        )
    yield from _driver(host, config, legacy=bool(legacy))


def _version_1(mounts: list[MountEntry], *, hybrid: bool) -> Iterator[Finding]:
    there = {option for mount in mounts for option in mount.file_system_options}
    if lacking := [name for name in _NEEDED_V1 if name not in there]:
        yield missing(
            f"cgroup version 1 without the controllers {', '.join(lacking)}",
            "boot with systemd.unified_cgroup_hierarchy=1 for version 2, or mount these controllers",
        )
        return
    yield ok(f"cgroup version 1{' beside an empty version 2 (hybrid)' if hybrid else ''}")
    yield from _wanted(there | ({"io"} if "blkio" in there else set()))
    yield warning(
        "cgroup version 1: newer kubelets do not start here unless their failCgroupV1 is false",
        "boot with systemd.unified_cgroup_hierarchy=1",
    )


def _version_2(host: ExaminedNode, mount: MountEntry) -> Iterator[Finding]:
    there = set((host.read(os.path.join(mount.point, "cgroup.controllers")) or "").split())
    if lacking := [name for name in _NEEDED if name not in there]:
        yield missing(
            f"cgroup version 2 without the controllers {', '.join(lacking)} at {mount.point}",
            "remove cgroup_disable= for these from the kernel's command line; in a container or service, let systemd "
            "delegate them (Delegate=yes)",
        )
        return
    if "ro" in (*mount.options, *mount.file_system_options):
        yield missing(
            f"cgroup version 2 is mounted read-only at {mount.point}",
            f"mount -o remount,rw {mount.point}; a container needs a cgroup namespace of its own and to be privileged",
        )
        return
    yield ok(f"cgroup version 2 with {' '.join(sorted(there))}")
    yield from _wanted(there)


def _wanted(there: set[str]) -> Iterator[Finding]:
    for name, meaning in _WANTED.items():
        if name not in there:
            yield warning(f"no cgroup controller {name}: {meaning}", f"use a kernel that has the controller {name}")


def _driver(host: ExaminedNode, config: Config, *, legacy: bool) -> Iterator[Finding]:
    # sd_booted(3).
    systemd = host.exists("/run/systemd/system")
    if config.cgroup_driver == "systemd" and not systemd:
        yield missing(
            'the cgroup driver is "systemd", but systemd does not run here',
            'set cgroup_driver = "cgroupfs" below [runtime], and the same for the kubelet',
        )
    elif config.cgroup_driver == "cgroupfs" and systemd and not legacy:
        yield warning(
            'the cgroup driver is "cgroupfs", but systemd runs here: both would manage the same hierarchy, and kubeadm '
            "gives the kubelet the driver systemd",
            'set cgroup_driver = "systemd" below [runtime], and the same for the kubelet',
        )
    else:
        yield ok(f"the cgroup driver {config.cgroup_driver}")
