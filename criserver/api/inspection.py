"""What the daemon knows of a pod, a container or an image, as JSON documents.

They are for `criserver inspect`, and for CRI's verbose statuses.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.message import Message

from criserver.api import views
from criserver.errors import CriError, DataLossError, InvalidArgumentError, NotFoundError
from criserver.images import Image, Images
from criserver.network.namespaces import pin_behind
from criserver.oci.spec_namespaces import sandbox_namespaces
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups
from criserver.runtime.ignored import ignored
from criserver.runtime.node import Node
from criserver.runtime.pod_namespaces import pod_facts
from criserver.runtime.records import Container, Record, Sandbox
from criserver.runtime.spec_file import read_spec
from criserver.text import shown
from snapshotter import mounts
from snapshotter.threads import in_loose_thread


def sandbox_info(node: Node, sandbox: Sandbox) -> dict[str, Any]:
    """What a verbose PodSandboxStatus has beside the status. Blocks."""
    sent = cri.PodSandboxConfig.FromString(sandbox.sent)
    return {
        "sandboxID": sandbox.id,
        "runtimeHandler": sandbox.runtime,
        "reason": sandbox.reason,
        "namespaces": node.namespaces_dir(sandbox.id),
        "cgroupParent": sandbox.cgroup_parent,
        "resources": _document(sent.linux.resources),
        "overhead": _document(sent.linux.overhead),
        "network": json.loads(sandbox.attachment) if sandbox.attachment else None,
        # Tools read the path of a pod's network namespace here, as with containerd and CRI-O.
        "runtimeSpec": {"linux": {"namespaces": sandbox_namespaces(pod_facts(node, sandbox))}},
    }


def container_info(node: Node, container: Container) -> dict[str, Any]:
    """What a verbose ContainerStatus has beside the status. Blocks."""
    return {
        "sandboxID": container.sandbox_id,
        "pid": container.pid,
        "rootfs": node.rootfs(container.id),
        "runtimeSpec": _spec(node, container.id),
        # Options that were accepted and have no effect on this node.
        "ignored": ignored(container.config),
    }


def find(node: Node, text: str) -> Record:
    """The pod or container with this ID or beginning of an ID, or the newest pod with this NAMESPACE/NAME.

    Records that callers do not see yet count too. Raises NotFoundError, and InvalidArgumentError if several match.
    """
    records = node.records
    if "/" in text:
        pods = [s for s in records.sandboxes.values() if f"{s.config.namespace}/{s.config.name}" == text]
        if not pods:
            raise NotFoundError(f"pod {shown(text)} does not exist; `criserver pods` lists the pods")
        return max(pods, key=lambda s: s.created_at)
    if not text:
        raise InvalidArgumentError("the ID is empty; give the ID of a pod or container, or NAMESPACE/NAME of a pod")
    every: dict[str, Record] = {**records.sandboxes, **records.containers}
    matches = [text] if text in every else [key for key in every if key.startswith(text)]
    if not matches:
        raise NotFoundError(f"no pod and no container has the ID {shown(text)}; `criserver ps --all` lists them")
    if len(matches) > 1:
        raise InvalidArgumentError(
            f"{shown(text)} is the beginning of {len(matches)} IDs of pods and containers; give more characters"
        )
    return every[matches[0]]


async def inspect(node: Node, text: str) -> str:
    """The document of `criserver inspect` for what :func:`find` finds, as JSON. Raises as that does."""
    record = find(node, text)
    if isinstance(record, Sandbox):
        return await _looked_up(_sandbox, node, record, list(node.records.containers_of(record.id)))
    return await _looked_up(_container, node, record, node.records.sandboxes[record.sandbox_id])


async def verbose_info(node: Node, record: Record) -> dict[str, str]:
    """The ``info`` of a verbose status: what :func:`sandbox_info` or :func:`container_info` has, as JSON."""
    if isinstance(record, Sandbox):
        return {"info": await _looked_up(sandbox_info, node, record)}
    return {"info": await _looked_up(container_info, node, record)}


async def image_info(images: Images, image: Image) -> dict[str, str]:
    """The ``info`` of a verbose ImageStatus. Without ``imageSpec`` if the configuration cannot be read or shown."""
    try:
        return {"info": await _looked_up(_image_with_spec, images, image)}
    except (CriError, OSError, RecursionError, ValueError):  # a number may be larger than Python's
        return {"info": await _looked_up(_image, image)}


def _image_with_spec(images: Images, image: Image) -> dict[str, Any]:
    # Tools read labels and the date there, as with containerd and CRI-O.
    return {**_image(image), "imageSpec": images.configuration(image)}


def _image(image: Image) -> dict[str, Any]:
    return {"manifest": image.manifest, "chainID": image.chain_id, "config": dataclasses.asdict(image.config)}


async def _looked_up(look: Callable[..., dict[str, Any]], *arguments: Any) -> str:
    """What a function that blocks returns, as JSON. It has a thread of its own.

    1. An operator asks when the disk stands still, and then all threads of the pool may wait for it.
    2. A container's document may have megabytes, which take too long to write for the event loop.
    """

    def work() -> str:
        # json.dumps() would be one step, during which no other thread runs.
        return "".join(json.JSONEncoder(allow_nan=False).iterencode(look(*arguments)))

    return await in_loose_thread(work, "inspection")


def _sandbox(node: Node, sandbox: Sandbox, containers: Sequence[Container]) -> dict[str, Any]:
    pins, infra = node.namespaces_dir(sandbox.id), node.processes.get(sandbox.id)
    directories = (node.sandbox_dir(sandbox.id), pins)
    return {
        "kind": "pod",
        "id": sandbox.id,
        "name": f"{sandbox.config.namespace}/{sandbox.config.name}",
        "state": sandbox.state.value,
        "recovering": sandbox.id in node.recovering,
        "status": _document(views.sandbox_status(sandbox)),
        "config": _document(cri.PodSandboxConfig.FromString(sandbox.sent)),
        **sandbox_info(node, sandbox),
        "namespaces": {name: pin_behind(os.path.join(pins, name)) for name in _names(pins)},
        "cgroup": cgroups.pod_path(sandbox.cgroup_parent),
        "mounts": [point for directory in directories for point in mounts.mounts_below(directory)],
        "files": node.sandbox_files_dir(sandbox.id),
        "infraPid": infra.started.pid if infra is not None and infra.started else 0,
        "containers": [{"id": c.id, "name": c.config.name, "state": c.state.value} for c in containers],
    }


def _container(node: Node, container: Container, sandbox: Sandbox) -> dict[str, Any]:
    directory, process = node.container_dir(container.id), node.processes.get(container.id)
    snapshot = node.snapshotter.snapshots().get(container.id)
    return {
        "kind": "container",
        "id": container.id,
        "name": container_name(container, sandbox),
        "state": container.state.value,
        "recovering": sandbox.id in node.recovering,
        "status": _document(views.container_status(container)),
        "config": _document(cri.ContainerConfig.FromString(container.sent)),
        **container_info(node, container),
        "namespaces": _process_namespaces(container.pid) if process is not None else {},
        "cgroup": cgroups.path(container.parent_cgroup(sandbox), container.id),
        "mounts": mounts.mounts_below(directory),
        "snapshot": snapshot.path if snapshot is not None else None,
        "bundle": directory,
        "shim": {
            "socket": os.path.join(directory, "shim.sock"),
            "exists": os.path.exists(os.path.join(directory, "shim.sock")),
            "running": process is not None and process.started is not None and not process.exited.is_set(),
        },
        "logPath": container.log_path,
    }


def container_name(container: Container, sandbox: Sandbox) -> str:
    """NAMESPACE/POD/CONTAINER."""
    return f"{sandbox.config.namespace}/{sandbox.config.name}/{container.config.name}"


def _spec(node: Node, container_id: str) -> Any:
    try:
        return read_spec(node, container_id)
    except DataLossError:
        return None


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def _process_namespaces(pid: int) -> dict[str, str]:
    """The namespaces of a process as the kernel names them, such as "net:[4026531840]"; none where it has ended."""
    found = {}
    for name in _names(f"/proc/{pid}/ns") if pid else ():
        try:
            found[name] = os.readlink(f"/proc/{pid}/ns/{name}")
        except OSError:
            continue  # it ends just now
    return found


def _document(message: Message) -> dict[str, Any]:
    from google.protobuf import json_format  # few nodes are asked for these documents

    document: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return document
