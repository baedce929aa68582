"""Start-up: operations that an earlier daemon did not finish are finished or rolled back; leftovers are removed.

A record in an intermediate state tells what was about to be done; whether it was done is not known. After recovery each
mount, namespace, bundle and runtime state below our directories has a record that owns it, or is alive and reported.

Each pod is recovered by a task of its own while the daemon serves. Calls for a pod wait for its task
(:meth:`Node.recovered`), and for no other.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import assert_never

import structlog

from criserver import logs
from criserver.boot import boot_id
from criserver.errors import CriError, ResourceExhaustedError, exhaustion
from criserver.network import namespaces
from criserver.runtime import (
    cadvisor_cgroup,
    cgroups,
    container_create,
    container_start,
    filesystems,
    pidfd,
    process_records,
    sandbox_files,
    sandbox_run,
    selinux,
    strays,
    userns_access,
)
from criserver.runtime.container_checkpoint import checkpoints, recover_checkpoint
from criserver.runtime.container_process import END_TIMEOUT
from criserver.runtime.container_remove import remove_locked
from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.node import Node
from criserver.runtime.pod_namespaces import unpin_pids, unpinned
from criserver.runtime.records import Container, Sandbox
from criserver.runtime.runtime_choice import runtime_roots, shim_roots
from criserver.runtime.sandbox_remove import remove_sandbox
from criserver.telemetry import families

log = structlog.get_logger(__name__)

# How many leftovers are removed at a time.
_AT_ONCE = 8
# The IDs that this daemon makes. No cgroup of another program has such a name by chance.
_ID = re.compile(r"[0-9a-f]{64}")


async def recover(node: Node, *, end_living: bool = False) -> None:
    """Recover all pods, and remove what has no record; with ``end_living`` also containers and pods that are alive."""
    begin(node)
    await finish(node, end_living=end_living)


def begin(node: Node) -> None:
    """Begin the recovery of each pod. Until it has ended, calls for the pod wait."""
    families.RECOVERY.add(len(node.records.sandboxes), "sandbox", "found")
    families.RECOVERY.add(len(node.records.containers), "container", "found")
    if any(s.config.namespaces.user is not None for s in node.records.sandboxes.values()):
        try:
            userns_access.update(node)
        except (CriError, OSError) as e:
            log.exception("user namespaces get no access to the root file systems of their pods", error=str(e))
    for sandbox in node.records.sandboxes.values():
        task = node.recovering[sandbox.id] = node.begin(_pod(node, sandbox))
        task.add_done_callback(lambda _, key=sandbox.id: node.recovering.pop(key))  # type: ignore[misc]


async def finish(node: Node, *, end_living: bool = False) -> None:
    """Wait for the recovery of all pods, and then remove what has no record."""
    orphans = node.background(strays.end_orphans(), "programs of an earlier daemon cannot be ended")
    await asyncio.gather(orphans, *node.recovering.values())
    await _sweep(node, end_living=end_living)


async def _pod(node: Node, sandbox: Sandbox) -> None:
    """Make the records of a pod and the node agree. A failure is logged, and the rest goes on."""
    logs.about(**sandbox.named)
    await asyncio.gather(*(_container(node, c) for c in node.records.containers_of(sandbox.id)))
    await _sandbox(node, sandbox)


async def _container(node: Node, container: Container) -> None:
    try:
        await _finish_container(node, container)
    except Exception as e:
        families.RECOVERY.add(1, "container", "failed")
        what = "recovery of a container failed"
        log.exception(what, container=container.id)

        async def again() -> None:
            current = node.records.containers.get(container.id)
            if current is not None and current.state in (ContainerState.STARTING, ContainerState.RUNNING):
                # Not its checkpoint: that is tried again by itself, and a client may have begun another one.
                await _running(node, current)
                await _unmount_exited(node, current.id)

        _try_again(node, container.id, e, again, what)


def _try_again(node: Node, record_id: str, error: Exception, again: Callable[[], Awaitable[None]], what: str) -> None:
    """Have the recovery of what runs be done later, if it has failed for want of descriptors, memory or disk space.

    Without it nobody would notice the end of the process. The rest is tried again by the kubelet's next call.
    """
    if exhaustion(error) or isinstance(error, ResourceExhaustedError):
        node.try_again(record_id, again, what)


async def _finish_container(node: Node, container: Container) -> None:
    # This comes first: a frozen container cannot be ended.
    await recover_checkpoint(node, container.id)
    match container.state:
        case ContainerState.CREATING:
            log.warning("rolling back a container whose making was cut off", container=container.id)
            undone = await container_create.undo(node, container, "the daemon ended while it was being made")
            families.RECOVERY.add(1, "container", "rolled_back" if undone else "failed")
        case ContainerState.REMOVING:
            await remove_locked(node, container)
            families.RECOVERY.add(1, "container", "finished")
        case ContainerState.STARTING | ContainerState.RUNNING:
            await _running(node, container)
        case ContainerState.CREATED:
            if not os.path.ismount(node.rootfs(container.id)):
                await _lost_before_start(node, container)
        case ContainerState.EXITED:
            pass
        case never:
            assert_never(never)
    await _unmount_exited(node, container.id)


async def _unmount_exited(node: Node, container_id: str) -> None:
    container = node.records.containers.get(container_id)
    if container is not None and container.state is ContainerState.EXITED:
        await filesystems.unmount(node, container_id)


async def _running(node: Node, container: Container) -> None:
    process = process_records.of_container(node, container)
    if process.shim.connected or await process.shim.reconnect():
        return
    cut_off = container.state is ContainerState.STARTING
    if cut_off and not os.path.exists(os.path.join(node.container_dir(container.id), "init.pid")):
        # It does not become created again: a late shim could start it a second time. Its root file system is
        # unmounted, so that a late shim finds nothing to run. The kubelet makes a new container.
        log.warning("a start was cut off", container=container.id)
        await container_start.fail(node, process, "the daemon was ended while the container was being started")
        return
    process.without_shim()
    await process.wait_cleaned_up()


async def _lost_before_start(node: Node, container: Container) -> None:
    await node.records.save(container.ended(255, "Unknown", "the node was restarted before the container was started"))


async def _sandbox(node: Node, sandbox: Sandbox) -> None:
    try:
        await _finish_sandbox(node, sandbox)
    except Exception as e:
        families.RECOVERY.add(1, "sandbox", "failed")
        what = "recovery of a pod sandbox failed"
        log.exception(what, sandbox=sandbox.id)

        async def again() -> None:
            current = node.records.sandboxes.get(sandbox.id)
            if current is not None and current.state is SandboxState.READY:
                await _finish_sandbox(node, current)

        _try_again(node, sandbox.id, e, again, what)


async def _finish_sandbox(node: Node, sandbox: Sandbox) -> None:
    match sandbox.state:
        case SandboxState.CREATING:
            log.warning("rolling back a pod sandbox whose making was cut off", sandbox=sandbox.id)
            undone = await sandbox_run.undo(node, sandbox, _end_making(node, sandbox))
            families.RECOVERY.add(1, "sandbox", "rolled_back" if undone else "failed")
        case SandboxState.REMOVING:
            await strays.wait("CNI_CONTAINERID", sandbox.id)
            await remove_sandbox(node, sandbox.id)
            families.RECOVERY.add(1, "sandbox", "finished")
        case SandboxState.READY:
            if not await _whole(node, sandbox):
                log.warning("a pod sandbox has lost its namespaces", sandbox=sandbox.id)
                await node.records.save(sandbox.not_ready("its namespaces are gone, as after a reboot of the node"))
            else:
                files, label = node.sandbox_files_dir(sandbox.id), selinux.pod_files(sandbox.selinux_level)
                await asyncio.to_thread(sandbox_files.adopt, files, node.sandbox_dir(sandbox.id), label)
                await cadvisor_cgroup.recover(node, sandbox)
                current = node.records.sandboxes.get(sandbox.id)
                if current is not None and current.state is SandboxState.READY and not current.boot_id:
                    # It was made by a release that did not record the boot.
                    await node.records.save(dataclasses.replace(current, boot_id=boot_id()))
        case SandboxState.NOT_READY:
            pass  # its parts have been released
        case never:
            assert_never(never)


async def _end_making(node: Node, sandbox: Sandbox) -> None:
    """Wait for the network plugins that an earlier daemon has called, and end a start of the infra process."""
    await strays.wait("CNI_CONTAINERID", sandbox.id)
    await process_records.of_infra(node, sandbox).end_start()


async def _whole(node: Node, sandbox: Sandbox) -> bool:
    """Whether the sandbox still has its namespaces and its infra process. A reboot ends them all.

    A pod that shares the node's namespaces has none of its own. It is over too: its init containers have to run again.
    """
    if unpinned(node, sandbox) or sandbox.boot_id not in ("", boot_id()):
        return False
    if not sandbox.has_infra:
        return True
    shim = process_records.of_infra(node, sandbox).shim
    return shim.connected or await shim.reconnect()


async def _sweep(node: Node, *, end_living: bool) -> None:
    """Remove what no record owns.

    A container or pod without a record that is alive lost its record with the database. It is left as it is unless
    ``end_living``, and reported.
    """
    config = node.config
    pods = {*entries(config.state, "ns"), *entries(config.state, "sandboxes"), *entries(config.root, "sandboxes")}
    containers = {
        *entries(config.state, "containers"),
        *checkpoints(node),
        *(filesystems.owner(key) for key in node.snapshotter.removable()),
        *entries(filesystems.volumes_root(node)),
    }
    roots = runtime_roots(config.state)
    for handler in entries(roots):
        # A name that begins with a dot is no container's: crun keeps a cache there.
        containers.update(name for name in entries(roots, handler) if not name.startswith("."))
    owned = node.records.sandboxes.keys() | node.records.containers.keys()
    living, left_cgroups = set[str](), dict[str, str]()
    if unowned := (pods | containers) - owned:
        left_cgroups = await asyncio.to_thread(cgroups.find, set(filter(_ID.fullmatch, unowned)))
    if not end_living and unowned:
        living = await asyncio.to_thread(_living, node, unowned, left_cgroups)
    for name in sorted(living):
        log.error("it is alive and has no record, so it is left as it is; `criserver reset` removes it", id=name)
    turn = asyncio.Semaphore(_AT_ONCE)
    await asyncio.gather(*(_remove_pod(node, name, left_cgroups.get(name, ""), turn) for name in pods - owned - living))
    await asyncio.gather(
        *(_remove_container(node, name, left_cgroups.get(name, ""), turn) for name in containers - owned - living)
    )


def _living(node: Node, unowned: set[str], left_cgroups: Mapping[str, str]) -> set[str]:
    """Those that have a shim, any process or pinned namespaces. Blocks."""
    living = set()
    for name in unowned:
        directory, pins = node.container_dir(name), node.namespaces_dir(name)
        if (
            pidfd.processes_in(directory)
            or _has_process(directory, name)
            or (name in left_cgroups and cgroups.processes(left_cgroups[name]))
            or any(namespaces.is_pinned(os.path.join(pins, kind)) for kind in entries(pins))
        ):
            living.add(name)
    return living


def _has_process(directory: str, container_id: str) -> bool:
    """Whether the first process of a container runs. Its PID may be another's by now, so its cgroup has to name it.

    A process that cannot be looked up, such as when no descriptor is left, counts as one that runs.
    """
    try:
        with open(os.path.join(directory, "init.pid")) as f:
            pid = int(f.read())
        with open(f"/proc/{pid}/cgroup", "rb") as f:  # a container may give its own cgroups any names
            return container_id.encode() in f.read()
    except (FileNotFoundError, NotADirectoryError, ProcessLookupError, ValueError):
        return False
    except OSError:
        return True


async def _remove_pod(node: Node, name: str, cgroup: str, turn: asyncio.Semaphore) -> None:
    """Remove a pod without a record. ``cgroup`` is the path of the cgroup with its name, "" if it has none."""
    async with turn:
        if cgroup:
            await _swept("a pod's cgroup", name, cgroups.clear(cgroup, name, END_TIMEOUT))
        files, directory = node.sandbox_files_dir(name), node.sandbox_dir(name)
        await _swept("namespaces", name, asyncio.to_thread(_unpin, node, name))
        await _swept("a pod's files", name, asyncio.to_thread(sandbox_files.remove, files, directory))


async def _remove_container(node: Node, name: str, cgroup: str, turn: asyncio.Semaphore) -> None:
    """Remove a container without a record. ``cgroup`` is the path of its cgroup, "" if it has none."""
    async with turn:
        # The files are deleted last: by them the next start finds that something of the container is left.
        if await _swept("a container", name, _end(node, name, cgroup)):
            await _swept("a checkpoint", name, recover_checkpoint(node, name))
            await _swept("a container's files", name, filesystems.discard(node, name))


async def _end(node: Node, name: str, cgroup: str) -> None:
    """End all processes of a container without a record, and delete what OCI runtimes keep of it. Raises CriError."""
    state = node.config.state
    handlers = {*entries(runtime_roots(state)), *entries(shim_roots(state)), *node.config.runtimes}
    runtimes = [node.cleanup_runtime(handler, name) for handler in handlers]
    for runtime in runtimes:
        await runtime.delete(name, "")
    if cgroup:
        await cgroups.clear(cgroup, name, END_TIMEOUT)
    if left := await asyncio.to_thread(pidfd.end_all_in, node.container_dir(name), END_TIMEOUT):
        raise cgroups.unkillable(name, left, END_TIMEOUT)
    for runtime in runtimes:
        await runtime.forget(name)


async def _swept(what: str, name: str, work: Awaitable[object]) -> bool:
    """Remove one leftover; a failure is logged, so that the others are removed too. Return whether it is removed."""
    try:
        await work
    except Exception as e:
        log.exception("a leftover cannot be removed", what=what, name=name, error=str(e))
        return False
    return True


def _unpin(node: Node, sandbox_id: str) -> None:
    unpin_pids(node, sandbox_id)
    namespaces.unpin(node.namespaces_dir(sandbox_id))


def entries(*parts: str) -> list[str]:
    """The names in the directory at the path of ``parts``; none where there is no directory."""
    try:
        return os.listdir(os.path.join(*parts))
    except (FileNotFoundError, NotADirectoryError):
        return []
