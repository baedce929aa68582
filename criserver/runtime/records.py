"""What became of what was asked: the records of sandboxes and containers, and how they are kept.

A record is frozen: a change of state is a new record that replaces the old one in the registry, so whoever
holds a record holds one moment of it. Times are Unix nanoseconds, 0 where it has not happened.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import json
from dataclasses import dataclass

from criserver.model import ContainerConfig, PodConfig, User
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.parse import container_config, pod_config


class SandboxState(enum.Enum):
    """Where a sandbox is in its life. CREATING and REMOVING are intentions: start-up rolls them back or on."""

    CREATING = "creating"
    READY = "ready"
    NOT_READY = "not-ready"
    REMOVING = "removing"


class ContainerState(enum.Enum):
    """Where a container is in its life. CREATING, STARTING and REMOVING are intentions."""

    CREATING = "creating"
    CREATED = "created"
    STARTING = "starting"
    RUNNING = "running"
    EXITED = "exited"
    REMOVING = "removing"


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A sandbox's record. ``sent`` is the CRI PodSandboxConfig as the kubelet serialised it.

    ``handler`` is what the kubelet asked for, "" for the default one; ``runtime`` the handler that it meant then.
    """

    id: str
    config: PodConfig
    sent: bytes
    handler: str
    state: SandboxState
    created_at: int
    cgroup_parent: str
    cgroup_owned: bool
    runtime: str
    attachment: str = ""
    ips: tuple[str, ...] = ()
    selinux_level: str = ""


@dataclass(frozen=True, slots=True)
class Container:
    """A container's record. ``sent`` is the CRI ContainerConfig as the kubelet serialised it.

    ``pid`` and ``start_ticks`` (field 22 of /proc/PID/stat) together name the first process: a PID alone
    may be another process's by now.
    """

    id: str
    sandbox_id: str
    config: ContainerConfig
    sent: bytes
    image_id: str
    image_ref: str
    state: ContainerState
    created_at: int
    log_path: str
    stop_signal: int
    user: User | None = None
    pid: int = 0
    start_ticks: int = 0
    started_at: int = 0
    finished_at: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""


Record = Sandbox | Container


def dump(record: Record) -> bytes:
    """The record as it is stored: JSON with the kubelet's own message in it instead of our reading of it."""
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name != "config"}
    fields["sent"] = base64.b64encode(record.sent).decode()
    fields["state"] = record.state.value
    if isinstance(record, Container) and record.user is not None:
        fields["user"] = dataclasses.asdict(record.user)
    return json.dumps(fields, separators=(",", ":")).encode()


def load_sandbox(stored: bytes) -> Sandbox:
    """The sandbox that :func:`dump` wrote."""
    fields = json.loads(stored)
    sent = base64.b64decode(fields["sent"])
    fields["ips"] = tuple(fields["ips"])
    fields["state"] = SandboxState(fields["state"])
    config = pod_config(cri.PodSandboxConfig.FromString(sent))
    return Sandbox(**{**fields, "sent": sent, "config": config})


def load_container(stored: bytes, pod: PodConfig) -> Container:
    """The container of ``pod`` that :func:`dump` wrote."""
    fields = json.loads(stored)
    sent = base64.b64decode(fields["sent"])
    fields["state"] = ContainerState(fields["state"])
    if (user := fields["user"]) is not None:
        fields["user"] = User(user["uid"], user["gid"], tuple(user["groups"]))
    config = container_config(cri.ContainerConfig.FromString(sent), pod)
    return Container(**{**fields, "sent": sent, "config": config})
