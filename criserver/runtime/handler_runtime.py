"""What runs the containers of a handler: an OCI runtime's command line, or a shim of containerd's kind.

A :class:`~criserver.runtime.container_process.ContainerProcess` has one of them, which the handler chooses.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from shims.messages import LaunchConfig, ShimMessage, UpdateRequest

    Ask = Callable[[UpdateRequest, str, float], Awaitable[ShimMessage]]
    """Sends a request to the container's shim, and waits so many seconds for an event of this name."""


class HandlerRuntime(Protocol):
    """The runtime of one handler. :class:`~criserver.runtime.oci_runtime.OciRuntime` says what each method does.

    Attributes:
        handler: the name of the handler.
        path: the program, as the configuration has it.
        root: where the runtime keeps its state.
        has_signals: whether signals for a container are given to its shim, as its process may be out of reach.

    """

    @property
    def handler(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def root(self) -> str: ...
    @property
    def has_signals(self) -> bool: ...

    def program(self) -> str: ...
    def launch(self, cgroup_parent: str, owner: tuple[int, int] | None = None) -> LaunchConfig: ...
    def within(self, sandbox_directory: str) -> HandlerRuntime: ...
    def annotations(self, container_id: str) -> Mapping[str, str]: ...
    def checkpoint_command(self, container_id: str, cgroup_parent: str, *, images: str, work: str) -> list[str]: ...
    def has(self, container_id: str) -> bool: ...
    async def delete(self, container_id: str, cgroup_parent: str) -> bool: ...
    async def forget(self, container_id: str) -> None: ...
    async def update(
        self, container_id: str, cgroup_parent: str, resources: Mapping[str, object], ask: Ask
    ) -> None: ...
    async def features(self) -> dict[str, Any] | None: ...
