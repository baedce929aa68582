"""What suits a process of the C library's allocator (mallopt(3)); one that is not glibc's does as it will."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGEST = 32 << 20  # bytes; mallopt takes no larger threshold
_LARGE = 1 << 20  # bytes


def share_memory() -> None:
    """Have all threads allocate in one place, so that what one has freed serves the others.

    For processes in which the interpreter's lock lets one thread at a time allocate anyway. Called before there are
    threads.
    """
    _set(_M_ARENA_MAX, 1)


def return_memory() -> None:
    """Give what is large back to the kernel as soon as it is freed: for daemons that need megabytes now and then.

    By itself glibc takes a freed large buffer as a sign that there will be more of them, and keeps their memory.
    """
    share_memory()
    _set(_M_MMAP_THRESHOLD, _LARGE)
    _set(_M_TRIM_THRESHOLD, 2 * _LARGE)


def keep_memory() -> None:
    """Give freed memory back to the kernel at the end only: for programs that take and free megabytes all the time.

    By itself glibc maps and unmaps each of such buffers, and the kernel zeroes it anew.
    """
    share_memory()
    _set(_M_MMAP_THRESHOLD, _LARGEST)
    _set(_M_TRIM_THRESHOLD, 4 * _LARGEST)


def _set(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
