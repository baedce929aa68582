"""A container's log: where the kubelet wants it, and ReopenContainerLog, when it has moved the file away.

The kubelet names a pod's directory, and there may be links on the way to it. Below it is what pods can write to that
mount the host's logs: there nobody follows a link, neither here nor in the shim.
"""

from __future__ import annotations

import asyncio
import os

from criserver.errors import CriError, FailedPreconditionError
from criserver.runtime.lifecycle import ContainerState
from criserver.runtime.node import Node
from criserver.runtime.records import Container
from shims import logs


async def prepare_log(node: Node, container: Container) -> None:
    """Make the directories of a container's log. Raises FailedPreconditionError where there can be no log file."""
    if container.log_path:
        directory = node.registry.sandbox(container.sandbox_id).config.log_directory
        await asyncio.to_thread(_prepare, directory, container.log_path)


def _prepare(directory: str, path: str) -> None:
    try:
        os.makedirs(directory, mode=0o755, exist_ok=True)
        logs.make_room(path, directory, 0o755)
    except OSError as e:
        raise FailedPreconditionError(f"there can be no log at {path}: {e.strerror}") from e


async def resolved_log(node: Node, container: Container) -> str:
    """The log's path without the links that lead to the pod's directory: all that is left are none of the kubelet's."""
    if not container.log_path:
        return ""
    directory = node.registry.sandbox(container.sandbox_id).config.log_directory
    real = await asyncio.to_thread(os.path.realpath, directory)
    return os.path.join(real, os.path.relpath(container.log_path, directory))


async def reopen_log(node: Node, given: str) -> None:
    """Have the container's shim open its log path anew.

    Raises FailedPreconditionError where it does not run, or where its log cannot be opened: the old file is kept.
    """
    container = node.registry.container(given)
    process = node.processes.get(container.id)
    if container.state is not ContainerState.RUNNING or process is None:
        raise FailedPreconditionError(
            f"container {container.id} is {container.state.value}; only a running one has a log to reopen"
        )
    try:
        await process.request({"op": "reopen"})
    except CriError as e:
        if type(e) is not CriError:
            raise
        # The shim's own words.
        raise FailedPreconditionError(f"the log of container {container.id} cannot be reopened: {e}") from e
