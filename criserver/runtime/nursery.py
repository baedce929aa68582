"""The daemon's side of the nursery: the process that forks a shim for each container."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import structlog

from criserver.errors import CriError, DeadlineExceededError, UnavailableError
from criserver.runtime import service_manager
from criserver.runtime.shim_link import ShimLink, peer_name
from shims import launch, wire

if TYPE_CHECKING:
    from shims.messages import ForkConfig, ShimMessage

log = structlog.get_logger(__name__)

# The nursery needs a tenth of a second to start; a node that boots may be slow.
START_TIMEOUT = 30.0
# A fork takes a millisecond. A nursery that needs longer than this is stuck, and what it was asked for dies with it.
FORK_TIMEOUT = 5.0


class Nursery:
    """The process that forks shims. It is started again if it has ended."""

    def __init__(self) -> None:
        self._link: ShimLink | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> ShimLink:
        """Start the process if none runs, wait until it can fork, and return the connection to it.

        Raises CriError if it does not start.
        """
        async with self._starting:
            if self._link is not None and not self._link.closed:
                return self._link
            apart = service_manager.own_scope("criserver-shims")
            try:
                self._link = await self._start(apart)
            except CriError as e:
                if not apart:
                    raise
                log.warning("systemd gave shims no scope of their own; they stay in the daemon's", error=str(e))
                self._link = await self._start([])
            return self._link

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
        """Fork a shim, and return the connection to it.

        Raises UnavailableError if the nursery ends before it answers, or does not answer and is ended for that. It may
        have forked a shim all the same. The next call starts another nursery. Raises CriError for its refusal.
        """
        link = await self.start()
        try:
            return await self._fork(link, config, on_event, on_close)
        except DeadlineExceededError as e:
            await self._end(link)
            raise UnavailableError(f"the nursery of shims did not answer, and was ended: {e}") from e

    async def _fork(
        self,
        link: ShimLink,
        config: ForkConfig,
        on_event: Callable[[ShimMessage], None],
        on_close: Callable[[], None],
    ) -> ShimLink:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                await link.request({"op": "fork", "config": config}, [theirs.fileno()], FORK_TIMEOUT)
            except BaseException:
                ours.close()
                raise
        return ShimLink(ours, on_event, on_close, peer_name(config["id"]))

    async def _end(self, link: ShimLink) -> None:
        """Kill a process that does not answer. One that takes its place meanwhile stays."""
        async with self._starting:
            if self._link is link and self._process is not None:
                log.error("the nursery of shims does not answer; it is replaced", pid=self._process.pid)
                link.close()
                self._process.kill()
                await self._process.wait()

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
