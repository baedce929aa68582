"""Exec, Attach and PortForward: streams between a client of the streaming server and a container or a pod.

The RPCs check the request and answer with a URL. The streaming server calls the functions below when a client opens it.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack, closing, suppress
from typing import TYPE_CHECKING, Any, Literal

from criserver.errors import CriError, FailedPreconditionError, InvalidArgumentError, UnavailableError
from criserver.model import NamespaceMode
from criserver.network.pod_socket import stream_socket
from criserver.runtime import process_records
from criserver.runtime.container_process import ContainerProcess
from criserver.runtime.exec_process import Console, exec_process, running_container
from criserver.runtime.lifecycle import SandboxState
from criserver.runtime.node import Node
from criserver.runtime.pipes import DRAIN_TIMEOUT, Pipe
from criserver.runtime.pod_namespaces import network_pin
from criserver.runtime.records import Container
from criserver.runtime.shim_link import ShimLink
from criserver.streaming import (
    ClientSink,
    ClientSource,
    Command,
    CommandStreams,
    Forward,
    OutputCopier,
    RequestedStreams,
    copy_in,
    discard,
)

if TYPE_CHECKING:
    from shims.messages import AttachRequest

DIAL_TIMEOUT = 30.0  # seconds
# A WebSocket's channels are named by one character; each port takes two.
MAX_PORTS = 40
_LOCALHOSTS = (("IPv4", socket.AF_INET, "127.0.0.1"), ("IPv6", socket.AF_INET6, "::1"))


def exec_address(node: Node, id_or_prefix: str, command: Sequence[str], wanted: RequestedStreams) -> str:
    """The URL at which a client can run a command in a container.

    Raises NotFoundError, FailedPreconditionError where the container does not run, InvalidArgumentError.
    """
    _check(wanted)
    if not command:
        raise InvalidArgumentError("the command is empty; it must be given")
    container = running_container(node, id_or_prefix)
    return node.streaming.offer(Command(wanted, lambda streams: _exec(node, container.id, command, wanted, streams)))


def attach_address(node: Node, id_or_prefix: str, wanted: RequestedStreams) -> str:
    """The URL at which a client can attach to a container's own process. Raises as :func:`exec_address`."""
    _check(wanted)
    container = running_container(node, id_or_prefix)
    return node.streaming.offer(Command(wanted, lambda streams: _attach(node, container.id, streams)))


def forward_address(node: Node, id_or_prefix: str, ports: Sequence[int]) -> str:
    """The URL at which a client can reach ports of a pod.

    A WebSocket client cannot name ports, so it gets ``ports``; a SPDY client names its own.

    Raises NotFoundError, FailedPreconditionError for a pod that is stopped, InvalidArgumentError.
    """
    if len(ports) > MAX_PORTS:
        raise InvalidArgumentError(f"{len(ports)} ports are more than one connection carries ({MAX_PORTS})")
    for port in ports:
        if not 0 < port < 1 << 16:
            raise InvalidArgumentError(f"port = {port} is not a port")
    sandbox_id = node.records.sandbox(id_or_prefix).id
    _network_of(node, sandbox_id)
    return node.streaming.offer(Forward(tuple(ports), lambda port: _dial(node, sandbox_id, port)))


def _check(wanted: RequestedStreams) -> None:
    if wanted.tty and wanted.stderr:
        raise InvalidArgumentError("tty and stderr are both set: a terminal has one output, stdout")
    if not (wanted.stdin or wanted.stdout or wanted.stderr):
        raise InvalidArgumentError("none of stdin, stdout and stderr is set; one must be")


async def _exec(
    node: Node, container_id: str, command: Sequence[str], wanted: RequestedStreams, streams: CommandStreams
) -> int:
    container = running_container(node, container_id)
    if wanted.tty:
        return await _exec_on_terminal(node, container, command, streams)
    async with AsyncExitStack() as stack:
        stdin, stdout, stderr = (stack.enter_context(Pipe()) for _ in range(3))
        # A stream that the client did not ask for is /dev/null.
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, null)
        stdio = [
            stdin.reader if streams.stdin else null,
            stdout.writer if streams.stdout else null,
            stderr.writer if streams.stderr else null,
        ]
        process = await stack.enter_async_context(exec_process(node, container, command, stdio=stdio))
        stdin.close_reader()
        stdout.close_writer()
        stderr.close_writer()
        inputs = [_feed(streams.stdin, stdin)] if streams.stdin else []
        outputs = [(stdout.reader, streams.stdout), (stderr.reader, streams.stderr)]
        return await _carry(inputs, outputs, process.ended)


async def _feed(source: ClientSource, pipe: Pipe) -> None:
    """Copy to a command's standard input, and close it when the client closes its side."""
    await copy_in(source, pipe.writer)
    pipe.close_writer()


async def _exec_on_terminal(node: Node, container: Container, command: Sequence[str], streams: CommandStreams) -> int:
    async with AsyncExitStack() as stack:
        console = stack.enter_context(closing(Console(node.container_dir(container.id))))
        ended = (await stack.enter_async_context(exec_process(node, container, command, console=console.path))).ended
        arrival = asyncio.create_task(console.master())
        stack.push_async_callback(_let_go, arrival)
        await asyncio.wait({arrival, ended}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            code = ended.result()  # raises where the command could not be run
            # The OCI runtime sent the terminal before it started the command. It may not have been received yet, and
            # it still has the command's output.
            await asyncio.wait({arrival}, timeout=DRAIN_TIMEOUT)
            if not arrival.done():
                return code
        terminal = arrival.result()
        process = process_records.of_container(node, container)
        inputs = [
            _resize(streams, terminal, process, console.path),
            *([copy_in(streams.stdin, terminal)] if streams.stdin else []),
        ]
        return await _carry(inputs, [(terminal, streams.stdout)], ended)


async def _let_go(arrival: asyncio.Task[int]) -> None:
    """Stop waiting for a terminal, and close it if it was received."""
    arrival.cancel()
    await asyncio.wait({arrival})
    if not arrival.cancelled() and arrival.exception() is None:
        os.close(arrival.result())


async def _attach(node: Node, container_id: str, streams: CommandStreams) -> int:
    container = running_container(node, container_id)
    gone: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def on_close() -> None:
        if not gone.done():
            gone.set_result(0)

    async with AsyncExitStack() as stack:
        process = process_records.of_container(node, container)
        link = await process.shim.open_link(lambda _: None, on_close)
        stack.callback(link.close)
        # A terminal has one output. The client may not know that the container has one.
        names: tuple[Literal["stdout", "stderr"], ...] = ("stdout",) if container.config.tty else ("stdout", "stderr")
        wanted = {name: sink for name in names if (sink := getattr(streams, name)) is not None}
        pipes = {name: stack.enter_context(Pipe()) for name in wanted}
        request: AttachRequest = {"op": "attach", "streams": list(wanted)}
        received = await link.request(request, [pipe.writer for pipe in pipes.values()])
        for pipe in pipes.values():
            pipe.close_writer()
        inputs = []
        for stdin in received:  # at most one; none where the container has no standard input
            os.set_blocking(stdin, False)
            if container.config.tty:
                stack.callback(os.close, stdin)
                inputs.append(_resize(streams, stdin, process))
                if streams.stdin:
                    inputs.append(copy_in(streams.stdin, stdin))
            elif streams.stdin:
                inputs.append(_feed_container(container, streams.stdin, stdin, link))
            else:
                os.close(stdin)
        if streams.stdin and not received:
            inputs.append(discard(streams.stdin))
        if streams.resize and not container.config.tty:
            inputs.append(discard(streams.resize))
        outputs = [(pipe.reader, wanted[name]) for name, pipe in pipes.items()]
        await _carry(inputs, outputs, None if outputs else gone)
        return await _disconnected(node, container)


async def _feed_container(container: Container, source: ClientSource, stdin: int, link: ShimLink) -> None:
    """Copy to a container's standard input. With stdin_once the first client that ends closes it for good."""
    try:
        await copy_in(source, stdin)
    finally:
        os.close(stdin)
        if container.config.stdin_once and not link.closed:
            await link.request({"op": "close-stdin"})


async def _disconnected(node: Node, container: Container) -> int:
    """0 where the container has ended. Raises UnavailableError where it runs on.

    The shim has then disconnected a client that did not read for too long, or the container has closed its output.
    """
    process = node.processes.get(container.id)
    if process is not None and not await process.wait(DRAIN_TIMEOUT):
        raise UnavailableError(
            f"container {container.id} runs on: the client did not read its output in time, or the container closed it"
        )
    return 0


async def _carry(
    inputs: Sequence[Coroutine[Any, Any, None]],
    outputs: Sequence[tuple[int, ClientSink | None]],
    ended: asyncio.Future[int] | None,
) -> int:
    """Copy both ways until the process has ended and the client has its output; returns the exit code.

    Without ``ended`` it returns 0 at the end of the output. Raises ConnectionError where the client disconnects before
    that, and what ``ended`` raises.
    """
    flows = [OutputCopier(fd, sink) for fd, sink in outputs if sink is not None]
    try:
        async with asyncio.TaskGroup() as group:
            feeding = [group.create_task(work) for work in inputs]
            draining = [group.create_task(flow.run()) for flow in flows]
            code = 0 if ended is None else await asyncio.shield(ended)
            if ended is None:
                await asyncio.wait(draining)
            else:
                await _drained(draining, flows)
            for task in (*feeding, *draining):
                task.cancel()
    except BaseExceptionGroup as e:
        raise e.exceptions[0] from e.exceptions[0].__cause__  # the cause says whether the node has run out of something
    return code


async def _drained(tasks: Sequence[asyncio.Task[None]], flows: Sequence[OutputCopier]) -> None:
    """Wait until the client has all output.

    A process that the command left behind may keep the pipe open. The wait then ends when no more output comes.
    """
    while pending := [task for task in tasks if not task.done()]:
        before = sum(flow.copied for flow in flows)
        await asyncio.wait(pending, timeout=DRAIN_TIMEOUT)
        resting = all(flow.waiting for task, flow in zip(tasks, flows, strict=True) if not task.done())
        if resting and sum(flow.copied for flow in flows) == before:
            return


async def _resize(streams: CommandStreams, terminal: int, process: ContainerProcess, console: str = "") -> None:
    """Give a terminal the client's sizes. Where a runtime's shim keeps the terminal to itself, it is asked to."""
    async for size in streams.sizes():
        if os.isatty(terminal):
            with suppress(OSError):  # a terminal that is gone has no size
                fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", size.height, size.width, 0, 0))
        else:
            with suppress(CriError):  # the command or its shim has ended
                shim = process.shim
                await shim.request({"op": "resize", "console": console, "width": size.width, "height": size.height})


def _network_of(node: Node, sandbox_id: str) -> str | None:
    """Where a pod's network namespace is pinned, None for the node's. Raises FailedPreconditionError, NotFoundError."""
    sandbox = node.records.sandbox(sandbox_id)
    if sandbox.state is not SandboxState.READY:
        raise FailedPreconditionError(f"pod sandbox {sandbox.id} is {sandbox.state.value}; it has no network")
    if sandbox.config.namespaces.network is NamespaceMode.NODE:
        return None
    return network_pin(node, sandbox.id)


async def _dial(node: Node, sandbox_id: str, port: int) -> socket.socket:
    """A connection to a port of a pod on its loopback interface, over IPv4 or else IPv6. Raises UnavailableError."""
    network = _network_of(node, sandbox_id)
    loop = asyncio.get_running_loop()
    failures: dict[str, str] = {}
    for name, family, host in _LOCALHOSTS:
        try:
            sock = await stream_socket(network, family)
        except OSError as e:
            failures[name] = e.strerror or str(e)
            continue
        try:
            async with asyncio.timeout(DIAL_TIMEOUT):
                await loop.sock_connect(sock, (host, port))
            return sock
        except (OSError, TimeoutError) as e:
            sock.close()
            # The message of asyncio's own exception has no more to say than the error's number.
            failures[name] = (
                os.strerror(e.errno) if isinstance(e, OSError) and e.errno else f"no answer in {DIAL_TIMEOUT:g} s"
            )
        except BaseException:
            sock.close()
            raise
    different = len(set(failures.values())) > 1
    words = "; ".join(f"{name}: {why}" for name, why in failures.items()) if different else failures["IPv4"]
    raise UnavailableError(f"port {port} of pod sandbox {sandbox_id}: {words}")
