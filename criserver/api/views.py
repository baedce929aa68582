"""Records as CRI messages."""

from __future__ import annotations

import json
from typing import Any

from criserver.api.lists import make_each
from criserver.images import Image, references
from criserver.images.digests import is_digest
from criserver.model import Namespaces, Resources
from criserver.oci.spec_resources import in_force
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import host
from criserver.runtime.container_create import signal_number
from criserver.runtime.container_exec import ExecResult
from criserver.runtime.events import Event
from criserver.runtime.lifecycle import ContainerState, EventType, SandboxState
from criserver.runtime.parse import MODES
from criserver.runtime.records import Container, Sandbox

# An intermediate state is shown as the state before it.
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
# The tag of a field on the wire (protobuf encoding): its number, and its wire type LEN (2).
_STDOUT, _STDERR = (
    bytes([cri.ExecSyncResponse.DESCRIPTOR.fields_by_name[name].number << 3 | 2]) for name in ("stdout", "stderr")
)
_MODES = {mode: number for number, mode in MODES.items()}
# CRI's names of signals by the kernel's numbers. Where CRI has two names, as SIGABRT and SIGIOT, the first one counts.
_SIGNALS = {signal_number(name): name for name in reversed(cri.Signal.keys()) if name != "RUNTIME_DEFAULT"}


# Bytes of labels in the short entry of a list, and of each annotation of a container there.
_SHORT_LABELS, _SHORT_ANNOTATION = 64 << 10, 4 << 10
# The labels that a kubelet itself sets. It looks for no others in lists.
_KUBELET = "io.kubernetes."


def shorten(shown: cri.PodSandbox | cri.PodSandboxAttributes) -> None:
    """Leave out annotations, which a kubelet takes from the status of a pod, and of very large labels all but its own.

    A pod may have any number of labels.
    """
    shown.ClearField("annotations")
    if sum(len(key) + len(value) for key, value in shown.labels.items()) > _SHORT_LABELS:
        for key in [key for key in shown.labels if not key.startswith(_KUBELET)]:
            del shown.labels[key]


def short_sandbox(record: Sandbox) -> cri.PodSandbox:
    """The short entry of ListPodSandbox."""
    shown = sandbox(record)
    shorten(shown)
    return shown


def short_container(record: Container) -> cri.Container:
    """The short entry of ListContainers: without very large annotations.

    A kubelet keeps the ports and the hooks of a container in them, and reads these from the status. It looks for short
    ones in lists.
    """
    shown = container(record)
    for key, value in list(shown.annotations.items()):
        if len(value) > _SHORT_ANNOTATION:
            del shown.annotations[key]
    return shown


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
    """The sandbox as PodSandboxStatus shows it. The addresses of a stopped one may be another pod's by now."""
    config = record.config
    ips = record.ips if record.state is SandboxState.READY else ()
    first, *others = ips or ("",)
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
        stop_signal=sent.stop_signal or _SIGNALS.get(record.stop_signal, "RUNTIME_DEFAULT"),
    )
    status.image.image = image_name(sent.image)
    if sent.linux.HasField("resources"):
        status.resources.linux.CopyFrom(_in_force(sent.linux.resources, config.resources))
    if record.user is not None:
        user = record.user
        status.user.linux.CopyFrom(cri.LinuxContainerUser(uid=user.uid, gid=user.gid, supplemental_groups=user.groups))
    return status


def image_name(sent: cri.ImageSpec) -> str:
    """The name by which the pod has its image. A kubelet names it by its ID, and says the name beside it."""
    name = sent.user_specified_image
    if not name or is_digest(name):
        return name or sent.image
    return references.full_name(name)


def _in_force(sent: cri.LinuxContainerResources, requested: Resources) -> cri.LinuxContainerResources:
    """The limits as they were sent. If this node enforces another value, that one replaces the sent value."""
    enforced, shown = in_force(requested, host.facts()), cri.LinuxContainerResources()
    shown.CopyFrom(sent)
    shown.cpu_period = enforced.cpu_period
    shown.memory_swap_limit_in_bytes = enforced.memory_swap_limit
    shown.oom_score_adj = enforced.oom_score_adj
    del shown.hugepage_limits[:]
    for size, limit in enforced.hugepage_limits:
        shown.hugepage_limits.add(page_size=size, limit=limit)
    return shown


def event(record: Event) -> cri.ContainerEventResponse:
    """An event, with the statuses of the whole pod."""
    return cri.ContainerEventResponse(
        container_id=record.id,
        container_event_type=_EVENTS[record.type],
        created_at=record.at,
        pod_sandbox_status=sandbox_status(record.sandbox),
        containers_statuses=make_each(record.containers, container_status),
    )


def image(record: Image) -> cri.Image:
    """The image as ListImages and ImageStatus show it."""
    shown = cri.Image(
        id=record.id,
        repo_tags=record.repo_tags,
        repo_digests=record.repo_digests,
        size=record.size,
        pinned=record.pinned,
        spec=cri.ImageSpec(image=record.id),
    )
    match record.user.user:
        case int(number):
            shown.uid.value = number
        case name:
            shown.username = name
    return shown


def exec_result(result: ExecResult) -> bytes:
    """The serialised answer to ExecSync. It is made without a message, which would copy megabytes of output."""
    code = cri.ExecSyncResponse(exit_code=result.code).SerializeToString()
    outputs = ((_STDOUT, result.stdout), (_STDERR, result.stderr))
    return b"".join([part for tag, data in outputs if data for part in (tag, _varint(len(data)), data)] + [code])


def _varint(number: int) -> bytes:
    """A number as a varint of protobuf: seven bits a byte, the lowest first. The eighth bit: more bytes follow."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def info(**facts: Any) -> dict[str, str]:
    """The ``info`` of a verbose answer: one JSON document, as crictl shows it."""
    return {"info": json.dumps(facts)}


def _utf8(text: str) -> str:
    """The text without broken characters, which a runtime's error message may have: a message must be valid UTF-8."""
    return text.encode(errors="replace").decode()


def _pod_metadata(record: Sandbox) -> cri.PodSandboxMetadata:
    config = record.config
    return cri.PodSandboxMetadata(name=config.name, uid=config.uid, namespace=config.namespace, attempt=config.attempt)


def _namespaces(modes: Namespaces) -> cri.NamespaceOption:
    options = cri.NamespaceOption(network=_MODES[modes.network], pid=_MODES[modes.pid], ipc=_MODES[modes.ipc])
    if modes.user is not None:
        options.userns_options.mode = cri.POD
        for mapping, field in ((modes.user.uids, "uids"), (modes.user.gids, "gids")):
            getattr(options.userns_options, field).add(
                container_id=mapping.container_id, host_id=mapping.host_id, length=mapping.length
            )
    return options
