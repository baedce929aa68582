"""The privileges that the snapshotter's programs drop before they read a layer (capabilities(7), prctl(2))."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def keep_capabilities(mask: int) -> None:
    """Keep the capabilities in ``mask``, a bit for each, and gain no others by execve(2). Raises OSError."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; the low words of all, then the high ones
    _check(_libc.capget(header, sets))
    sets[:] = [sets[0] & mask, sets[1] & mask, 0, 0, 0, 0]
    _check(_libc.capset(header, sets))


def die_with(daemon: int) -> None:
    """Have the kernel kill this process when its parent, the process ``daemon``, ends.

    It is to be called after the last change of credentials, which would undo it. Raises OSError, and SystemExit if the
    daemon has ended already.
    """
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != daemon:
        raise SystemExit("the daemon has ended")


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
