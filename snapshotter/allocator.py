"""Settings of glibc's allocator (mallopt(3)). On another C library they do nothing."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGEST = 32 << 20  # bytes; mallopt takes no larger threshold
_LARGE = 1 << 20  # bytes


def share_memory() -> None:
    """Have one arena for all threads, so that memory that one thread has freed serves the others.

    Separate arenas gain nothing here, as the interpreter's lock lets one thread at a time allocate. It is to be called
    before there are threads.
    """
    _set(_M_ARENA_MAX, 1)


def return_memory() -> None:
    """Give large buffers back to the kernel as soon as they are freed: for daemons that need megabytes now and then.

    By default glibc expects more buffers of the size of a freed one, and keeps the memory.
    """
    share_memory()
    _set(_M_MMAP_THRESHOLD, _LARGE)
    _set(_M_TRIM_THRESHOLD, 2 * _LARGE)


def keep_memory() -> None:
    """Keep freed memory until the process ends: for programs that take and free megabytes all the time.

    By default glibc maps and unmaps each large buffer, and the kernel zeroes it each time.
    """
    share_memory()
    _set(_M_MMAP_THRESHOLD, _LARGEST)
    _set(_M_TRIM_THRESHOLD, 4 * _LARGEST)


def _set(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
