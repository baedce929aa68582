"""Counters of the network interfaces of pods.

An open file below /proc/net belongs to the network namespace of the thread that opened it. So a thread enters each
pinned namespace once and opens net/dev there. After that, any thread can read it. The descriptor keeps the namespace
alive: call :meth:`NetworkCounters.forget` before a namespace is removed.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Collection, Iterable

import structlog

from criserver.stats import kernel_text
from criserver.stats.kernel_text import InterfaceCounters
from snapshotter.threads import start_thread

log = structlog.get_logger(__name__)

_CLONE_NEWNET = 0x40000000
# Seconds for a call to enter all its new namespaces. One takes a tenth of a millisecond.
_DEADLINE = 1.0
# An interface has a line of about 120 bytes. The kernel returns a page of lines at a time.
_PIECE = 16 << 10
_MAX_SIZE = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


class NetworkCounters:
    """Keeps descriptors of net/dev, by the path at which the namespace is pinned."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}
        self._opening: dict[str, asyncio.Future[None]] = {}

    async def read(self, paths: Iterable[str]) -> dict[str, tuple[InterfaceCounters, ...]]:
        """The interfaces of each namespace without loopback. A namespace that cannot be read is left out."""
        requested = list(paths)
        if missing := [path for path in requested if path not in self._fds and path not in self._opening]:
            self._open(missing)
        if opening := {self._opening[path] for path in requested if path in self._opening}:
            await asyncio.wait(opening, timeout=_DEADLINE)
        counters = {}
        for path in requested:
            if (fd := self._fds.get(path)) is not None:
                try:
                    counters[path] = tuple(kernel_text.interfaces(_read(fd)))
                except OSError as e:
                    log.warning("network counters cannot be read", namespace=path, error=str(e))
        return counters

    def forget(self, path: str) -> None:
        """Close the descriptor of a namespace, so that it can be removed."""
        self._opening.pop(path, None)
        if (fd := self._fds.pop(path, None)) is not None:
            os.close(fd)

    def retain(self, paths: Collection[str]) -> None:
        """Close the descriptors of all namespaces but these."""
        for path in (self._fds.keys() | self._opening.keys()) - set(paths):
            self.forget(path)

    def close(self) -> None:
        """Close all descriptors."""
        self.retain(())

    def _open(self, paths: list[str]) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._opening.update(dict.fromkeys(paths, done))

        def work() -> None:
            try:
                for path in paths:
                    loop.call_soon_threadsafe(self._take, path, _enter_and_open(path))
                loop.call_soon_threadsafe(done.set_result, None)
            except RuntimeError:
                pass  # the loop has ended with the daemon

        # A thread of its own, not a pooled one: it does not leave the namespace that it has entered.
        try:
            start_thread(work, "net-dev")
        except OSError as e:
            log.warning("pods' network counters cannot be opened", namespaces=paths, error=str(e))
            for path in paths:
                del self._opening[path]  # the next call tries again

    def _take(self, path: str, fd: int | None) -> None:
        """Keep a descriptor, unless the namespace was forgotten meanwhile."""
        keep = self._opening.pop(path, None) is not None
        if fd is None:
            return
        if keep:
            self._fds[path] = fd
        else:
            os.close(fd)


def _enter_and_open(path: str) -> int | None:
    try:
        namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.setns(namespace, _CLONE_NEWNET) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
        finally:
            os.close(namespace)
        return os.open("/proc/thread-self/net/dev", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        log.warning("a pod's network counters cannot be opened", namespace=path, error=str(e))
        return None


def _read(fd: int) -> bytes:
    whole = b""
    while (piece := os.pread(fd, _PIECE, len(whole))) and len(whole) < _MAX_SIZE:
        whole += piece
    return whole
