"""What the snapshotter's programs give up before they look at a layer (capabilities(7), prctl(2))."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


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
