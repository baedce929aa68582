"""Which record a process belongs to: a container's, or its pod's for an infra process; and what becomes of it there."""

from __future__ import annotations

import dataclasses

import structlog

from criserver import logs
from criserver.runtime import filesystems
from criserver.runtime.container_process import ContainerProcess, ExitRecord, Observer, Started
from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.node import Node
from criserver.runtime.records import Container, Sandbox

log = structlog.get_logger(__name__)

# The states in which a container may have a process.
_ALIVE = (ContainerState.STARTING, ContainerState.RUNNING)


def of_container(node: Node, container: Container) -> ContainerProcess:
    """The process of a container; one that has none yet, or none any more, is given one to start or clean up."""
    process = node.processes.get(container.id)
    if process is None:
        sandbox = node.records.sandbox(container.sandbox_id)
        process = _make(
            node, container.id, sandbox, container.parent_cgroup(sandbox), _ContainerRecord(node, container.id)
        )
        if container.pid:
            process.started = Started(container.pid, container.start_ticks, container.started_at)
    return process


def of_infra(node: Node, sandbox: Sandbox) -> ContainerProcess:
    """The process that holds the PID namespace of a pod; one that has none is given one to start or clean up."""
    process = node.processes.get(sandbox.id)
    return process or _make(node, sandbox.id, sandbox, sandbox.cgroup_parent, _InfraRecord(node, sandbox.id))


def _make(node: Node, owner_id: str, sandbox: Sandbox, cgroup_parent: str, observer: Observer) -> ContainerProcess:
    runtime = node.cleanup_runtime(sandbox.runtime, owner_id)
    if sandbox.sandbox_container and owner_id != sandbox.id:
        runtime = runtime.within(node.container_dir(sandbox.id))
    process = node.processes[owner_id] = ContainerProcess(
        owner_id,
        node.container_dir(owner_id),
        runtime,
        cgroup_parent,
        node.nursery,
        observer,
        node.background,
    )
    return process


class _ContainerRecord(Observer):
    """Keeps a container's record; one that is removed meanwhile needs nothing."""

    def __init__(self, node: Node, container_id: str) -> None:
        self._node = node
        self._id = container_id

    def running(self, started: Started) -> None:
        container = self._in_state(ContainerState.STARTING)
        if container is not None:
            self._run(container, started)

    def start_failed(self, message: str) -> None:
        container = self._in_state(ContainerState.STARTING)
        if container is not None:
            self._node.records.observe(container.ended(128, "StartError", message))
            log.warning("container not started", **self._named(container), error=message)

    def exited(self, record: ExitRecord) -> None:
        container = self._in_state(*_ALIVE)
        if container is None:
            return
        code, finished_at = record["code"], record["finished_at"]
        if container.state is ContainerState.STARTING:
            # An earlier daemon did not hear of the start. A greeting has the PID, the record on disk has none.
            pid, ticks = record.get("init") or 0, record.get("start_ticks", 0)
            container = self._run(container, Started(pid, ticks, record.get("started_at") or finished_at))
        reason = "OOMKilled" if record.get("oom_killed") else "Completed" if code == 0 else "Error"
        self._node.records.observe(container.ended(code, reason, finished_at=finished_at))
        log.info("container exited", **self._named(container), code=code, reason=reason)

    def lost(self) -> None:
        container = self._in_state(*_ALIVE)
        if container is not None:
            message = "the container's shim ended without a record of its exit"
            self._node.records.observe(container.ended(255, "Unknown", message))
            log.error("container lost", **self._named(container), error=message)

    def cleaned_up(self) -> None:
        if self._id in self._node.records.containers:
            self._node.background(
                filesystems.unmount(self._node, self._id), "unmount of an exited container's files failed"
            )

    def _named(self, container: Container) -> dict[str, object]:
        return {**self._node.records.sandbox(container.sandbox_id).named, **container.named}

    def _in_state(self, *states: ContainerState) -> Container | None:
        container = self._node.records.containers.get(self._id)
        return container if container is not None and container.state in states else None

    def _run(self, container: Container, started: Started) -> Container:
        container = dataclasses.replace(
            container,
            state=ContainerState.RUNNING,
            pid=started.pid,
            start_ticks=started.start_ticks,
            started_at=started.started_at,
        )
        self._node.records.observe(container)
        self._node.stats.disk.nudge()
        log.info("container started", **self._named(container), pid=started.pid, seconds=logs.elapsed())
        return container


class _InfraRecord(Observer):
    """Keeps a sandbox's record: without its infra process it is not ready."""

    def __init__(self, node: Node, sandbox_id: str) -> None:
        self._node = node
        self._id = sandbox_id

    def running(self, started: Started) -> None:
        pass  # RunPodSandbox waits for it

    def start_failed(self, message: str) -> None:
        pass  # RunPodSandbox is told

    def exited(self, record: ExitRecord) -> None:
        self._lose(record)

    def lost(self) -> None:
        self._lose({"reason": "its shim is gone"})

    def cleaned_up(self) -> None:
        pass  # StopPodSandbox unmounts

    def _lose(self, record: ExitRecord) -> None:
        sandbox = self._node.records.sandboxes.get(self._id)
        if sandbox is not None and sandbox.state is SandboxState.READY:
            log.error("a pod's own process has ended", **sandbox.named, record=record)
            self._node.records.observe(sandbox.not_ready("its own process, which holds its namespaces, has ended"))
