"""What the snapshotter's programs settle before they look at a layer (capabilities(7), prctl(2), mallopt(3))."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGEST = 32 << 20  # bytes; mallopt takes no larger threshold

_libc = ctypes.CDLL(None, use_errno=True)


def keep_memory() -> None:
    """Give freed memory back to the kernel at the end only: buffers of megabytes are taken and freed all the time.

    By itself glibc maps and unmaps each one, and the kernel zeroes it anew (mallopt(3)). A libc without it does as it
    will.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, _LARGEST), (_M_TRIM_THRESHOLD, 4 * _LARGEST)):
            mallopt(parameter, value)


def keep_capabilities(mask: int) -> None:
    """Gain nothing any more, and keep no capabilities but those of ``mask``, a bit for each. Raises OSError."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; the low words of all, then the high ones
    _check(_libc.capget(header, sets))
    sets[:] = [sets[0] & mask, sets[1] & mask, 0, 0, 0, 0]
    _check(_libc.capset(header, sets))


def die_with(daemon: int) -> None:
    """End when the process ``daemon``, our parent, ends, however it does.

    Comes after a change of credentials, which would undo it. Raises OSError, and SystemExit where it has ended already.
    """
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != daemon:
        raise SystemExit("the daemon has ended")


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
