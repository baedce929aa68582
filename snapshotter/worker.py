"""The program that unpacks one layer and ends: ``main`` of a process of its own, started by the snapshotter.

Its directory is the layer's staging directory and its standard input the blob. It prints one JSON object: what was
unpacked, or the class and text of the error.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

from snapshotter import errors, unpacker
from snapshotter.limits import Limits
from snapshotter.streams import LayerStream, decoder
from snapshotter.tar import TarReader

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38

_CAPABILITY_VERSION_3 = 0x20080522
# CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SYS_ADMIN (for trusted.overlay.opaque), MKNOD (for whiteouts), SETFCAP
_CAPABILITIES = sum(1 << bit for bit in (0, 1, 3, 4, 21, 27, 31))

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Unpack as the first argument, a JSON object, says."""
    options = json.loads(sys.argv[1])
    limits = Limits(**options["limits"])
    try:
        decode = decoder(sys.stdin.buffer, options["compression"])
        area = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        _confine()
        _die_with(options["daemon"])
        root = os.open("fs", os.O_RDONLY | os.O_DIRECTORY, dir_fd=area)
        stream = LayerStream(sys.stdin.buffer, decode, limits)
        reader = TarReader(stream.read, limits)
        made = unpacker.unpack(reader, root, area)
        reader.drain()
        digest = stream.digest()
        if digest != options["diff_id"]:
            raise errors.DiffMismatchError(
                f"the layer's content is {digest} and the image's configuration names {options['diff_id']}"
            )
        result = made._asdict()
    except (errors.SnapshotError, OSError) as e:
        result = {"error": type(e).__name__, "message": str(e)}
    sys.stdout.write(json.dumps(result))
    sys.stdout.flush()


def _die_with(daemon: int) -> None:
    """End when the daemon ends, however it does: its successor sweeps the staging directory.

    Comes after the change of credentials, which would undo it.
    """
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != daemon:
        raise SystemExit("the daemon ended before its worker began")


def _confine() -> None:
    """See nothing but the staging directory, gain nothing, and keep the capabilities that unpacking takes."""
    os.umask(0)
    os.setresgid(0, 0, 0)
    os.chroot(".")
    os.chdir("/")
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; the low words of all, then the high ones
    _check(_libc.capget(header, sets))
    sets[:] = [sets[0] & _CAPABILITIES, sets[1] & _CAPABILITIES, 0, 0, 0, 0]
    _check(_libc.capset(header, sets))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
