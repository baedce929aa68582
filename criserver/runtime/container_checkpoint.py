"""CheckpointContainer: a running container's processes and changed files in an archive; it runs on afterwards.

For the kubelet's checkpoint API (forensic container checkpointing). criu dumps the processes under the OCI runtime;
what else it is to be told (tcp-established) the operator writes into /etc/criu/runc.conf, which runc reads.

The container is frozen from before the dump until its changed files are copied, so that both are of one moment. The
directory of a checkpoint below the root is the intention: where one is found at start-up, its container is thawed.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from criserver.errors import CriError, DeadlineExceededError, FailedPreconditionError, InvalidArgumentError
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups, checkpoint_archive
from criserver.runtime.node import Node
from criserver.runtime.records import Container, ContainerState

log = structlog.get_logger(__name__)

_T = TypeVar("_T")

# Seconds. The kubelet, where its user names no timeout, sends its own for all of CRI, two minutes.
DEFAULT_TIMEOUT = 120.0
RESUME_TIMEOUT = 30.0
_MAX_LOG_TAIL = 64 << 10
_MAX_WORDS = 2000


async def checkpoint_container(node: Node, given: str, location: str, timeout: float) -> None:
    """Write a checkpoint of a running container to the file ``location``, mode 0600; ``timeout`` in seconds.

    Raises InvalidArgumentError for a location that is no absolute path of a file in an existing directory,
    FailedPreconditionError where there is no criu, where it cannot do it, and for a container that does not run,
    and DeadlineExceededError after the timeout, DEFAULT_TIMEOUT where that is 0. After a failure, or when the
    caller gives up, the container runs on and nothing is left of the checkpoint.
    """
    _check_location(location)
    if timeout < 0:
        raise InvalidArgumentError(f"timeout = {timeout:g} is negative; 0 means {DEFAULT_TIMEOUT:g} s")
    container_id = _running(node, given).id
    limit = timeout or DEFAULT_TIMEOUT
    # A task of its own, which is cancelled once at most: a caller gives up while it is undone after the timeout,
    # as the kubelet's deadline is the timeout that it sends, and the lock is held until it is undone.
    work = asyncio.create_task(_locked(node, container_id, location))
    try:
        async with asyncio.timeout(limit):
            await node.finish(_outcome(work))
    except TimeoutError:
        work.cancel()
        await asyncio.wait([work])
        raise DeadlineExceededError(f"the checkpoint of {container_id} was not done within {limit:g} s") from None
    except asyncio.CancelledError:
        work.cancel()
        raise
    log.info("container checkpointed", container=container_id, location=location)


async def recover_checkpoints(node: Node) -> None:
    """Undo the checkpoints that an earlier daemon did not see the end of; a failure is logged."""
    try:
        left = os.listdir(_checkpoints_root(node))
    except FileNotFoundError:
        return
    for container_id in left:
        log.warning("rolling back a checkpoint that was cut off", container=container_id)
        try:
            await _roll_back(node, container_id)
        except Exception:
            log.exception("recovery of a checkpoint failed", container=container_id)


async def _roll_back(node: Node, container_id: str) -> None:
    directory = os.path.join(_checkpoints_root(node), container_id)
    _kill_strays(directory)
    container = node.registry.containers.get(container_id)
    if container is not None and container.state is ContainerState.RUNNING:
        await _resume(node, container)
    await asyncio.to_thread(_discard, directory)


def _check_location(location: str) -> None:
    if not os.path.isabs(location):
        raise InvalidArgumentError(f"location = {location!r} is not an absolute path")
    if not os.path.isdir(os.path.dirname(location)) or os.path.isdir(location):
        raise InvalidArgumentError(f"location = {location!r} does not name a file in a directory that exists")


def _running(node: Node, given: str) -> Container:
    container = node.registry.container(given)
    if container.state is not ContainerState.RUNNING:
        raise FailedPreconditionError(f"container {container.id} is {container.state.value}, not running")
    return container


async def _outcome(work: asyncio.Task[None]) -> None:
    await work


async def _locked(node: Node, container_id: str, location: str) -> None:
    await _check_criu()
    async with node.lock(container_id):
        await _checkpoint(node, _running(node, container_id), location)


async def _check_criu() -> None:
    """Refuse where criu is not installed, or says itself that it cannot work with this kernel."""
    program = shutil.which("criu")
    if program is None:
        raise FailedPreconditionError("CheckpointContainer needs criu, which is not there: install the package criu")
    code, output = await _run(program, "check")
    if code:
        words = _shortened(checkpoint_archive.error_lines(output) or output.splitlines()[-1:])
        raise FailedPreconditionError(f"criu cannot checkpoint on this node, as `criu check` tells: {words}")


async def _checkpoint(node: Node, container: Container, location: str) -> None:
    directory = os.path.join(_checkpoints_root(node), container.id)
    partial = os.path.join(os.path.dirname(location), f".checkpoint-{secrets.token_hex(8)}")
    try:
        _prepare(directory, partial)
        await _dump(node, container, directory)
        content = os.path.join(directory, "content")
        await _in_thread(lambda cut: checkpoint_archive.write_archive(content, container.log_path, partial, cut))
        os.rename(partial, location)
    except OSError as e:
        raise CriError(f"the checkpoint of {container.id} cannot be written: {e}") from e
    finally:
        await asyncio.to_thread(_discard, directory)


def _prepare(directory: str, partial: str) -> None:
    """Make the directory, whose ``content`` becomes the archive's, and the archive, still empty."""
    # What was in the container is for root alone.
    os.makedirs(directory, mode=0o700)
    os.makedirs(os.path.join(directory, "content", "checkpoint"))
    # Not beneath the directory but beside its place to be, so that it can be renamed: _discard finds it by this.
    os.symlink(partial, os.path.join(directory, "partial"))
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _discard(directory: str) -> None:
    """Delete a checkpoint's directory and its unfinished archive; what is gone is no error."""
    try:
        os.unlink(os.readlink(os.path.join(directory, "partial")))
    except FileNotFoundError:
        pass
    shutil.rmtree(directory, ignore_errors=True)


async def _dump(node: Node, container: Container, directory: str) -> None:
    """Put all that the archive is to hold, but for the log, into ``content``, with the container frozen."""
    content = os.path.join(directory, "content")
    _write_records(node, container, content)
    try:
        # Within, as a pause that is cut off may have frozen it.
        await _ask_runtime(node, container, "pause", container.id)
        await _dump_processes(node, container, content)
        upper = os.path.join(node.snapshotter.snapshots()[container.id].path, "fs")
        deleted = await _in_thread(
            lambda cut: checkpoint_archive.write_diff(upper, os.path.join(content, "rootfs-diff.tar"), cut)
        )
    finally:
        await _resume(node, container)
    _write_json(content, "deleted.files", deleted)


async def _dump_processes(node: Node, container: Container, content: str) -> None:
    images = os.path.join(content, "checkpoint")
    options = ("--leave-running", "--file-locks", "--image-path", images, "--work-path", content)
    try:
        await _ask_runtime(node, container, "checkpoint", *options, container.id)
    except FailedPreconditionError as e:
        lines = checkpoint_archive.error_lines(_tail(os.path.join(content, "dump.log")))
        if not lines:
            raise
        raise FailedPreconditionError(f"criu cannot dump container {container.id}: {_shortened(lines)}") from e


def _write_records(node: Node, container: Container, content: str) -> None:
    image = cri.ContainerConfig.FromString(container.sent).image
    runtime = node.handler(node.registry.sandbox(container.sandbox_id).runtime).name
    name = image.user_specified_image or image.image
    _write_json(content, "config.dump", checkpoint_archive.config_dump(container, name, runtime, time.time_ns()))
    _write_json(content, "status", checkpoint_archive.status_dump(container))
    shutil.copyfile(os.path.join(node.container_dir(container.id), "config.json"), os.path.join(content, "spec.dump"))


def _write_json(directory: str, name: str, document: object) -> None:
    with open(os.path.join(directory, name), "w") as f:
        json.dump(document, f)


async def _resume(node: Node, container: Container) -> None:
    """Thaw a container; one that is not frozen is no error. Never raises."""
    try:
        async with asyncio.timeout(RESUME_TIMEOUT):
            await _ask_runtime(node, container, "resume", container.id)
    except TimeoutError:
        log.error("a container could not be thawed in time", container=container.id)  # noqa: TRY400 - no fault of code
    except FailedPreconditionError as e:
        # The runtime's words for one that was never frozen, and for one that has ended, are of this kind too.
        log.info("a container was not thawed", container=container.id, error=str(e))


async def _ask_runtime(node: Node, container: Container, *words: str) -> None:
    """Call the container's OCI runtime. Raises FailedPreconditionError with its last words where it fails."""
    sandbox = node.registry.sandbox(container.sandbox_id)
    runtime = node.handler(sandbox.runtime)
    program = shutil.which(runtime.path)
    if program is None:
        raise FailedPreconditionError(f"runtime handler {runtime.name}: {runtime.path} is not an executable")
    arguments = cgroups.runtime_args(sandbox.cgroup_parent)
    code, output = await _run(program, "--root", node.runtime_root(sandbox.runtime), *arguments, *words)
    if code:
        said = _shortened(output.splitlines()[-1:]) or "it left no message"
        raise FailedPreconditionError(f"{runtime.path} {words[0]} of container {container.id} failed: {said}")


async def _run(*command: str) -> tuple[int, str]:
    """A command's exit code and what it printed; cut off, it is killed with all that it started."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        # A process group of its own: the runtime's end would leave criu at work.
        start_new_session=True,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return process.returncode or 0, output.decode(errors="replace").strip()


async def _in_thread(work: Callable[[threading.Event], _T]) -> _T:
    """Do blocking work that an event cuts short; when this returns, the work has ended."""
    cut = threading.Event()
    task = asyncio.ensure_future(asyncio.to_thread(work, cut))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        cut.set()
        await asyncio.gather(task, return_exceptions=True)
        raise


def _kill_strays(directory: str) -> None:
    """Kill the runtime, with its criu, that an earlier daemon set to work on this checkpoint."""
    wanted = os.fsencode(os.path.join(directory, "content"))
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as f:
                    words = f.read().split(b"\0")
                # The leader of the group that _run made, and not a process that only names the directory.
                if wanted in words and os.getpgid(int(name)) == int(name):
                    os.killpg(int(name), signal.SIGKILL)
            except OSError:
                continue  # it has ended


def _checkpoints_root(node: Node) -> str:
    """Where checkpoints under way are, a directory a container: on disk, as they hold all of its memory."""
    return os.path.join(node.config.root, "checkpoints")


def _tail(path: str) -> str:
    try:
        with open(path, "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - _MAX_LOG_TAIL))
            return f.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _shortened(lines: list[str]) -> str:
    return "; ".join(lines)[:_MAX_WORDS]
