"""StartContainer: a shim is forked, and it runs the bundle with one call of the OCI runtime."""

from __future__ import annotations

import dataclasses
from contextlib import suppress

import structlog

from criserver.errors import CriError, FailedPreconditionError, NotFoundError
from criserver.runtime import pidfd, process_records
from criserver.runtime.container_log import prepare_log
from criserver.runtime.container_process import ContainerProcess
from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.node import Node
from criserver.runtime.pod_namespaces import give_up_if_lost, stream_owner
from criserver.runtime.records import Container

log = structlog.get_logger(__name__)


async def start_container(node: Node, id_or_prefix: str) -> None:
    """Start a created container. Raises FailedPreconditionError for one in any other state.

    A container whose process cannot be started becomes exited with code 128 and reason StartError, which the kubelet
    shows; the error has the OCI runtime's own message. A container that is stopped or removed meanwhile ends likewise.
    """
    container_id = node.records.container(id_or_prefix).id
    await node.attempts.run(f"start {container_id}", b"", lambda: _start(node, container_id))


async def _start(node: Node, container_id: str) -> str:
    process = process_records.of_container(node, node.records.container(container_id))
    # From here on StopContainer can end this start, also while it waits for the lock.
    with process.start_under_way():
        await _start_in_turn(node, container_id, process)
    await node.records.written(container_id)
    return container_id


async def _start_in_turn(node: Node, container_id: str, process: ContainerProcess) -> None:
    async with node.lock(container_id):
        container = node.records.container(container_id)
        if container.state is not ContainerState.CREATED:
            raise FailedPreconditionError(f"container {container_id} is {container.state.value}, not created")
        sandbox = node.records.sandbox(container.sandbox_id)
        if sandbox.state is not SandboxState.READY:
            raise FailedPreconditionError(f"pod sandbox {sandbox.id} is {sandbox.state.value}; run a new one")
        node.handler(sandbox.runtime)  # raises where the handler has left the configuration
        container = dataclasses.replace(container, state=ContainerState.STARTING)
        await node.records.save(container)
        try:
            _check_target(node, container)
            await node.plugins.start_container(container)
            await process.start(
                log_path=await prepare_log(node, container),
                max_line=node.config.max_container_log_line_size,
                tty=container.config.tty,
                stdin=container.config.stdin,
                owner=stream_owner(sandbox, container.user),
            )
        except CriError as e:
            # The OCI runtime only says that it cannot fork. That is what happens in the PID namespace of a container
            # that has ended.
            error: CriError = e
            with suppress(OSError):  # no descriptor is left to look
                error = _target_ended(node, container) or e
            process.start_failed(str(error))
            node.background(give_up_if_lost(node, sandbox.id), "a pod cannot be checked after a failed start")
            raise type(error)(f"container {container.config.name} cannot be started: {error}") from e
        except Exception as e:
            # The node has run out of descriptors, for example. The container must not stay in STARTING: no call but its
            # removal would be possible.
            await fail(node, process, str(e))
            raise
        await node.plugins.container_started(container)


async def fail(node: Node, process: ContainerProcess, reason: str) -> None:
    """End a start, and let its container be exited.

    If it cannot be ended, such as when no descriptor is left, that is tried again until it is done. The container is
    STARTING until then.
    """

    async def end() -> None:
        container = node.records.containers.get(process.id)
        # It may have been stopped or removed meanwhile.
        if container is not None and container.state is ContainerState.STARTING:
            await process.end_start()
            process.start_failed(reason)

    try:
        await end()
    except Exception:
        what = "a failed start cannot be ended"
        log.exception(what, container=process.id)
        node.try_again(process.id, end, what)


def _check_target(node: Node, container: Container) -> None:
    if (ended := _target_ended(node, container)) is not None:
        raise ended


def _target_ended(node: Node, container: Container) -> FailedPreconditionError | None:
    """The error where the container is to see the processes of another that does not run any more."""
    target = container.config.namespaces.target
    if not target:
        return None
    with suppress(NotFoundError):
        found = node.records.container(target)
        if found.state is ContainerState.RUNNING and pidfd.start_ticks(found.pid) == found.start_ticks:
            return None
    return FailedPreconditionError(f"its target container {target} has ended: nothing can be started beside it")
