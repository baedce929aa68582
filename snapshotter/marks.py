"""Opaque marks, which the daemon sets for the unpack workers.

overlayfs reads the mark from an extended attribute of the trusted namespace. Setting that takes CAP_SYS_ADMIN, and with
this capability a worker could leave its chroot by mounts. So the worker sends the daemon a descriptor of the directory,
and waits for the answer: one byte, an errno or zero. No path is sent.
"""

from __future__ import annotations

import _socket
import errno
import os
import stat
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

OPAQUE_XATTR = "trusted.overlay.opaque"
_FD = struct.Struct("i")


def set_opaque(fd: int) -> None:
    """Make the directory ``fd`` hide what the lower layers have in it. Raises OSError."""
    os.setxattr(fd, OPAQUE_XATTR, b"y")


class Asker:
    """The worker's end of the socket, given by its descriptor."""

    def __init__(self, fd: int) -> None:
        self._socket = _socket.socket(fileno=fd)

    def set_opaque(self, fd: int) -> None:
        """Have the daemon mark the directory ``fd``. Raises the OSError that the daemon has met."""
        self._socket.sendmsg([b"o"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, _FD.pack(fd))])
        answer = self._socket.recv(1)
        if answer != b"\0":
            number = answer[0] if answer else 0
            raise OSError(number, os.strerror(number))


def answer(sock: socket.socket, device: int) -> bool:
    """The daemon's end of the socket: mark the directory whose descriptor the worker has sent.

    The directory must be on the file system ``device``. Returns False when the worker has closed its end. Does not
    block, as a worker sends one descriptor at a time.
    """
    try:
        data, sent, _, _ = sock.recvmsg(1, _socket.CMSG_SPACE(_FD.size))
        fds = [fd for _, kind, body in sent if kind == _socket.SCM_RIGHTS for (fd,) in _FD.iter_unpack(body)]
        if not data:
            return False
        # None comes if the daemon has no descriptor left for it (unix(7), SCM_RIGHTS).
        number = 0 if len(fds) == 1 else errno.EMFILE
        try:
            for fd in fds:
                status = os.fstat(fd)
                if not stat.S_ISDIR(status.st_mode) or status.st_dev != device:
                    raise PermissionError(1, "no directory of a layer")
                set_opaque(fd)
        except OSError as e:
            number = e.errno or 1
        finally:
            for fd in fds:
                os.close(fd)
        sock.send(bytes([number]))
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True
