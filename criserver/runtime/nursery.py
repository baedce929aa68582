"""The daemon's side of the nursery: the process that forks a shim for each container."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import structlog

from criserver.errors import CriError
from criserver.runtime import service_manager
from criserver.runtime.shim_link import ShimLink, peer_name
from shims import launch, wire

if TYPE_CHECKING:
    from shims.messages import ForkConfig, ShimMessage

log = structlog.get_logger(__name__)

# The nursery needs a tenth of a second to start; a node that boots may be slow.
START_TIMEOUT = 30.0


class Nursery:
    """The process that forks shims. It is started again if it has ended."""

    def __init__(self) -> None:
        self._link: ShimLink | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """Start the process if none runs, and wait until it can fork. Raises CriError if it does not start."""
        async with self._starting:
            if self._link is not None and not self._link.closed:
                return
            apart = service_manager.own_scope("criserver-shims")
            try:
                self._link = await self._start(apart)
            except CriError as e:
                if not apart:
                    raise
                log.warning("systemd gave shims no scope of their own; they stay in the daemon's", error=str(e))
                self._link = await self._start([])

    async def _start(self, before: list[str]) -> ShimLink:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *before,
                *launch.command(sys.executable, theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # a signal to the daemon's group is not for the shims
                cwd="/",
            )
        greeting: asyncio.Future[Mapping[str, object]] = asyncio.get_running_loop().create_future()

        def greeted(message: Mapping[str, object]) -> None:
            if not greeting.done():
                greeting.set_result(message)

        link = ShimLink(ours, greeted, lambda: greeted({}), "the nursery of shims")
        try:
            async with asyncio.timeout(START_TIMEOUT):
                version = (await greeting).get("version")
        except TimeoutError:
            version = None
        if version != wire.VERSION:
            link.close()
            raise CriError(
                f"the nursery of shims does not start (its version is {version}, the daemon needs {wire.VERSION}); see "
                "its message above on standard error, and check that the installation is complete"
            )
        return link

    async def fork(
        self, config: ForkConfig, on_event: Callable[[ShimMessage], None], on_close: Callable[[], None]
    ) -> ShimLink:
        """Fork a shim, and return the connection to it. Raises CriError if that fails."""
        await self.start()
        assert self._link is not None
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                await self._link.request({"op": "fork", "config": config}, [theirs.fileno()])
            except BaseException:
                ours.close()
                raise
        return ShimLink(ours, on_event, on_close, peer_name(config["id"]))

    async def stop(self) -> None:
        """End the process. The shims go on."""
        if self._link is not None:
            self._link.close()
        if self._process is not None:
            try:
                async with asyncio.timeout(5):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
