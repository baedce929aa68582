"""The connections of daemons to a shim: a greeting, requests with their replies, and events to all of them."""

from __future__ import annotations

import os
import select

from .lean import AF_UNIX, SOCK_STREAM, Socket, accept
from .shim_config import reason
from .wire import Channel, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .loop import Loop
    from .messages import Reply, ShimEvent, ShimMessage
    from .wire import Message

    Answer = tuple[Reply, Sequence[int]]
    """A reply, and the descriptors that go with it. They stay open here."""

_SOCKET = "shim.sock"


class Connections:
    """All connections: the daemon has one for the container, and one more for each exec and each attached client."""

    __slots__ = ("_answer", "_channels", "_greetings", "_hung_up", "_loop")

    def __init__(
        self,
        loop: Loop,
        greetings: Callable[[], Sequence[ShimMessage]],
        answer: Callable[[Channel, Message, list[int]], Answer],
        hung_up: Callable[[Channel], None],
    ) -> None:
        """`greetings` go to each new connection. `hung_up` is called when a connection has ended.

        `answer` carries out a request. It takes the descriptors that it keeps out of the list; the rest are closed.
        """
        self._loop = loop
        self._greetings = greetings
        self._answer = answer
        self._hung_up = hung_up
        self._channels: dict[int, Channel] = {}

    def listen(self) -> None:
        """Listen for later daemons, in the current directory: the absolute name may be too long for a socket."""
        listener = bind(_SOCKET)
        self._loop.watch(listener.fileno(), select.EPOLLIN, lambda _: self._accept(listener))

    def unlisten(self) -> None:
        if os.path.lexists(_SOCKET):
            os.unlink(_SOCKET)

    def connect(self, sock: Socket) -> None:
        """Take over a connected socket, and greet."""
        sock.setblocking(False)
        channel = Channel(sock)
        self._channels[channel.fileno()] = channel
        self._loop.watch(channel.fileno(), select.EPOLLIN, lambda _: self._serve(channel))
        for message in self._greetings():
            self.send(channel, message)

    def send(self, channel: Channel, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
        """Send a message. A peer that does not read loses its connection."""
        if channel.fileno() in self._channels:
            try:
                channel.send(message, fds)
            except (OSError, ProtocolError):
                self._hang_up(channel)

    def tell(self, event: ShimEvent) -> None:
        """Send an event to all connections."""
        for channel in list(self._channels.values()):
            self.send(channel, event)

    def _accept(self, listener: Socket) -> None:
        try:
            sock = accept(listener)
        except OSError:
            return  # it has hung up already
        self.connect(sock)

    def _hang_up(self, channel: Channel) -> None:
        if self._channels.pop(channel.fileno(), None) is None:
            return
        self._loop.forget(channel.fileno())
        channel.close()
        self._hung_up(channel)

    def _serve(self, channel: Channel) -> None:
        try:
            requests = channel.receive()
        except BlockingIOError:
            return
        except (EOFError, OSError, ProtocolError):
            self._hang_up(channel)
            return
        for message, fds in requests:
            if channel.fileno() < 0:  # an earlier answer could not be sent, so the connection is closed
                for fd in fds:
                    os.close(fd)
                continue
            answer, sent = self._carry_out(channel, message, fds)
            self.send(channel, {"re": message.get("re"), **answer}, sent)

    def _carry_out(self, channel: Channel, message: Message, fds: list[int]) -> Answer:
        try:
            return self._answer(channel, message, fds)
        except OSError as error:
            return {"error": reason(error), "errno": error.errno or 0}, ()
        except Exception as error:  # noqa: BLE001 - no request may end the process that holds a container
            return {"error": reason(error)}, ()
        finally:
            for fd in fds:
                os.close(fd)


def bind(name: str) -> Socket:
    """A listening socket in the current directory that only root may use. Raises OSError if it exists."""
    listener = Socket(AF_UNIX, SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(name)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(mask)
    listener.listen(16)
    listener.setblocking(False)
    return listener
