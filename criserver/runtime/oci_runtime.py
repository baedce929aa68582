"""An OCI runtime as its handler has it: the program, its root directory, and the command line of every verb.

Shims call the runtime too: to run a container, to run a command in one, and to delete one. ``shims/runtime.py`` has
these verbs; the daemon gives it the command before them. Verbs and options are those of runc(8) and crun(1).
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from criserver.config import RuntimeHandler
from criserver.errors import CriError, DeadlineExceededError, FailedPreconditionError
from criserver.runtime import cgroups, command
from criserver.runtime.command import Done
from criserver.telemetry import operations
from snapshotter import mounts, removal

if TYPE_CHECKING:
    from criserver.runtime.handler_runtime import Ask
    from shims.messages import LaunchConfig

log = structlog.get_logger(__name__)

# Seconds.
# A delete takes milliseconds. The daemon does the work itself after this, and the kubelet waits two minutes for it all.
_DELETE_TIMEOUT = 10.0
_FEATURES_TIMEOUT = 10.0
_UPDATE_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class OciRuntime:
    """The OCI runtime of one handler.

    ``root`` is where the runtime keeps its state, apart from that of any other user of the program on this node.
    ``args`` are the handler's own options, before any verb.
    """

    handler: str
    path: str
    root: str
    args: tuple[str, ...] = ()
    has_signals: bool = False

    @classmethod
    def of(cls, handler: RuntimeHandler, roots: str) -> OciRuntime:
        """The runtime of a configured handler. ``roots`` is the directory that has each handler's root."""
        root = handler.root or os.path.join(roots, handler.name)
        return cls(handler.name, handler.path, root, handler.args)

    def program(self) -> str:
        """The absolute path of the program. Raises FailedPreconditionError where there is none."""
        program = shutil.which(self.path)
        if program is None:
            raise FailedPreconditionError(
                f"runtime handler {self.handler}: {self.path} is not an executable; install it or change its path in "
                f"[runtimes.{self.handler}]"
            )
        return program

    def command(self, cgroup_parent: str) -> list[str]:
        """The program with the options that precede every verb for a container below this cgroup parent.

        Raises FailedPreconditionError as :meth:`program` does.
        """
        driver = ["--systemd-cgroup"] if cgroups.is_slice(cgroup_parent) else []
        return [self.program(), "--root", self.root, *driver, *self.args]

    def launch(self, cgroup_parent: str, owner: tuple[int, int] | None = None) -> LaunchConfig:
        """The values that a shim needs to call it. Raises FailedPreconditionError as :meth:`program` does.

        ``owner`` is the user and group to own the standard streams, where the runtime cannot see to it.
        """
        return {"runtime_command": self.command(cgroup_parent), "owner": list(owner or ())}

    def within(self, sandbox_directory: str) -> OciRuntime:  # noqa: ARG002 - of shims
        """The same for a container that joins a sandbox container, which it finds by the annotations of the spec."""
        return self

    def annotations(self, container_id: str) -> Mapping[str, str]:  # noqa: ARG002 - of shims
        """What the spec of a container has for the runtime's own shim; OCI runtimes have none."""
        return {}

    def run_command(self, container_id: str, cgroup_parent: str, *, bundle: str) -> list[str]:
        """The command that runs a container and ends with it; for trials, as shims run the containers of pods."""
        return [*self.command(cgroup_parent), "run", "--bundle", bundle, container_id]

    def delete_command(self, container_id: str, cgroup_parent: str) -> list[str]:
        """The command that ends what runs of a container and deletes it."""
        return [*self.command(cgroup_parent), "delete", "--force", container_id]

    def checkpoint_command(self, container_id: str, cgroup_parent: str, *, images: str, work: str) -> list[str]:
        """The command that has criu dump a container, which runs on.

        ``images`` is the directory for the dump, ``work`` the directory for criu's log.
        """
        options = ["--leave-running", "--file-locks", "--image-path", images, "--work-path", work]
        return [*self.command(cgroup_parent), "checkpoint", *options, container_id]

    def has(self, container_id: str) -> bool:
        """Whether the runtime keeps a state of this container."""
        return os.path.isdir(os.path.join(self.root, container_id))

    async def delete(self, container_id: str, cgroup_parent: str) -> bool:
        """End what runs of a container and delete it; nothing where the runtime has none. A failure is logged.

        Returns whether another try makes sense: not with a program that hangs or cannot be started.
        """
        if not self.has(container_id):
            return True
        try:
            done = await self._call("delete", self.delete_command(container_id, cgroup_parent), _DELETE_TIMEOUT)
        except (FailedPreconditionError, OSError) as e:
            # TimeoutError is an OSError without a text.
            reason = str(e) or f"it does not end within {_DELETE_TIMEOUT:g} s"
            log.warning("runtime delete is not possible", container=container_id, error=reason)
            return False
        # The container's shim may have been as quick with the same. Then there is nothing left to delete.
        if done.code and self.has(container_id):
            log.warning("runtime delete failed", container=container_id, error=done.message)
        return True

    async def forget(self, container_id: str) -> None:
        """Delete the state that the runtime still keeps of a container of which nothing runs. Raises CriError.

        Without this a runtime that cannot delete would keep the state for ever, as the container's record goes.
        """
        if not self.has(container_id):
            return
        log.warning("the daemon deletes what the runtime keeps of a container", container=container_id)
        directory = os.path.join(self.root, container_id)
        try:
            await asyncio.to_thread(_delete_state, directory)
        except OSError as e:
            raise CriError(f"{directory} cannot be deleted: {e}") from e

    async def update(
        self,
        container_id: str,
        cgroup_parent: str,
        resources: Mapping[str, object],
        ask: Ask | None = None,  # noqa: ARG002 - of shims
    ) -> None:
        """Set limits of a running container: ``resources`` is LinuxResources of the runtime specification.

        Nothing is asked of the container's shim.

        Raises FailedPreconditionError where the runtime refuses or fails, DeadlineExceededError where it hangs.
        """
        argv = [*self.command(cgroup_parent), "update", "--resources", "-", container_id]
        try:
            done = await self._call("update", argv, _UPDATE_TIMEOUT, stdin=json.dumps(resources).encode())
        except TimeoutError:
            raise DeadlineExceededError(
                f"{self.path} did not update {container_id} within {_UPDATE_TIMEOUT:g} s"
            ) from None
        if done.code:
            lines = done.message.splitlines() or ["it left no message"]
            raise FailedPreconditionError(f"container {container_id} cannot be given these limits: {lines[-1]}")

    async def _call(self, verb: str, argv: Sequence[str], timeout: float, *, stdin: bytes = b"") -> Done:
        """As :func:`command.run`."""
        with operations.RUNTIME.timed(self.handler, verb) as timed:
            done = await command.run(argv, timeout, stdin=stdin)
            if done.code:
                timed.fail(done.message)
            return done

    async def features(self) -> dict[str, Any] | None:
        """The features that the runtime reports (runtime specification, features.md).

        None where the runtime does not tell, as runc before 1.1. Raises FailedPreconditionError without a program, and
        UnavailableError if it may tell later.
        """
        call = self._call("features", [self.program(), "features"], _FEATURES_TIMEOUT)
        return await command.report(call, f"{self.path} features")


def _delete_state(directory: str) -> None:
    """Delete a container's directory below the runtime's root. Raises OSError."""
    # A runc that was killed may have left a mount of its own program there.
    for point in mounts.mounts_below(directory):
        mounts.unmount(point)
    removal.remove_path(directory)
