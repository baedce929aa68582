"""Counters of the interfaces in pods' network namespaces, read without entering them again.

A file below /proc/net belongs to the network namespace of the thread that opened it, for as long as it is open. So
a thread enters each pinned namespace once and opens net/dev there; from then on any thread reads it. The
descriptor keeps the namespace alive: :meth:`Networks.forget` must come before a namespace is to go.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Collection, Iterable

import structlog

from criserver.stats import parse
from criserver.stats.parse import Interface
from snapshotter.threads import start_thread

log = structlog.get_logger(__name__)

_CLONE_NEWNET = 0x40000000
# Seconds for entering all namespaces that are new to a call; it takes a tenth of a millisecond each.
_DEADLINE = 1.0
# An interface has a line of about 120 bytes; the kernel gives a page of them at a time.
_PIECE = 16 << 10
_MAX_SIZE = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


class Networks:
    """Descriptors of net/dev by the path of the file that pins its namespace."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}
        self._opening: dict[str, asyncio.Future[None]] = {}

    async def read(self, paths: Iterable[str]) -> dict[str, tuple[Interface, ...]]:
        """The interfaces of each namespace but loopback; one that cannot be read is left out."""
        wanted = list(paths)
        if missing := [path for path in wanted if path not in self._fds and path not in self._opening]:
            self._open(missing)
        if opening := {self._opening[path] for path in wanted if path in self._opening}:
            await asyncio.wait(opening, timeout=_DEADLINE)
        found = {}
        for path in wanted:
            if (fd := self._fds.get(path)) is not None:
                try:
                    found[path] = tuple(parse.interfaces(_read(fd)))
                except OSError as e:
                    log.warning("network counters cannot be read", namespace=path, error=str(e))
        return found

    def forget(self, path: str) -> None:
        """Let go of a namespace, which is to go."""
        self._opening.pop(path, None)
        if (fd := self._fds.pop(path, None)) is not None:
            os.close(fd)

    def retain(self, paths: Collection[str]) -> None:
        """Let go of all namespaces but these."""
        for path in (self._fds.keys() | self._opening.keys()) - set(paths):
            self.forget(path)

    def close(self) -> None:
        """Let go of all namespaces."""
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
                pass  # the loop has ended with the daemon, and nobody waits

        # A thread of its own, never a pooled one: it does not leave the namespace that it has entered.
        try:
            start_thread(work, "net-dev")
        except OSError as e:
            log.warning("pods' network counters cannot be opened", namespaces=paths, error=str(e))
            for path in paths:
                del self._opening[path]  # the next call tries again

    def _take(self, path: str, fd: int | None) -> None:
        """Keep what was opened, unless it was forgotten meanwhile."""
        wanted = self._opening.pop(path, None) is not None
        if fd is None:
            return
        if wanted:
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
