"""The resources of a spec: limits of cgroups, and devices."""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Mapping
from typing import Any

from criserver.model import ContainerConfig, Resources
from criserver.oci.spec_inputs import DeviceNode, HostFacts, Spec

_CPU_PERIOD = 100_000  # microseconds: the kernel's default


def in_force(resources: Resources, host: HostFacts) -> Resources:
    """The limits that this node enforces where ``resources`` are requested.

    1. Limits of page sizes that cgroups cannot limit are left out.
    2. Without accounting of swap there is no limit of swap. With it, a container without a limit of its own has its
       memory limit, because it could use swap beyond that.
    3. A CPU quota has its period also if that is the kernel's default: under systemd, crun ignores a quota without one.
    4. The OOM score is not lower than the daemon may set it.
    """
    swap = resources.memory_swap_limit or resources.memory_limit
    return dataclasses.replace(
        resources,
        cpu_period=resources.cpu_period or (_CPU_PERIOD if resources.cpu_quota else 0),
        memory_swap_limit=swap if host.swap_accounting else 0,
        oom_score_adj=max(resources.oom_score_adj, host.oom_score_adj_floor),
        hugepage_limits=tuple(limit for limit in resources.hugepage_limits if limit[0] in host.hugepage_sizes),
    )


def unenforced(resources: Resources, host: HostFacts) -> dict[str, str]:
    """The limits that are requested and have no effect on this node, by the names of their fields in CRI.

    The kubelet sends a limit of 0 for each page size of the node; it is not among them.
    """
    pages = ", ".join(
        f"{n} = {limit}" for n, limit in resources.hugepage_limits if limit and n not in host.hugepage_sizes
    )
    swap = str(resources.memory_swap_limit) if resources.memory_swap_limit and not host.swap_accounting else ""
    return {name: text for name, text in (("hugepage_limits", pages), ("memory_swap_limit_in_bytes", swap)) if text}


def resource_limits(resources: Resources, host: HostFacts) -> Spec:
    """The ``resources`` of a spec (config-linux.md), without devices and without unset values."""
    enforced = in_force(resources, host)
    cpu = {
        "period": enforced.cpu_period,
        "quota": enforced.cpu_quota,
        "shares": enforced.cpu_shares,
        "cpus": enforced.cpuset_cpus,
        "mems": enforced.cpuset_mems,
    }
    memory = {"limit": enforced.memory_limit, "swap": enforced.memory_swap_limit}
    limits: Spec = {"cpu": _without_unset(cpu), "memory": _without_unset(memory), "unified": dict(enforced.unified)}
    limits["hugepageLimits"] = [{"pageSize": size, "limit": limit} for size, limit in enforced.hugepage_limits]
    return _without_unset(_with_swap_limit(limits, host))


def complete_limits(asked: Spec, limits: Spec, host: HostFacts) -> Spec:
    """The limits that ``asked`` sets, with those that it needs in addition to ``limits``, which are in force.

    A quota of CPU time needs its period, and a limit of memory one for swap.
    """
    if asked.get("cpu", {}).get("quota") and not asked["cpu"].get("period"):
        period = limits.get("cpu", {}).get("period", _CPU_PERIOD)
        asked = {**asked, "cpu": {**asked["cpu"], "period": period}}
    asks_swap = bool(asked.get("memory", {}).get("swap"))
    if asks_swap or "memory.swap.max" not in limits.get("unified", {}):
        asked = _with_swap_limit(asked, host, limits.get("memory", {}).get("limit", 0))
    return asked


def merge_limits(limits: Spec, asked: Spec, host: HostFacts) -> Spec:
    """The ``resources`` of a spec with what ``asked`` sets. The rules of devices are those of both.

    A limit of huge pages replaces the one of its page size, a key of ``unified`` its value.
    """
    asked = complete_limits(asked, limits, host)
    merged = {**limits, **asked}
    for table in ("cpu", "memory", "unified"):
        if table in asked:
            merged[table] = {**limits.get(table, {}), **asked[table]}
    if "hugepageLimits" in asked:
        sizes = {one["pageSize"] for one in asked["hugepageLimits"]}
        kept = [one for one in limits.get("hugepageLimits", ()) if one["pageSize"] not in sizes]
        merged["hugepageLimits"] = [*kept, *asked["hugepageLimits"]]
    if "devices" in asked:
        merged["devices"] = [*limits.get("devices", ()), *asked["devices"]]
    return merged


def _with_swap_limit(limits: Spec, host: HostFacts, limit_in_force: int = 0) -> Spec:
    """The limits with one for swap, which a limit of memory needs: the container could use swap beyond it otherwise."""
    memory, unified = dict(limits.get("memory", {})), dict(limits.get("unified", {}))
    limit = memory.get("limit", 0)
    if host.swap_accounting and limit and not memory.get("swap"):
        memory["swap"] = limit
    limit = limit or limit_in_force
    if host.unified_cgroups and host.swap_accounting and limit > 0 and memory.get("swap"):
        # cgroup v2 has a limit for swap alone. crun would pass the sum of both to systemd.
        swap = memory.pop("swap")
        unified.setdefault("memory.swap.max", "max" if swap < 0 else str(max(swap - limit, 0)))
    return _without_unset({**limits, "memory": memory, "unified": unified})


def _without_unset(table: Mapping[str, Any]) -> Spec:
    return {key: value for key, value in table.items() if value}


def device_rules(config: ContainerConfig, nodes: list[DeviceNode], host_devices: bool) -> list[Spec]:
    """The rules of the device cgroup: only the requested devices. runc adds those of every container."""
    if config.security.privileged and host_devices:
        return [{"allow": True, "access": "rwm"}]
    rules: list[Spec] = [{"allow": False, "access": "rwm"}]
    for device, node in zip(config.devices, nodes, strict=True):
        rules.append(
            {
                "allow": True,
                "type": node.kind,
                "major": node.major,
                "minor": node.minor,
                "access": device.permissions,
            }
        )
    return rules


def oci_device(node: DeviceNode) -> Spec:
    """The OCI device of a node."""
    return {
        "path": node.path,
        "type": node.kind,
        "major": node.major,
        "minor": node.minor,
        "fileMode": stat.S_IMODE(node.mode),
        "uid": node.uid,
        "gid": node.gid,
    }
