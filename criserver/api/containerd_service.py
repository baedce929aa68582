"""The three calls of containerd's API that a kubelet's cAdvisor makes, so that its metrics have the names of pods.

cAdvisor knows only containerd and CRI-O. It calls Version once at the kubelet's start, and Containers.Get and Tasks.Get
for each cgroup whose name has 64 hexadecimal digits. The calls do not change pods or containers. All pods are in
one namespace of containerd, so the daemon ignores the namespace in a call's metadata.
"""

from __future__ import annotations

import json
import shutil
import socket

import grpc
import structlog
from google.protobuf.any_pb2 import Any
from google.protobuf.timestamp_pb2 import Timestamp

from criserver import __version__
from criserver.api.grpc_server import ended, generic_handler, listen
from criserver.errors import NotFoundError
from criserver.pb.containerd.v1 import containers_pb2, tasks_pb2, version_pb2
from criserver.runtime import cadvisor_cgroup
from criserver.runtime.lifecycle import ContainerState, is_visible
from criserver.runtime.node import Node
from criserver.runtime.records import Container, Sandbox
from criserver.text import shown

log = structlog.get_logger(__name__)

# cAdvisor looks for the kind "sandbox": only its network counters are read.
_KIND = "io.cri-containerd.kind"
_SPEC = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
# cAdvisor reads process.env alone, and only with a kubelet that asks for variables. They may be secrets.
_EMPTY_SPEC = json.dumps({"ociVersion": "1.0.2", "process": {"cwd": "/", "env": []}}).encode()


class Containers:
    """containerd.services.containers.v1.Containers."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def get(self, request: containers_pb2.GetContainerRequest) -> containers_pb2.GetContainerResponse:
        record = _record(self._node, request.id)
        if isinstance(record, Sandbox):
            sandbox, kind, image = record, "sandbox", ""
        else:
            sandbox, kind, image = self._node.records.sandbox(record.sandbox_id), "container", self._image(record)
        container = containers_pb2.Container(
            id=record.id,
            labels={**record.config.labels, _KIND: kind},
            image=image,
            runtime=containers_pb2.Container.Runtime(name=f"criserver.{sandbox.runtime}"),
            spec=Any(type_url=_SPEC, value=_EMPTY_SPEC),
            created_at=_timestamp(record.created_at),
            sandbox="" if record is sandbox else sandbox.id,
        )
        return containers_pb2.GetContainerResponse(container=container)

    def _image(self, container: Container) -> str:
        """A name of the image, as containerd tells; kubelets name it by its ID."""
        image = self._node.images.get(container.image_id)
        names = () if image is None else (*image.repo_tags, *image.repo_digests)
        return next(iter(names), container.config.image)


class Tasks:
    """containerd.services.tasks.v1.Tasks."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def get(self, request: tasks_pb2.GetRequest) -> tasks_pb2.GetResponse:
        record = _record(self._node, request.container_id)
        process = tasks_pb2.Process(container_id=record.id, id=record.id, status=tasks_pb2.RUNNING)
        if isinstance(record, Sandbox):
            process.pid = cadvisor_cgroup.process_of(self._node, record)
        elif record.state is ContainerState.RUNNING:
            process.pid = record.pid
            sandbox = self._node.records.sandbox(record.sandbox_id)
            self._node.background(cadvisor_cgroup.make(self._node, sandbox), "the cgroup of a pod cannot be made")
        elif record.state is ContainerState.EXITED:
            process.status = tasks_pb2.STOPPED
            process.pid, process.exit_status = record.pid, record.exit_code
            process.exited_at.CopyFrom(_timestamp(record.finished_at))
        if not process.pid and process.status == tasks_pb2.RUNNING:
            raise NotFoundError(f"{record.id} has no process")
        return tasks_pb2.GetResponse(process=process)


class Version:
    """containerd.services.version.v1.Version."""

    async def version(self, request: object) -> version_pb2.VersionResponse:
        return version_pb2.VersionResponse(version=__version__, revision="criserver")


def handlers(node: Node) -> list[grpc.GenericRpcHandler]:
    """The three services."""
    return [
        generic_handler(file.DESCRIPTOR.services_by_name[type(service).__name__], service, {})
        for file, service in (
            (containers_pb2, Containers(node)),
            (tasks_pb2, Tasks(node)),
            (version_pb2, Version()),
        )
    ]


async def serve(address: str, node: Node) -> None:
    """Serve the three services on containerd's own socket until cancelled. On a node that has containerd, do nothing.

    Raises CriError where the socket cannot be bound.
    """
    if reason := _occupied(address):
        log.warning("containerd's API is not served on containerd's socket", address=address, reason=reason)
        return
    server = await listen(address, handlers(node))
    try:
        await ended(server)
    finally:
        await server.stop(0)


def _occupied(address: str) -> str:
    """Why containerd's socket is not free, "" if it is. gRPC would replace the socket of a containerd that runs."""
    if program := shutil.which("containerd"):
        return f"containerd is installed as {program}"
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            return ""
        except OSError:
            pass  # it listens, and its queue is full
    return "another process listens there"


def _record(node: Node, record_id: str) -> Container | Sandbox:
    """The container or the sandbox with this whole ID. Raises NotFoundError."""
    found = node.records.containers.get(record_id) or node.records.sandboxes.get(record_id)
    if found is None or not is_visible(found.state):
        raise NotFoundError(f"there is no container or pod sandbox {shown(record_id)}")
    return found


def _timestamp(nanoseconds: int) -> Timestamp:
    return Timestamp(seconds=nanoseconds // 10**9, nanos=nanoseconds % 10**9)
