"""Statistics and metrics of sandboxes and containers as CRI messages.

Values come from stats/, names from the records. The lists are made in slices of time, so the list of a full node does
not delay other calls.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from functools import partial
from typing import Any

from criserver.api.lists import Slices, make_each, make_in_slices
from criserver.api.views import image_name
from criserver.model import NamespaceMode
from criserver.oci.spec_resources import in_force
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups, host
from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.node import Node
from criserver.runtime.pod_namespaces import network_pin
from criserver.runtime.records import Container, Sandbox
from criserver.stats import (
    LABELS,
    METRICS,
    CgroupUsage,
    ContainerLimits,
    Cpu,
    Descriptors,
    FileSystem,
    InterfaceCounters,
    Measurements,
    Memory,
    Metric,
    Pressure,
    Stall,
    Swap,
    count_descriptors,
    device_name,
    samples,
)

# The name of the pod network's interface, which the CNI plugins get.
_DEFAULT_INTERFACE = "eth0"
# Seconds to count the descriptors of all containers. Containers after that have no count in the answer.
_COUNT_TIME = 2.0

# The fields of a message by name. A message that is made of them at once takes half the time of one made of messages.
Fields = dict[str, Any]

_KINDS = {True: cri.COUNTER, False: cri.GAUGE}


class StatsViews:
    """Answers of a node's statistics RPCs. ``directory`` has the writable layers, and is the one of ImageFsInfo."""

    def __init__(self, node: Node, directory: str) -> None:
        self._node = node
        self._directory = directory

    def container(self, record: Container) -> cri.ContainerStats:
        """Statistics of a container. One that does not run has the attributes and the writable layer alone."""
        config, measured = record.config, {}
        sandbox = self._node.records.sandboxes.get(record.sandbox_id)
        if record.state is ContainerState.RUNNING and sandbox is not None:
            usage = self._node.stats.cgroups.reader(cgroups.path(record.parent_cgroup(sandbox), record.id)).usage()
            measured = _measured(usage)
            if usage.swap is not None:
                measured["swap"] = _swap(usage.timestamp, usage.swap)
        return cri.ContainerStats(
            attributes={
                "id": record.id,
                "metadata": {"name": config.name, "attempt": config.attempt},
                "labels": config.labels,
                "annotations": config.annotations,
            },
            writable_layer=self._writable_layer(record),
            **measured,
        )

    async def containers(self, records: Iterable[Container]) -> AsyncIterator[cri.ContainerStats]:
        """Statistics of each container."""
        self._retain()
        async for stats in make_in_slices(records, self.container):
            yield stats

    async def sandbox(self, record: Sandbox) -> cri.PodSandboxStats:
        """Statistics of a sandbox and its containers. A stopped one has the attributes and writable layers alone."""
        networks = await self._networks([record])
        return self._sandbox(record, self._members().get(record.id, []), networks.get(self._network_namespace(record)))

    async def sandboxes(self, records: Iterable[Sandbox]) -> AsyncIterator[cri.PodSandboxStats]:
        """Statistics of each sandbox and its containers."""
        self._retain()
        sandboxes = list(records)
        networks = await self._networks(sandboxes)
        members = self._members()

        def make(record: Sandbox) -> cri.PodSandboxStats:
            return self._sandbox(record, members.get(record.id, []), networks.get(self._network_namespace(record)))

        async for stats in make_in_slices(sandboxes, make):
            yield stats

    async def metrics(self) -> AsyncIterator[cri.PodSandboxMetrics]:
        """Metrics of each sandbox that is ready, and of its running containers."""
        self._retain()
        ready = [s for s in self._node.records.sandboxes.values() if s.state is SandboxState.READY]
        networks = await self._networks(ready)
        members = self._members()
        pods = [(pod, [c for c in members.get(pod.id, []) if c.state is ContainerState.RUNNING]) for pod in ready]
        pids: dict[str, list[int]] = {}
        slices = Slices()
        for pod, containers in pods:
            pids |= self._processes(pod, containers)
            await slices.end()
        counts = await asyncio.to_thread(count_descriptors, pids.values(), _COUNT_TIME)
        descriptors = dict(zip(pids, counts, strict=True))
        file_system = await asyncio.to_thread(_file_system, self._directory)

        def make_pod(pod: Sandbox) -> cri.PodSandboxMetrics:
            interfaces = networks.get(self._network_namespace(pod), ())
            own = (pod.id, *(c.id for c in members.get(pod.id, []) if c.id in pids))
            measured = self._measure_pod(pod, sum(len(pids[key]) for key in own), interfaces)
            return cri.PodSandboxMetrics(pod_sandbox_id=pod.id, metrics=_metrics(measured, _pod_labels(pod)))

        def make_container(pod: Sandbox, container: Container) -> cri.ContainerMetrics:
            key = container.id
            measured = self._measure_container(pod, container, len(pids[key]), descriptors[key], file_system)
            return cri.ContainerMetrics(container_id=key, metrics=_metrics(measured, _container_labels(pod, container)))

        for pod, containers in pods:
            for response in make_each((pod,), make_pod):
                for container_metrics in make_each(containers, partial(make_container, pod)):
                    response.container_metrics.append(container_metrics)
                    await slices.end()
                yield response

    def _writable_layer(self, record: Container) -> Fields | None:
        usage = self._node.stats.disk.latest(record.id)
        if usage is None:
            return None
        return {
            "timestamp": usage.timestamp,
            "fs_id": {"mountpoint": self._directory},
            "used_bytes": _number(usage.bytes),
            "inodes_used": _number(usage.inodes),
        }

    def _sandbox(
        self, record: Sandbox, containers: list[Container], interfaces: tuple[InterfaceCounters, ...] | None
    ) -> cri.PodSandboxStats:
        config = record.config
        linux: Fields = {"containers": [self.container(c) for c in containers]}
        if record.state is SandboxState.READY:
            usage = self._node.stats.cgroups.reader(cgroups.pod_path(record.cgroup_parent)).usage()
            count = sum(len(pids) for pids in self._processes(record, containers).values())
            linux |= _measured(usage)
            linux["process"] = {"timestamp": usage.timestamp, "process_count": _number(count)}
            if interfaces:
                linux["network"] = _network(interfaces)
        return cri.PodSandboxStats(
            attributes={
                "id": record.id,
                "metadata": {
                    "name": config.name,
                    "uid": config.uid,
                    "namespace": config.namespace,
                    "attempt": config.attempt,
                },
                "labels": config.labels,
                "annotations": config.annotations,
            },
            linux=linux,
        )

    def _processes(self, pod: Sandbox, containers: Iterable[Container]) -> dict[str, list[int]]:
        """The PIDs of each container by its ID, and of the infra process by the pod's ID.

        Not the PIDs of the pod's cgroup, because several pods may have the same one.
        """
        paths = {pod.id: cgroups.path(pod.cgroup_parent, pod.id)}
        paths |= {c.id: cgroups.path(c.parent_cgroup(pod), c.id) for c in containers}
        return {key: self._node.stats.cgroups.reader(path).processes() for key, path in paths.items()}

    def _measure_pod(self, pod: Sandbox, processes: int, interfaces: tuple[InterfaceCounters, ...]) -> Measurements:
        reader = self._node.stats.cgroups.reader(cgroups.pod_path(pod.cgroup_parent))
        return Measurements(
            usage=reader.usage(),
            details=reader.details(),
            processes=processes,
            interfaces=interfaces,
            started_at=pod.created_at,
        )

    def _measure_container(
        self,
        pod: Sandbox,
        container: Container,
        processes: int,
        descriptors: Descriptors | None,
        file_system: FileSystem,
    ) -> Measurements:
        stats, resources = self._node.stats, in_force(container.config.resources, host.facts())
        reader = stats.cgroups.reader(cgroups.path(container.parent_cgroup(pod), container.id))
        return Measurements(
            usage=reader.usage(),
            details=reader.details(),
            processes=processes,
            descriptors=descriptors,
            disk=stats.disk.latest(container.id),
            file_system=file_system,
            limits=ContainerLimits(
                cpu_period=resources.cpu_period,
                cpu_quota=resources.cpu_quota,
                cpu_shares=resources.cpu_shares,
                memory=resources.memory_limit,
                swap=resources.memory_swap_limit,
            ),
            started_at=container.started_at,
        )

    async def _networks(self, sandboxes: Iterable[Sandbox]) -> Mapping[str, tuple[InterfaceCounters, ...]]:
        """The interfaces by namespace, for the sandboxes that are ready and have a network namespace."""
        paths = [self._network_namespace(s) for s in sandboxes if s.state is SandboxState.READY]
        return await self._node.stats.networks.read(path for path in paths if path)

    def _network_namespace(self, sandbox: Sandbox) -> str:
        """The path at which the sandbox's network namespace is pinned; "" for the node's namespace."""
        if sandbox.config.namespaces.network is NamespaceMode.NODE:
            return ""
        return network_pin(self._node, sandbox.id)

    def _members(self) -> dict[str, list[Container]]:
        """The visible containers by sandbox."""
        members: dict[str, list[Container]] = {}
        for container in self._node.records.visible_containers():
            members.setdefault(container.sandbox_id, []).append(container)
        return members

    def _retain(self) -> None:
        """Close the descriptors of containers and sandboxes that do not run any more."""
        records, stats = self._node.records, self._node.stats
        ready = [s for s in records.sandboxes.values() if s.state is SandboxState.READY]
        running = (c for c in records.containers.values() if c.state is ContainerState.RUNNING)
        stats.cgroups.retain(
            {cgroups.pod_path(s.cgroup_parent) for s in ready}
            | {cgroups.path(c.parent_cgroup(records.sandboxes[c.sandbox_id]), c.id) for c in running}
        )
        stats.networks.retain({self._network_namespace(s) for s in ready})


def descriptors() -> list[cri.MetricDescriptor]:
    """All metrics with their labels."""
    return [cri.MetricDescriptor(name=m.name, help=m.help, label_keys=[*LABELS, *m.labels]) for m in METRICS]


def _metrics(measured: Measurements, labels: tuple[str, ...]) -> list[cri.Metric]:
    return [
        _metric(metric, measured.usage.timestamp, value, (*labels, *own)) for metric, value, own in samples(measured)
    ]


def _metric(metric: Metric, timestamp: int, value: int, labels: tuple[str, ...]) -> cri.Metric:
    return cri.Metric(
        name=metric.name,
        timestamp=timestamp,
        metric_type=_KINDS[metric.counter],
        label_values=labels,
        value=_number(value),
    )


def _pod_labels(pod: Sandbox) -> tuple[str, ...]:
    """The values of LABELS for metrics of the pod."""
    return pod.config.name, pod.config.namespace, "", cgroups.pod_path(pod.cgroup_parent), "", ""


def _container_labels(pod: Sandbox, container: Container) -> tuple[str, ...]:
    path = cgroups.path(container.parent_cgroup(pod), container.id)
    image = image_name(cri.ContainerConfig.FromString(container.sent).image)
    return pod.config.name, pod.config.namespace, container.config.name, path, image, container.id


def _file_system(directory: str) -> FileSystem:
    file_system, device = os.statvfs(directory), os.stat(directory).st_dev
    return FileSystem(
        device=device_name(os.major(device), os.minor(device)),
        size=file_system.f_blocks * file_system.f_frsize,
        inodes=file_system.f_files,
        inodes_free=file_system.f_ffree,
    )


def _measured(usage: CgroupUsage) -> Fields:
    """The fields that containers and pods have in common."""
    fields: Fields = {}
    if usage.cpu is not None:
        fields["cpu"] = _cpu(usage, usage.cpu)
    if usage.memory is not None:
        fields["memory"] = _memory(usage, usage.memory)
    if usage.io_pressure is not None:
        fields["io"] = {"timestamp": usage.timestamp, "psi": _psi(usage.io_pressure)}
    return fields


def _cpu(usage: CgroupUsage, cpu: Cpu) -> Fields:
    return {
        "timestamp": usage.timestamp,
        "usage_core_nano_seconds": _number(cpu.total_ns),
        "usage_nano_cores": _number(cpu.rate),
        "psi": _psi(usage.cpu_pressure),
    }


def _memory(usage: CgroupUsage, memory: Memory) -> Fields:
    return {
        "timestamp": usage.timestamp,
        "working_set_bytes": _number(memory.working_set),
        "available_bytes": _number(memory.available),
        "usage_bytes": _number(memory.usage),
        "rss_bytes": _number(memory.rss),
        "page_faults": _number(memory.page_faults),
        "major_page_faults": _number(memory.major_page_faults),
        "psi": _psi(usage.memory_pressure),
    }


def _swap(timestamp: int, swap: Swap) -> Fields:
    return {
        "timestamp": timestamp,
        "swap_available_bytes": _number(swap.available),
        "swap_usage_bytes": _number(swap.usage),
    }


def _network(interfaces: tuple[InterfaceCounters, ...]) -> Fields:
    """The pod's interfaces, and which is the default one.

    1. ``interfaces`` has the default one too, though CRI says without: a kubelet makes the list of its Summary API from
       it alone, and Kubernetes' node conformance suite wants a list. containerd 2.3 does the same.
    2. There is always a default one: the kubelet crashes without. A pod may rename its own, so any other will do.
    """
    default = next((i for i in interfaces if i.name == _DEFAULT_INTERFACE), interfaces[0])
    return {
        "timestamp": time.time_ns(),
        "default_interface": _interface(default),
        "interfaces": [_interface(i) for i in interfaces],
    }


def _interface(interface: InterfaceCounters) -> Fields:
    return {
        "name": interface.name,
        "rx_bytes": _number(interface.rx_bytes),
        "rx_errors": _number(interface.rx_errors),
        "tx_bytes": _number(interface.tx_bytes),
        "tx_errors": _number(interface.tx_errors),
    }


def _psi(pressure: Pressure | None) -> Fields | None:
    return None if pressure is None else {"Full": _stall(pressure.full), "Some": _stall(pressure.some)}


def _stall(stall: Stall | None) -> Fields | None:
    if stall is None:
        return None
    return {"Total": stall.total_ns, "Avg10": stall.avg10, "Avg60": stall.avg60, "Avg300": stall.avg300}


def _number(value: int | None) -> Fields | None:
    return None if value is None else {"value": value}
