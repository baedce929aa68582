"""A command in a running container, beside the container's own process.

The shim starts the command and sees its end. The command's standard streams are pipes of the daemon or a terminal: no
byte of them passes through the shim. The command is killed when the caller that asked for it gives up.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from criserver.errors import (
    CriError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    UnavailableError,
)
from criserver.oci import spec
from criserver.runtime import process_records
from criserver.runtime.lifecycle import ContainerState
from criserver.runtime.node import Node
from criserver.runtime.pod_namespaces import stream_owner
from criserver.runtime.records import Container
from criserver.runtime.spec_file import read_spec, spec_size
from criserver.streaming import ready
from criserver.telemetry import families
from criserver.text import quoted
from snapshotter.threads import Threads, in_thread

if TYPE_CHECKING:
    from shims.messages import ExecRequest, ShimMessage

_numbers = itertools.count(1)
# Bytes of a spec that takes so long to read that a thread does it. Most specs have some 10 KB; an image may have
# megabytes of environment variables.
_LARGE_SPEC = 256 << 10
# Specs are on the state directory's tmpfs. The threads of the pool may all wait for a disk that stands still.
_writers = Threads(2, "exec-specs")
# The first version of shims that tell when a command runs.
_TELLS_START = 2


def running_container(node: Node, id_or_prefix: str) -> Container:
    """The container by its ID, where it runs. Raises NotFoundError, FailedPreconditionError."""
    container = node.records.container(id_or_prefix)
    if container.state is not ContainerState.RUNNING:
        raise FailedPreconditionError(f"container {container.id} is {container.state.value}, not running")
    return container


@dataclass(frozen=True, slots=True)
class ExecProcess:
    """A command that the shim was asked for.

    ``started`` is done once the command runs. Where the shim does not tell that, it is done from the beginning.
    ``ended`` is its exit code: 128 + a signal's number if one killed it.
    """

    started: asyncio.Future[None]
    ended: asyncio.Future[int]


@asynccontextmanager
async def exec_process(
    node: Node, container: Container, command: Sequence[str], *, stdio: Sequence[int] = (), console: str = ""
) -> AsyncIterator[ExecProcess]:
    """Start a command in a running container.

    ``stdio`` are its standard input, output and error, which stay the caller's to close; or ``console`` is the path
    of a socket to which the OCI runtime sends its terminal. ``ended`` raises FailedPreconditionError where the command
    cannot be run, DeadlineExceededError where the OCI runtime hangs. When the context ends, the command's process group
    is killed, or the OCI runtime that is still starting it. Raises InvalidArgumentError for an empty command, CriError
    where the shim cannot be reached or does not answer.
    """
    if not command:
        raise InvalidArgumentError("the command is empty; it must be given")
    exec_id = f"{os.getpid()}-{next(_numbers)}"
    loop = asyncio.get_running_loop()
    started: asyncio.Future[None] = loop.create_future()
    ended: asyncio.Future[int] = loop.create_future()

    def on_event(message: ShimMessage) -> None:
        # The greeting comes before the shim is asked for the command.
        no_news = "hello" in message and message["version"] < _TELLS_START
        if (no_news or message.get("event") == "exec-started") and not started.done():
            started.set_result(None)
        if "exec_id" not in message or message["exec_id"] != exec_id or ended.done():
            return
        if message["event"] == "exec-exited":
            ended.set_result(message["code"])
        else:
            kind = DeadlineExceededError if message["late"] else FailedPreconditionError
            ended.set_exception(kind(f"{quoted(command[0])} cannot be run: {message['error']}"))

    def on_close() -> None:
        if not ended.done():
            ended.set_exception(UnavailableError(f"the shim of container {container.id} ended during the exec"))

    owner = stream_owner(node.records.sandbox(container.sandbox_id), container.user)
    if owner is not None:
        for fd in stdio:
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                os.fchown(fd, *owner)
    path = os.path.join(node.container_dir(container.id), f"exec-{exec_id}.json")
    try:
        write = partial(_write_process, node, container, command, path, tty=bool(console))
        if spec_size(node, container.id) > _LARGE_SPEC:
            await in_thread(write, executor=_writers)
        else:
            write()
        link = await process_records.of_container(node, container).shim.open_link(on_event, on_close)
        try:
            request: ExecRequest = {"op": "exec", "exec_id": exec_id, "spec": path, "owned": True}
            if console:
                request["console"] = console
            await link.request(request, stdio)
            families.EXECS.add(1)
            families.EXECS_RUNNING.add(1)
            try:
                yield ExecProcess(started, ended)
            finally:
                families.EXECS_RUNNING.add(-1)
        finally:
            link.close()
            if ended.done() and not ended.cancelled():
                ended.exception()  # read, so that asyncio does not log an exception that nobody read
    finally:
        _unlink(path)


def _write_process(node: Node, container: Container, command: Sequence[str], path: str, *, tty: bool) -> None:
    document = read_spec(node, container.id)
    with open(path, "w") as f:
        json.dump(spec.exec_process(document, command, tty=tty), f)


class Console:
    """A socket on which an OCI runtime hands over the master side of a terminal (runc, docs/terminals.md)."""

    def __init__(self, directory: str) -> None:
        """Listen in ``directory``, under a name of its own."""
        name = f"console-{os.getpid()}-{next(_numbers)}.sock"
        with ExitStack() as stack:
            opened = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, opened)
            # Named by way of a descriptor: a socket's address holds 107 bytes, and a state directory may be longer.
            self.path = f"/proc/{os.getpid()}/fd/{opened}/{name}"
            self._listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            self._listener.setblocking(False)
            # The mode of the file that bind makes. The umask would do the same to files of other threads.
            os.fchmod(self._listener.fileno(), 0o600)
            self._listener.bind(self.path)
            stack.callback(_unlink, os.path.join(directory, name))
            self._listener.listen(1)
            self._undo = stack.pop_all()

    async def master(self) -> int:
        """Wait for the master side of the terminal. The caller closes it. Raises CriError where there is none."""
        loop = asyncio.get_running_loop()
        connection, _ = await loop.sock_accept(self._listener)
        with connection:
            await ready(connection.fileno(), write=False)
            _, fds, _, _ = socket.recv_fds(connection, 4096, 1)
        if not fds:
            raise CriError("the OCI runtime sent no terminal")
        os.set_blocking(fds[0], False)
        os.set_inheritable(fds[0], False)
        return fds[0]

    def close(self) -> None:
        """Stop listening. No task may be waiting in :meth:`master`."""
        self._undo.close()


def _unlink(path: str) -> None:
    """Delete a file; the container may have been removed meanwhile."""
    with suppress(FileNotFoundError):
        os.unlink(path)
