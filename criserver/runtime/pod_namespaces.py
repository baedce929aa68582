"""The namespaces of a pod: where they are pinned, and what containers need to join the pod."""

from __future__ import annotations

import asyncio
import os

import structlog

from criserver.errors import CriError
from criserver.model import NamespaceMode, User
from criserver.network import namespaces
from criserver.oci.spec_inputs import PodFacts
from criserver.runtime import sandbox_files
from criserver.runtime.lifecycle import SandboxState
from criserver.runtime.node import Node
from criserver.runtime.records import Sandbox
from snapshotter import mounts, removal

log = structlog.get_logger(__name__)


def network_pin(node: Node, sandbox_id: str) -> str:
    """The path at which a pod's network namespace is pinned, or will be, unless the pod uses the node's."""
    path = os.path.join(node.namespaces_dir(sandbox_id), "net")
    if os.path.lexists(path):
        return namespaces.pin_behind(path)  # releases before 0.3.0 have pinned it there
    return os.path.join(node.config.netns_dir, f"criserver-{sandbox_id}")


def pid_pin(node: Node, sandbox_id: str) -> str:
    """The path at which the PID namespace is pinned that the containers of a pod share."""
    return os.path.join(node.namespaces_dir(sandbox_id), "pid")


def user_pin(node: Node, sandbox_id: str) -> str:
    """The path at which a pod's user namespace is pinned, if it has one."""
    return os.path.join(node.namespaces_dir(sandbox_id), "user")


def stream_owner(sandbox: Sandbox, user: User | None) -> tuple[int, int] | None:
    """The host's IDs of a container's user, who is to own its standard streams; None without a user namespace.

    A process that opens /dev/stdout again needs to own the pipe. Without a user namespace the OCI runtime makes it the
    owner. In one it cannot: the pipe belongs to a user whom the namespace does not have.
    """
    namespace = sandbox.config.namespaces.user
    if namespace is None or user is None:
        return None
    uid, gid = namespace.uids.host_id_of(user.uid), namespace.gids.host_id_of(user.gid)
    return None if uid is None or gid is None else (uid, gid)


def pin_pids(node: Node, sandbox_id: str, pid: int) -> None:
    """Pin the PID namespace of a process. Without a pin, the PID may be another process's when a container joins.

    Raises FileNotFoundError if the process has ended.
    """
    pin = pid_pin(node, sandbox_id)
    with open(pin, "w"):
        pass
    mounts.mount(f"/proc/{pid}/ns/pid", pin, None, mounts.MS_BIND)


def unpin_pids(node: Node, sandbox_id: str) -> None:
    """Unpin a shared PID namespace; there may be none. Raises CriError."""
    pin = pid_pin(node, sandbox_id)
    try:
        mounts.unmount(pin)
        removal.remove_path(pin)
    except OSError as e:
        raise CriError(f"cannot remove the pinned namespace {pin}: {e}") from e


def pod_facts(node: Node, sandbox: Sandbox) -> PodFacts:
    """The hostname, files and namespaces that a sandbox's containers get from it."""
    config, files = sandbox.config, node.sandbox_files_dir(sandbox.id)
    pins = node.namespaces_dir(sandbox.id)
    own_network = config.namespaces.network is not NamespaceMode.NODE
    own_ipc = config.namespaces.ipc is not NamespaceMode.NODE
    shared_pid = config.namespaces.pid is NamespaceMode.POD
    return PodFacts(
        hostname=sandbox_files.hostname(config),
        resolv_conf=os.path.join(files, "resolv.conf"),
        hosts=os.path.join(files, "hosts"),
        hostname_file=os.path.join(files, "hostname"),
        shm=sandbox_files.shm(node.sandbox_dir(sandbox.id), config),
        net_namespace=network_pin(node, sandbox.id) if own_network else None,
        uts_namespace=os.path.join(pins, "uts") if own_network else None,
        ipc_namespace=os.path.join(pins, "ipc") if own_ipc else None,
        pid_namespace=pid_pin(node, sandbox.id) if shared_pid else None,
        user_namespace=user_pin(node, sandbox.id) if config.namespaces.user is not None else None,
    )


def unpinned(node: Node, sandbox: Sandbox) -> list[str]:
    """The paths at which a namespace of a pod is to be pinned, and is not."""
    facts = pod_facts(node, sandbox)
    pins = (facts.net_namespace, facts.ipc_namespace, facts.uts_namespace, facts.user_namespace, facts.pid_namespace)
    return [path for path in pins if path and not namespaces.is_pinned(path)]


async def give_up_if_lost(node: Node, sandbox_id: str) -> None:
    """Make a pod not ready if a namespace or its /dev/shm is gone: no container can be started in it any more.

    The kubelet then makes a new one. Somebody has unmounted or deleted them below the state directory.
    """
    async with node.lock(sandbox_id):
        sandbox = node.records.sandboxes.get(sandbox_id)
        if sandbox is None or sandbox.state is not SandboxState.READY:
            return
        shm = pod_facts(node, sandbox).shm
        lost = await asyncio.to_thread(lambda: unpinned(node, sandbox) + ([] if os.path.isdir(shm) else [shm]))
        if lost:
            log.warning("a pod sandbox has lost what its containers need", **sandbox.named, lost=lost)
            await node.records.save(sandbox.not_ready(f"{lost[0]} is gone"))
