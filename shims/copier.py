"""Copies bytes from one descriptor to another, for streams that a runtime's shim does not take as they are."""

from __future__ import annotations

import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Loop

_READ_SIZE = 1 << 16


class Copier:
    """Copies until one side ends, then closes both and calls `ended`. It reads on when the target has taken all."""

    __slots__ = ("_ended", "_loop", "_rest", "_source", "_target", "_watched")

    def __init__(self, loop: Loop, source: int, target: int, ended: Callable[[], None]) -> None:
        """Takes over both descriptors, which must not be the same."""
        os.set_blocking(source, False)
        os.set_blocking(target, False)
        self._loop = loop
        self._source = source
        self._target = target
        self._ended = ended
        self._rest = b""
        self._watched = -1
        self._watch(source, select.EPOLLIN, self._readable)

    def close(self) -> None:
        """End the copying."""
        if self._watched < 0:
            return
        self._loop.forget(self._watched)
        self._watched = -1
        os.close(self._source)
        os.close(self._target)
        self._ended()

    def _watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        if self._watched >= 0:
            self._loop.forget(self._watched)
        self._watched = fd
        self._loop.watch(fd, events, callback)

    def _readable(self, _events: int) -> None:
        try:
            self._rest = os.read(self._source, _READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            self._rest = b""
        if not self._rest:
            self.close()
            return
        self._write()
        if self._rest and self._watched >= 0:
            self._watch(self._target, select.EPOLLOUT, self._writable)

    def _writable(self, _events: int) -> None:
        self._write()
        if not self._rest and self._watched >= 0:
            self._watch(self._source, select.EPOLLIN, self._readable)

    def _write(self) -> None:
        try:
            self._rest = self._rest[os.write(self._target, self._rest) :]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
