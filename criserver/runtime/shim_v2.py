"""A shim of containerd's kind as its handler has it: how it is found and started, and how it is cleaned up after.

The shim API is containerd's (core/runtime/v2, versions 2 and 3). ``shims/task_shim.py`` speaks it: a shim of ours holds
each container's log and streams, and asks the runtime's shim to run the container.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import structlog

from criserver.config import RuntimeHandler
from criserver.errors import CriError, DeadlineExceededError, FailedPreconditionError, InvalidArgumentError
from criserver.runtime import cgroups, command
from criserver.runtime.shim_options import check, encoded, is_runc
from snapshotter import removal

if TYPE_CHECKING:
    from criserver.runtime.handler_runtime import Ask
    from shims.messages import LaunchConfig, UpdateRequest

log = structlog.get_logger(__name__)

# Kata Containers and tools of containerd know the pods of Kubernetes by this name.
NAMESPACE = "k8s.io"
# The file of shims/task_shim.py.
MARK = "task.json"
# Without it containerd-shim-runc-v2 has one process for all containers with the same sandbox-id.
_GROUP = "io.containerd.runc.v2.group"

# Seconds.
_DELETE_TIMEOUT = 20.0
_FEATURES_TIMEOUT = 10.0
_UPDATE_TIMEOUT = 35.0


def program_name(shim: str) -> str:
    """The program of a shim, which is looked for on PATH, as containerd finds it; an absolute path is one already."""
    return shim if shim.startswith("/") else "containerd-shim-" + "-".join(shim.split(".")[-2:])


@dataclass(frozen=True, slots=True)
class ShimV2:
    """The shim of one handler; the methods are those of :class:`~criserver.runtime.oci_runtime.OciRuntime`.

    ``path`` is its name, such as io.containerd.runc.v2, or its absolute path. ``containers`` is the directory of the
    bundles. ``sandbox`` is the bundle of the pod's sandbox container, whose shim a container is given to.
    """

    handler: str
    path: str
    root: str
    containers: str
    options: Mapping[str, Any]
    sandbox: str = ""

    @property
    def has_signals(self) -> bool:
        """Whether signals for a container are given to the shim; the processes of runc's shim are on the node."""
        return not is_runc(self.path)

    @classmethod
    def of(cls, handler: RuntimeHandler, state: str, roots: str) -> ShimV2:
        """The shim of a configured handler; ``state`` is the daemon's state directory.

        ``roots`` is the directory that has the root directory of each handler.

        Raises InvalidArgumentError for options that the shim does not have.
        """
        try:
            check(handler.shim, handler.options)
        except InvalidArgumentError as e:
            raise InvalidArgumentError(f"[runtimes.{handler.name}.options]: {e}") from e
        root = handler.root or os.path.join(roots, handler.name)
        return cls(handler.name, handler.shim, root, os.path.join(state, "containers"), handler.options)

    def program(self) -> str:
        """The absolute path of the program. Raises FailedPreconditionError where there is none."""
        name = program_name(self.path)
        program = shutil.which(name)
        if program is None:
            raise FailedPreconditionError(
                f"runtime handler {self.handler}: {name} is not an executable; install the runtime that it belongs to, "
                f"or change shim in [runtimes.{self.handler}]"
            )
        return program

    def launch(self, cgroup_parent: str, owner: tuple[int, int] | None = None) -> LaunchConfig:
        """The values that our shim needs to start it. Raises FailedPreconditionError as :meth:`program` does.

        ``owner`` is the user and group to own the standard streams. The shim for runc makes these itself.
        """
        owned = dict(zip(("IoUid", "IoGid"), owner, strict=True)) if owner and is_runc(self.path) else {}
        options = {**owned, **self.options}
        kind, value = encoded(self.path, options, root=self.root, systemd=cgroups.is_slice(cgroup_parent))
        return {
            "runtime_command": [],
            "owner": [],
            "task": {
                "command": [self.program()],
                "namespace": NAMESPACE,
                "options_type": kind,
                "options": value.hex(),
            },
            "task_of": os.path.join(self.sandbox, MARK) if self.sandbox else "",
        }

    def within(self, sandbox_directory: str) -> ShimV2:
        """The same for a container that joins the sandbox container with this bundle."""
        return replace(self, sandbox=sandbox_directory)

    def annotations(self, container_id: str) -> Mapping[str, str]:
        """What the spec of a container has for the shim: each container has a process of the shim for itself."""
        return {_GROUP: container_id}

    def checkpoint_command(
        self,
        container_id: str,
        cgroup_parent: str,  # noqa: ARG002 - of OCI runtimes
        *,
        images: str,  # noqa: ARG002
        work: str,  # noqa: ARG002
    ) -> list[str]:
        """Raises FailedPreconditionError: shims make no archive that a kubelet can use."""
        raise FailedPreconditionError(
            f"container {container_id} cannot be checkpointed: its runtime handler {self.handler} is a shim"
        )

    def has(self, container_id: str) -> bool:
        """Whether the shim may have something of this container."""
        return os.path.exists(self._mark(container_id))

    async def delete(self, container_id: str, cgroup_parent: str) -> bool:  # noqa: ARG002 - of OCI runtimes
        """Have the shim's program clean up after a shim that may be gone. A failure is logged.

        Returns whether another try makes sense.
        """
        if not self.has(container_id):
            return True
        bundle = os.path.join(self.containers, container_id)
        try:
            argv = [
                *(self.program(), "-namespace", NAMESPACE, "-address", "", "-publish-binary", "/bin/true"),
                *("-bundle", bundle, "-id", container_id, "delete"),
            ]
            done = await command.run(argv, _DELETE_TIMEOUT, cwd=bundle)
        except (FailedPreconditionError, OSError) as e:
            reason = str(e) or f"it does not end within {_DELETE_TIMEOUT:g} s"
            log.warning("the delete of a runtime's shim is not possible", container=container_id, error=reason)
            return False
        if done.code:
            log.warning("the delete of a runtime's shim failed", container=container_id, error=done.message)
            return True
        await asyncio.to_thread(self._unmark, container_id)
        return True

    async def forget(self, container_id: str) -> None:
        """Delete the state that is still kept of a container of which nothing runs. Raises CriError."""
        if not self.has(container_id):
            return
        log.warning("the daemon deletes what a runtime's shim keeps of a container", container=container_id)
        try:
            if is_runc(self.path):
                await asyncio.to_thread(removal.remove_path, os.path.join(self.root, NAMESPACE, container_id))
            await asyncio.to_thread(self._unmark, container_id)
        except OSError as e:
            raise CriError(f"what the shim keeps of container {container_id} cannot be deleted: {e}") from e

    async def update(
        self,
        container_id: str,
        cgroup_parent: str,  # noqa: ARG002 - of OCI runtimes
        resources: Mapping[str, object],
        ask: Ask,
    ) -> None:
        """Set limits of a running container. Raises FailedPreconditionError, DeadlineExceededError."""
        request: UpdateRequest = {"op": "update", "resources": dict(resources)}
        outcome = await ask(request, "updated", _UPDATE_TIMEOUT)
        if "error" in outcome:
            kind = DeadlineExceededError if outcome.get("late") else FailedPreconditionError
            raise kind(f"container {container_id} cannot be given these limits: {outcome['error']}")

    async def features(self) -> dict[str, Any] | None:
        """The features that the shim's OCI runtime reports; None if no OCI runtime of the shim is known.

        Raises FailedPreconditionError without a program, and UnavailableError if the OCI runtime may tell later.
        """
        self.program()
        binary = shutil.which(self.options.get("BinaryName") or "runc") if is_runc(self.path) else None
        if binary is None:
            return None
        return await command.report(command.run([binary, "features"], _FEATURES_TIMEOUT), f"{binary} features")

    def _mark(self, container_id: str) -> str:
        return os.path.join(self.containers, container_id, MARK)

    def _unmark(self, container_id: str) -> None:
        """Delete the mark, and the socket that a killed shim of this container alone has left. Blocks."""
        path = self._mark(container_id)
        with suppress(FileNotFoundError):
            with open(path) as f:
                found = json.load(f)
            address = found.get("address", "").removeprefix("unix://")
            if address and not found.get("joined"):
                with suppress(FileNotFoundError):
                    os.unlink(address)
            os.unlink(path)
