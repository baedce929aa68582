"""A container's log: its path, and ReopenContainerLog, which the kubelet calls when it has moved the file away.

The kubelet names a pod's log directory. The path to that directory may have symbolic links. Pods that mount the host's
logs can write below the directory, so neither the daemon nor a shim follows a link there.
"""

from __future__ import annotations

import os

from criserver.errors import CriError, FailedPreconditionError
from criserver.runtime.lifecycle import ContainerState
from criserver.runtime.node import Node
from criserver.runtime.records import Container
from shims import log_writer
from snapshotter.threads import Threads, in_thread

# Making directories on a disk of logs that stands still holds these threads, and none of the pool that all else needs.
# RunPodSandbox writes the files of a pod in them too, so it then waits as CreateContainer does.
log_directories = Threads(4, "log-directories")


async def prepare_log(node: Node, container: Container) -> str:
    """Make the directories of a container's log. Somebody may delete them at any time.

    Returns the log's path, "" for a container without a log. The links that lead to the pod's log directory are
    resolved in it. Those below that directory stay as they are. Raises FailedPreconditionError where there can be no
    log file.
    """
    if not container.log_path:
        return ""
    directory = node.records.sandbox(container.sandbox_id).config.log_directory
    return await in_thread(_prepare, directory, container.log_path, executor=log_directories)


def _prepare(directory: str, path: str) -> str:
    try:
        os.makedirs(directory, mode=0o755, exist_ok=True)
        log_writer.make_room(path, directory, 0o755)
    except OSError as e:
        raise FailedPreconditionError(f"there can be no log at {path}: {e.strerror}") from e
    return os.path.join(os.path.realpath(directory), os.path.relpath(path, directory))


async def reopen_log(node: Node, id_or_prefix: str) -> None:
    """Have the container's shim open its log path again.

    Raises FailedPreconditionError where the container does not run, where it has no shim, and where the log cannot be
    opened. The shim then goes on with the old file.
    """
    container = node.records.container(id_or_prefix)
    if container.state is not ContainerState.RUNNING:
        raise FailedPreconditionError(
            f"container {container.id} is {container.state.value}; only a running one has a log to reopen"
        )
    process = node.processes.get(container.id)
    if process is None or not process.shim.connected:
        raise FailedPreconditionError(
            f"container {container.id} runs, but its shim is gone or cannot be reached: its log cannot be reopened"
        )
    await prepare_log(node, container)
    try:
        await process.shim.request({"op": "reopen"})
    except CriError as e:
        if type(e) is not CriError:
            raise
        # This class is for refusals by the shim itself; its subclasses are for a shim that is gone or stuck.
        raise FailedPreconditionError(f"the log of container {container.id} cannot be reopened: {e}") from e
