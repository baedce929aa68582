"""The shim that holds a process: it is forked by the nursery, or found again after a start of the daemon.

It tells its owner what the shim says and when the connection is lost. It knows nothing of what becomes of the process.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import structlog

from criserver.errors import CriError, DeadlineExceededError, FailedPreconditionError, UnavailableError
from criserver.runtime import pidfd
from criserver.runtime.nursery import Nursery
from criserver.runtime.shim_link import ShimLink, connect, connect_in_turn

if TYPE_CHECKING:
    from shims.messages import ForkConfig, Request, ShimMessage

log = structlog.get_logger(__name__)

# Seconds. A shim that is not busy takes a millisecond.
GREETING_TIMEOUT = 2.0

OnEvent = Callable[["ShimMessage"], None]
OnClose = Callable[[], None]


class ContainerShim:
    """The shim of ``owner_id``, whose bundle is in ``directory``.

    ``on_event`` gets what the shim tells, ``on_close`` is called when the connection is lost. Both may be replaced for
    a start (:meth:`fork`).
    """

    def __init__(
        self,
        owner_id: str,
        directory: str,
        nursery: Nursery,
        background: Callable[[Coroutine[Any, Any, object], str], asyncio.Task[None]],
        on_event: OnEvent,
        on_close: OnClose,
    ) -> None:
        self._id = owner_id
        self._directory = directory
        self._socket = os.path.join(directory, "shim.sock")
        self._nursery = nursery
        self._background = background
        self._on_event = on_event
        self._on_close = on_close
        self._link: ShimLink | None = None
        self._abandoned = False

    @property
    def connected(self) -> bool:
        """Whether there is a connection to the shim."""
        return self._link is not None and not self._link.closed

    @property
    def has_begun(self) -> bool:
        """Whether a shim was forked that has come to its work: its socket is there."""
        return os.path.lexists(self._socket)

    async def fork(self, config: ForkConfig, on_event: OnEvent, on_close: OnClose) -> None:
        """Fork a shim that runs the bundle. Raises as :meth:`Nursery.fork` does."""
        self._link = await self._nursery.fork(config, on_event, on_close)

    async def reconnect(self) -> bool:
        """Connect to a shim that an earlier daemon started, and wait for what it greets with.

        False where the shim is gone. A shim that does not greet (it is stopped, or the node is busy) may do so later.
        """
        greeted = asyncio.Event()

        def on_event(message: ShimMessage) -> None:
            self._on_event(message)
            greeted.set()

        try:
            self._link = connect(self._socket, on_event, self._on_close)
        except (FileNotFoundError, NotADirectoryError, ConnectionError):
            return False
        except OSError as e:
            # The shim is so busy, or so stopped, that its queue is full; or the daemon has no descriptor for it. What
            # the shim says is awaited and not guessed.
            log.warning("a shim cannot be reached now; its container is taken as it was", owner=self._id, error=str(e))
            self._background(self._connect_later(), "connecting to a busy shim failed")
            return True
        try:
            async with asyncio.timeout(GREETING_TIMEOUT):
                await greeted.wait()
        except TimeoutError:
            log.warning("a shim does not greet; its container is taken as it was", owner=self._id)
        return True

    async def _connect_later(self) -> None:
        while not self._abandoned:
            await asyncio.sleep(GREETING_TIMEOUT)
            try:
                self._link = connect(self._socket, self._on_event, self._on_close)
            except (FileNotFoundError, NotADirectoryError, ConnectionError):
                if not self._abandoned:
                    self._on_close()
            except OSError:
                continue
            return

    async def open_link(self, on_event: OnEvent, on_close: OnClose) -> ShimLink:
        """One more connection to the shim. When it closes, the shim ends what was asked for on it.

        Raises DeadlineExceededError where the shim is stuck, CriError where it is gone.
        """
        return await connect_in_turn(self._socket, on_event, on_close)

    async def request(self, message: Request, timeout: float | None = None) -> None:
        """Have the shim do something. Raises as :meth:`ShimLink.request`, FailedPreconditionError without a shim."""
        if self._link is None or self._link.closed:
            raise FailedPreconditionError(f"the shim of container {self._id} is gone")
        await self._link.request(message, timeout=timeout)

    async def ask(self, message: Request, event: str, seconds: float) -> ShimMessage:
        """Have the shim do something of which an event tells the outcome, by a connection of its own.

        Raises DeadlineExceededError without an event in time, CriError where the shim is gone or ends meanwhile.
        """
        told: asyncio.Future[ShimMessage] = asyncio.get_running_loop().create_future()

        def on_event(found: ShimMessage) -> None:
            if found.get("event") == event and not told.done():
                told.set_result(found)

        def on_close() -> None:
            if not told.done():
                told.set_exception(UnavailableError(f"the shim of container {self._id} ended during a request"))

        link = await self.open_link(on_event, on_close)
        try:
            await link.request(message)
            async with asyncio.timeout(seconds):
                return await told
        except TimeoutError:
            raise DeadlineExceededError(
                f"the shim of container {self._id} did not answer within {seconds:g} s"
            ) from None
        finally:
            link.abandon()

    async def answers(self) -> bool:
        """Whether the shim is at work: it answers at any time."""
        if not self.connected:
            return False
        try:
            await self.request({"op": "status"}, timeout=GREETING_TIMEOUT)
        except DeadlineExceededError:
            return False
        except CriError:
            pass  # it has just ended
        return True

    def abandon(self) -> None:
        """Close the connection and send nothing more: the shim is to be ended, or another daemon takes it over."""
        self._abandoned = True
        if self._link is not None:
            self._link.abandon()

    async def end(self, seconds: float) -> list[int]:
        """Kill the shim, or the runtime that it has left behind, with all that it has started.

        Returns the processes that the kernel has not ended within ``seconds``.
        """
        directory = self._directory
        if not os.path.lexists(directory):
            directory += " (deleted)"  # the kernel's name of it (proc_pid_cwd(5))
        left = await asyncio.to_thread(pidfd.end_all_in, directory, seconds)
        if left:
            log.error("killed processes of a shim do not end", owner=self._id, pids=left)
        return left
