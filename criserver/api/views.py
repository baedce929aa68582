"""Records as CRI messages."""

from __future__ import annotations

import json
from typing import Any

from criserver.api.lists import made
from criserver.images import Image
from criserver.model import Namespaces
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.container_exec import ExecResult
from criserver.runtime.events import Event
from criserver.runtime.lifecycle import ContainerState, EventType, SandboxState
from criserver.runtime.parse import MODES
from criserver.runtime.records import Container, Sandbox

# Intentions under way are seen as the state that they start from.
CONTAINER_STATES = {
    ContainerState.CREATED: cri.CONTAINER_CREATED,
    ContainerState.STARTING: cri.CONTAINER_CREATED,
    ContainerState.RUNNING: cri.CONTAINER_RUNNING,
    ContainerState.EXITED: cri.CONTAINER_EXITED,
    ContainerState.REMOVING: cri.CONTAINER_EXITED,
}
SANDBOX_STATES = {
    SandboxState.READY: cri.SANDBOX_READY,
    SandboxState.NOT_READY: cri.SANDBOX_NOTREADY,
    SandboxState.REMOVING: cri.SANDBOX_NOTREADY,
}
_EVENTS = {
    EventType.CREATED: cri.CONTAINER_CREATED_EVENT,
    EventType.STARTED: cri.CONTAINER_STARTED_EVENT,
    EventType.STOPPED: cri.CONTAINER_STOPPED_EVENT,
    EventType.DELETED: cri.CONTAINER_DELETED_EVENT,
}
# Field and kind on the wire (protobuf encoding): a length, and so many bytes.
_STDOUT, _STDERR = (
    bytes([cri.ExecSyncResponse.DESCRIPTOR.fields_by_name[name].number << 3 | 2]) for name in ("stdout", "stderr")
)
_MODES = {mode: number for number, mode in MODES.items()}


def sandbox(record: Sandbox) -> cri.PodSandbox:
    """The sandbox as ListPodSandbox shows it."""
    config = record.config
    return cri.PodSandbox(
        id=record.id,
        metadata=_pod_metadata(record),
        state=SANDBOX_STATES[record.state],
        created_at=record.created_at,
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=record.handler,
    )


def sandbox_status(record: Sandbox) -> cri.PodSandboxStatus:
    """The sandbox as PodSandboxStatus shows it."""
    config = record.config
    first, *others = record.ips or ("",)
    return cri.PodSandboxStatus(
        id=record.id,
        metadata=_pod_metadata(record),
        state=SANDBOX_STATES[record.state],
        created_at=record.created_at,
        network=cri.PodSandboxNetworkStatus(ip=first, additional_ips=[cri.PodIP(ip=ip) for ip in others]),
        linux=cri.LinuxPodSandboxStatus(namespaces=cri.Namespace(options=_namespaces(config.namespaces))),
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=record.handler,
    )


def container(record: Container) -> cri.Container:
    """The container as ListContainers shows it."""
    config = record.config
    return cri.Container(
        id=record.id,
        pod_sandbox_id=record.sandbox_id,
        metadata=cri.ContainerMetadata(name=config.name, attempt=config.attempt),
        image=cri.ContainerConfig.FromString(record.sent).image,
        image_ref=record.image_id,
        state=CONTAINER_STATES[record.state],
        created_at=record.created_at,
        labels=config.labels,
        annotations=config.annotations,
        image_id=record.image_id,
    )


def container_status(record: Container) -> cri.ContainerStatus:
    """The container as ContainerStatus shows it."""
    config = record.config
    sent = cri.ContainerConfig.FromString(record.sent)
    status = cri.ContainerStatus(
        id=record.id,
        metadata=sent.metadata,
        state=CONTAINER_STATES[record.state],
        created_at=record.created_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        exit_code=record.exit_code,
        image=sent.image,
        image_ref=record.image_ref,
        image_id=record.image_id,
        reason=_utf8(record.reason),
        message=_utf8(record.message),
        labels=config.labels,
        annotations=config.annotations,
        mounts=sent.mounts,
        log_path=record.log_path,
        stop_signal=sent.stop_signal,
    )
    if sent.linux.HasField("resources"):
        status.resources.linux.CopyFrom(sent.linux.resources)
    if record.user is not None:
        user = record.user
        status.user.linux.CopyFrom(cri.LinuxContainerUser(uid=user.uid, gid=user.gid, supplemental_groups=user.groups))
    return status


def event(happened: Event) -> cri.ContainerEventResponse:
    """What happened, with the statuses of the whole pod."""
    return cri.ContainerEventResponse(
        container_id=happened.id,
        container_event_type=_EVENTS[happened.type],
        created_at=happened.at,
        pod_sandbox_status=sandbox_status(happened.sandbox),
        containers_statuses=made(happened.containers, container_status),
    )


def image(record: Image) -> cri.Image:
    """The image as ListImages and ImageStatus show it."""
    found = cri.Image(
        id=record.id,
        repo_tags=record.repo_tags,
        repo_digests=record.repo_digests,
        size=record.size,
        pinned=record.pinned,
        spec=cri.ImageSpec(image=record.id),
    )
    match record.user.user:
        case int(number):
            found.uid.value = number
        case name:
            found.username = name
    return found


def exec_result(result: ExecResult) -> bytes:
    """The answer to ExecSync, serialised in one piece: a message would hold copies of megabytes of output."""
    code = cri.ExecSyncResponse(exit_code=result.code).SerializeToString()
    outputs = ((_STDOUT, result.stdout), (_STDERR, result.stderr))
    return b"".join([part for tag, data in outputs if data for part in (tag, _varint(len(data)), data)] + [code])


def _varint(number: int) -> bytes:
    """A number as protobuf has it on the wire: seven bits a byte, the lowest first, with more to come in the eighth."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def info(**facts: Any) -> dict[str, str]:
    """The ``info`` of a verbose answer: one JSON document, as crictl shows it."""
    return {"info": json.dumps(facts)}


def _utf8(text: str) -> str:
    """The text as a message can carry it: what a runtime says of a failure may have halves of characters in it."""
    return text.encode(errors="replace").decode()


def _pod_metadata(record: Sandbox) -> cri.PodSandboxMetadata:
    config = record.config
    return cri.PodSandboxMetadata(name=config.name, uid=config.uid, namespace=config.namespace, attempt=config.attempt)


def _namespaces(modes: Namespaces) -> cri.NamespaceOption:
    found = cri.NamespaceOption(network=_MODES[modes.network], pid=_MODES[modes.pid], ipc=_MODES[modes.ipc])
    if modes.user is not None:
        found.userns_options.mode = cri.POD
        for mapping, field in ((modes.user.uids, "uids"), (modes.user.gids, "gids")):
            getattr(found.userns_options, field).add(
                container_id=mapping.container_id, host_id=mapping.host_id, length=mapping.length
            )
    return found
