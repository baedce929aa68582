"""The records of sandboxes and containers: the request, the state and the outcome of each, and how they are stored.

A record is frozen. A change of state makes a new record, which replaces the old one in the record store. So code that
holds a record holds the state of one moment. Times are Unix nanoseconds, 0 for an event that has not happened.

Later releases can read what this one stores, on any host: ``parse.py`` accepts every message of the kubelet, and
``migrations.py`` converts the other fields.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from criserver.errors import CriError
from criserver.model import ContainerConfig, NamespaceMode, PodConfig, User
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import migrations
from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.migrations import NewerError, bring_forward, newest
from criserver.runtime.parse import container_config, pod_config
from criserver.store import WRITTEN_BY_NEWER
from criserver.text import shown


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A sandbox's record. ``sent`` is the CRI PodSandboxConfig as the kubelet serialised it.

    ``handler`` is the runtime handler that the kubelet requested, "" for the default one. ``runtime`` is the name of
    the handler that was used, as the default may change later. ``sandbox_container`` says that the handler runs the pod
    as a sandbox container, as the handler may be changed later. ``reason`` says why a pod is not ready. ``boot_id`` is
    the boot in which the pod was made, "" where it is not known.
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
    sandbox_container: bool = False
    reason: str = ""
    boot_id: str = ""

    def not_ready(self, reason: str) -> Sandbox:
        """The record of the pod that is not ready from now on; ``reason`` is for people."""
        return dataclasses.replace(self, state=SandboxState.NOT_READY, reason=reason)

    @property
    def has_infra(self) -> bool:
        """Whether the pod has a process of its own: a sandbox container, or the holder of a shared PID namespace."""
        return self.sandbox_container or self.config.namespaces.pid is NamespaceMode.POD

    @property
    def named(self) -> dict[str, object]:
        """The fields by which a line of the log names the pod."""
        return {"pod": f"{self.config.namespace}/{self.config.name}", "sandbox": self.id}


@dataclass(frozen=True, slots=True)
class Container:
    """A container's record. ``sent`` is the CRI ContainerConfig as the kubelet serialised it.

    ``pid`` and ``start_ticks`` (field 22 of /proc/PID/stat) together identify the first process: the PID alone may be
    another process's by now. ``cgroup_parent`` is what a plugin of the node has put in place of the pod's.
    ``stop_signalled`` says that the stop signal has been sent.
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
    cgroup_parent: str = ""
    stop_signalled: bool = False

    def parent_cgroup(self, sandbox: Sandbox) -> str:
        """The cgroup parent of the container, which is in the pod ``sandbox``."""
        return self.cgroup_parent or sandbox.cgroup_parent

    @property
    def named(self) -> dict[str, object]:
        """The fields by which a line of the log names the container."""
        return {"name": self.config.name, "container": self.id}

    def ended(self, code: int, reason: str, message: str = "", *, finished_at: int = 0) -> Container:
        """The record after the container's end, which is now if ``finished_at`` is 0; ``reason`` is a term of CRI."""
        return dataclasses.replace(
            self,
            state=ContainerState.EXITED,
            exit_code=code,
            reason=reason,
            message=message,
            finished_at=finished_at or time.time_ns(),
        )


Record = Sandbox | Container


class UnreadableError(CriError):
    """This release cannot read a stored record. The message is the end of a sentence that begins with its name."""


def dump(record: Record) -> bytes:
    """The record as it is stored: JSON with the kubelet's message instead of ``config``, which is parsed from it."""
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name != "config"}
    fields["version"] = newest(migrations.SANDBOX if isinstance(record, Sandbox) else migrations.CONTAINER)
    fields["sent"] = base64.b64encode(record.sent).decode()
    fields["state"] = record.state.value
    if isinstance(record, Container) and record.user is not None:
        fields["user"] = dataclasses.asdict(record.user)
    return json.dumps(fields, separators=(",", ":")).encode()


def load_sandbox(stored: bytes) -> Sandbox:
    """The sandbox that :func:`dump` of this or an earlier release wrote. Raises UnreadableError."""
    with _reading():
        fields = bring_forward(json.loads(stored), migrations.SANDBOX)
        fields["sent"] = base64.b64decode(fields["sent"], validate=True)
        fields["ips"] = tuple(fields["ips"])
        fields["state"] = SandboxState(fields["state"])
        config = pod_config(cri.PodSandboxConfig.FromString(fields["sent"]))
        return Sandbox(**fields, config=config)


def load_container(stored: bytes, sandboxes: Mapping[str, Sandbox]) -> Container:
    """The container that :func:`dump` of this or an earlier release wrote; ``sandboxes`` has its sandbox, by ID.

    Raises UnreadableError.
    """
    with _reading():
        fields = bring_forward(json.loads(stored), migrations.CONTAINER)
        if (sandbox := sandboxes.get(fields["sandbox_id"])) is None:
            raise ValueError(f"its pod sandbox {fields['sandbox_id']} has no record")
        fields["sent"] = base64.b64decode(fields["sent"], validate=True)
        fields["state"] = ContainerState(fields["state"])
        if (user := fields["user"]) is not None:
            fields["user"] = User(user["uid"], user["gid"], tuple(user["groups"]))
        config = container_config(cri.ContainerConfig.FromString(fields["sent"]), sandbox.config)
        return Container(**fields, config=config)


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Turn an error of reading a record into UnreadableError, with what the operator can do."""
    try:
        yield
    except NewerError as e:
        raise UnreadableError(f"{e}: {WRITTEN_BY_NEWER}") from e
    except (AttributeError, DecodeError, LookupError, RecursionError, TypeError, ValueError) as e:
        raise UnreadableError(
            f"is damaged ({type(e).__name__}: {shown(e)}); restore an undamaged copy of the database, or "
            "take all pods of the node down with `criserver reset`"
        ) from e
