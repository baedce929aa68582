"""CheckpointContainer: a running container's processes and changed files are written to an archive. It goes on.

The kubelet's checkpoint API calls it (forensic container checkpointing). The OCI runtime has criu dump the processes.
The operator writes further options of criu (tcp-established) into /etc/criu/runc.conf, which runc reads.

The container is frozen before the dump and thawed when its changed files are copied, so that both show one moment. One
blocking function in a thread does all of that: a task could be cancelled before it has thawed the container. The
checkpoint's directory below the root is its intention: start-up thaws the container of each that it finds. If a
checkpoint cannot be undone, such as when no descriptor is left, that is tried again until it is done.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable

import structlog

from criserver.errors import (
    AlreadyExistsError,
    CriError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotSupportedError,
    ResourceExhaustedError,
)
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups, process_records, strays
from criserver.runtime.container_process import Checkpoint, ContainerProcess
from criserver.runtime.lifecycle import ContainerState
from criserver.runtime.node import Node
from criserver.runtime.pod_namespaces import network_pin
from criserver.runtime.records import Container
from criserver.runtime.spec_file import spec_path
from criserver.telemetry import operations
from criserver.text import quoted
from snapshotter import removal
from snapshotter.files import make_private
from snapshotter.tasks import outlive
from snapshotter.threads import Threads

log = structlog.get_logger(__name__)

# Seconds. Without a timeout of its user the kubelet sends that of all its CRI calls, two minutes.
DEFAULT_TIMEOUT = 120.0
_LOOK = 0.005
_THAW_PAUSES = (0.1, 0.2, 0.5)
_MAX_WORDS = 2000
# The OCI runtime and criu have this variable in their environment. Its value is the checkpoint's directory.
_VARIABLE = "CRISERVER_CHECKPOINT"
# More threads than a node has containers, so that no checkpoint waits for another.
_threads = Threads(1024, "checkpoint")
# criu blocks the pod's network by rules while it dumps. A criu that is killed leaves the rules.
_UNLOCK = """
for iptables in iptables ip6tables; do
    for chain in INPUT OUTPUT; do while $iptables -w 5 -D $chain -j CRIU; do :; done; done
    $iptables -w 5 -F CRIU && $iptables -w 5 -X CRIU
done
nft list tables | while read -r _ family name; do
    case $name in CRIU-*) nft delete table "$family" "$name" ;; esac
done
"""


class _NotUndoneError(CriError):
    """A container could not be thawed, or its pod's network not be unblocked."""


async def checkpoint_container(node: Node, id_or_prefix: str, location: str, timeout: float) -> None:
    """Write a checkpoint of a running container to the file ``location``, mode 0600; ``timeout`` in seconds.

    The checkpoint goes on where the caller gives up, and the same request again waits for it. Raises
    AlreadyExistsError while a checkpoint to another location is under way; InvalidArgumentError for a location that is
    not the absolute path of a file in an existing directory; NotSupportedError without a criu that works on this node;
    FailedPreconditionError where criu fails, and for a container that does not run or is being stopped;
    DeadlineExceededError after the timeout (DEFAULT_TIMEOUT for 0). After a failure the container runs on and nothing
    is left of the checkpoint.
    """
    if timeout < 0:
        raise InvalidArgumentError(f"timeout = {timeout:g} is negative; 0 means {DEFAULT_TIMEOUT:g} s")
    container_id = node.records.container(id_or_prefix).id
    process = node.processes.get(container_id)
    checkpoint = None if process is None else process.checkpoint
    if checkpoint is None:
        _check_location(location)
        process = process_records.of_container(node, _running(node, container_id))
        checkpoint = process.checkpoint = Checkpoint(location)
        checkpoint.task = node.begin(_checkpoint(node, process, checkpoint, timeout or DEFAULT_TIMEOUT))
    elif checkpoint.location != location:
        raise AlreadyExistsError(
            f"container {container_id} is being checkpointed to {checkpoint.location}; wait for that"
        )
    assert checkpoint.task is not None
    await outlive(checkpoint.task)


def checkpoints(node: Node) -> list[str]:
    """The IDs of the containers that have a checkpoint under way, or one that an earlier daemon did not finish."""
    try:
        return os.listdir(_directory(node))
    except (FileNotFoundError, NotADirectoryError):
        return []


async def recover_checkpoint(node: Node, container_id: str) -> None:
    """Undo the checkpoint of a container that an earlier daemon did not finish; a failure is logged."""
    if not os.path.lexists(_directory(node, container_id)):
        return
    log.warning("undoing a checkpoint that was cut off", container=container_id)
    try:
        await strays.wait(_VARIABLE, _directory(node, container_id))
        await _undo_rest(node, container_id)
    except Exception:
        log.exception("recovery of a checkpoint failed", container=container_id)
        _undo_later(node, container_id)


def _undo_later(node: Node, container_id: str) -> None:
    async def undo() -> None:
        process = node.processes.get(container_id)
        # A new checkpoint that is under way undoes what is left of the last one too.
        if process is None or process.checkpoint is None:
            await _undo_rest(node, container_id)

    node.try_again(container_id, undo, "a checkpoint cannot be undone")


async def _undo_rest(node: Node, container_id: str) -> None:
    """Undo what is left of a checkpoint. Raises OSError, and CriError if something cannot be undone now."""
    if (container := node.records.containers.get(container_id)) is not None:
        try:
            await asyncio.to_thread(_undo, node, container)
        except _NotUndoneError:
            raise
        except CriError as e:
            # Another program has frozen it.
            log.warning("the container of a checkpoint stays frozen", container=container_id, error=str(e))
    await asyncio.to_thread(_discard, _directory(node, container_id))


async def discard_rest(node: Node, container_id: str) -> None:
    """Delete what is left of a container's checkpoints, whose own deletion has failed. Raises CriError."""
    directory = _directory(node, container_id)
    if os.path.lexists(directory):
        try:
            await asyncio.to_thread(_discard, directory)
        except OSError as e:
            raise CriError(f"{directory} cannot be deleted: {e}") from e


def _check_location(location: str) -> None:
    if not os.path.isabs(location) or "\0" in location:
        raise InvalidArgumentError(f"location = {quoted(location)} is not an absolute path")
    if not os.path.isdir(os.path.dirname(location)):
        raise InvalidArgumentError(f"location = {quoted(location)} is not in a directory that exists")
    if os.path.lexists(location) and not os.path.isfile(location):
        raise InvalidArgumentError(f"location = {quoted(location)} is there already, and no file")


def _running(node: Node, container_id: str) -> Container:
    container = node.records.container(container_id)
    if container.state is not ContainerState.RUNNING:
        raise FailedPreconditionError(f"container {container_id} is {container.state.value}, not running")
    if process_records.of_container(node, container).stopping:
        raise FailedPreconditionError(f"container {container_id} is being stopped")
    return container


async def _checkpoint(node: Node, process: ContainerProcess, checkpoint: Checkpoint, timeout: float) -> None:
    """All of it, also where its caller has given up."""
    container_id = process.id
    deadline = time.monotonic() + timeout

    def wait(seconds: float = 0.0) -> None:
        if checkpoint.cut.wait(seconds):
            raise FailedPreconditionError(f"the checkpoint of {container_id} was cut short: container or daemon stops")
        if time.monotonic() > deadline:
            raise DeadlineExceededError(f"the checkpoint of {container_id} was not done within {timeout:g} s")

    loop = asyncio.get_running_loop()
    undone = True
    try:
        async with node.lock(container_id):
            container = _running(node, container_id)
            await loop.run_in_executor(_threads, _dump, node, container, wait)
        checkpoint.thawed = True
        await loop.run_in_executor(_threads, _archive, node, container, checkpoint.location, wait)
        log.info("container checkpointed", container=container_id, location=checkpoint.location)
    except (CriError, OSError) as e:
        log.warning("container not checkpointed", container=container_id, error=str(e))
        undone = not isinstance(e, _NotUndoneError)
        if isinstance(e, CriError):
            raise
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (ResourceExhaustedError if full else CriError)(f"the checkpoint of {container_id} failed: {e}") from e
    finally:
        try:
            if undone:
                await loop.run_in_executor(_threads, _discard, _directory(node, container_id))
        except OSError as e:
            log.warning("parts of a checkpoint are deleted later", container=container_id, error=str(e))
            undone = False
        finally:
            process.checkpoint = None
            if not undone:
                _undo_later(node, container_id)


def _dump(node: Node, container: Container, wait: Callable[..., None]) -> None:
    """Write all parts of the archive but the log into the directory. The container runs afterwards."""
    from criserver.runtime import checkpoint_archive  # with tarfile, for the few nodes that make checkpoints

    directory = _directory(node, container.id)
    content, images = os.path.join(directory, "content"), os.path.join(directory, "content", "checkpoint")
    sandbox = node.records.sandbox(container.sandbox_id)
    runtime = node.runtime(sandbox.runtime)
    command = runtime.checkpoint_command(container.id, container.parent_cgroup(sandbox), images=images, work=content)
    _discard(directory)
    # The container's memory is for root alone.
    make_private(images)
    image = cri.ContainerConfig.FromString(container.sent).image
    name = image.user_specified_image or image.image
    config = checkpoint_archive.config_dump(container, name, runtime.handler, time.time_ns())
    _write_json(content, "config.dump", config)
    _write_json(content, "status", checkpoint_archive.status_dump(container))
    shutil.copyfile(spec_path(node, container.id), os.path.join(content, "spec.dump"))
    _check_criu(directory, container.id, wait)
    upper = os.path.join(node.snapshotter.snapshots()[container.id].path, "fs")
    diff = os.path.join(content, "rootfs-diff.tar")
    try:
        cgroups.freeze(cgroups.path(container.parent_cgroup(sandbox), container.id), wait)
        with operations.RUNTIME.timed(runtime.handler, "checkpoint"):
            if _run(directory, wait, *command):
                words = _criu_errors(os.path.join(content, "dump.log"), os.path.join(directory, "output"))
                raise FailedPreconditionError(f"criu cannot dump container {container.id}: {words}")  # noqa: TRY301 - undone below
        deleted = checkpoint_archive.write_diff(upper, diff, sandbox.config.namespaces.user, wait)
    except BaseException:
        _undo(node, container)
        raise
    _thaw(node, container)
    _write_json(content, "deleted.files", deleted)


def _undo(node: Node, container: Container) -> None:
    """End the programs of a dump, thaw its container, and unblock its pod's network.

    Raises _NotUndoneError if that is not possible now: then the directory stays, by which it is tried again. Raises
    CriError if another program freezes the container again.
    """
    try:
        strays.kill(_VARIABLE, _directory(node, container.id))
        try:
            _thaw(node, container)
        finally:
            network = network_pin(node, container.sandbox_id)
            if os.path.exists(network):
                command = ("timeout", "20", "nsenter", f"--net={network}", "sh", "-c", _UNLOCK)
                subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError as e:
        raise _NotUndoneError(f"the checkpoint of {container.id} cannot be undone now; that is tried again: {e}") from e


def _thaw(node: Node, container: Container) -> None:
    """Thaw a container. If the node lacks something, such as descriptors, try again a few times. Raises as _undo."""
    parent = container.parent_cgroup(node.records.sandbox(container.sandbox_id))
    for pause in (*_THAW_PAUSES, None):
        try:
            cgroups.thaw(cgroups.path(parent, container.id))
        except OSError as e:
            if pause is None:
                words = f"container {container.id} is frozen, and cannot be thawed now; that is tried again: {e}"
                raise _NotUndoneError(words) from e
            time.sleep(pause)
        else:
            return


def _check_criu(directory: str, container_id: str, wait: Callable[..., None]) -> None:
    """Raises NotSupportedError where criu is not installed, or says that it cannot work with this kernel.

    By the code UNKNOWN and the first words Kubernetes' node tests see that a runtime cannot make checkpoints.
    """
    known = f"CRIU binary not found or too old (<31600). Failed to checkpoint container {container_id}"
    if shutil.which("criu") is None:
        raise NotSupportedError(f"{known}: CheckpointContainer needs criu: install the package criu")
    if _run(directory, wait, "criu", "check"):
        words = _criu_errors(os.path.join(directory, "output"))
        raise NotSupportedError(
            f"{known}: criu cannot work on this node; is it older than the kernel? It says: {words}"
        )


def _run(directory: str, wait: Callable[..., None], *command: str) -> int:
    """Run a command; returns its exit code. Its output is in ``output``. A command that fails leaves nothing."""
    with open(os.path.join(directory, "output"), "wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, _VARIABLE: directory},
            start_new_session=True,
        )
    code = None
    try:
        while (code := process.poll()) is None:
            wait(_LOOK)
    finally:
        if code != 0:
            strays.kill(_VARIABLE, directory)
            process.poll()
    return code


def _criu_errors(*paths: str) -> str:
    """criu's first errors, of the first file that has any: they cause the others. Else the last line of the files."""
    last = ""
    for path in paths:
        if os.path.exists(path):
            with open(path, errors="replace") as f:
                lines = [line.strip() for line in itertools.islice(f, 100000)]
            if errors := [line[line.index("Error (") :] for line in lines if "Error (" in line]:
                return "; ".join(errors[:5])[:_MAX_WORDS]
            last = lines[-1] if lines else last
    return last[:_MAX_WORDS] or "it left no message"


def _archive(node: Node, container: Container, location: str, wait: Callable[..., None]) -> None:
    """Write the archive beside its location, and rename it to that."""
    from criserver.runtime import checkpoint_archive

    directory = _directory(node, container.id)
    partial = os.path.join(os.path.dirname(location), f".checkpoint-{secrets.token_hex(8)}")
    # _discard finds it by this.
    os.symlink(partial, os.path.join(directory, "partial"))
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    checkpoint_archive.write_archive(os.path.join(directory, "content"), container.log_path, partial, wait)
    os.rename(partial, location)


def _discard(directory: str) -> None:
    """Delete a checkpoint's directory and its unfinished archive. What is gone is no error. Raises OSError."""
    try:
        partial = os.readlink(os.path.join(directory, "partial"))
        os.unlink(partial)
    except OSError as e:
        # EINVAL: it is no link. ENOTDIR: there is no directory.
        if e.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EINVAL):
            raise
    removal.remove_path(directory)


def _directory(node: Node, container_id: str = "") -> str:
    """Where a checkpoint's parts are while it is made. It is on disk, as it has all of the container's memory."""
    return os.path.join(node.config.root, "checkpoints", container_id)


def _write_json(directory: str, name: str, document: object) -> None:
    with open(os.path.join(directory, name), "w") as f:
        json.dump(document, f)
