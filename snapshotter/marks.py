"""Opaque marks for workers that may not set them.

overlayfs keeps the mark in an extended attribute of the trusted namespace, which takes CAP_SYS_ADMIN, and with that a
worker could mount its way out of its chroot. So the worker sends the daemon a descriptor of the directory and waits for
the answer: one byte, an errno, or zero. No path crosses over.
"""

from __future__ import annotations

import _socket
import os
import stat
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

OPAQUE_XATTR = "trusted.overlay.opaque"
_FD = struct.Struct("i")


def set_opaque(fd: int) -> None:
    """Make the directory ``fd`` hide what is below it in lower layers. Raises OSError."""
    os.setxattr(fd, OPAQUE_XATTR, b"y")


class Asker:
    """The worker's end, by its descriptor."""

    def __init__(self, fd: int) -> None:
        self._socket = _socket.socket(fileno=fd)

    def set_opaque(self, fd: int) -> None:
        """Have the directory ``fd`` marked. Raises OSError as the daemon met it."""
        self._socket.sendmsg([b"o"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, _FD.pack(fd))])
        answer = self._socket.recv(1)
        if answer != b"\0":
            number = answer[0] if answer else 0
            raise OSError(number, os.strerror(number))


def answer(sock: socket.socket, device: int) -> bool:
    """The daemon's end: mark the directory that ``sock`` has a descriptor of, which is on the file system ``device``.

    Returns False where nobody asks any more. Does not block: at most one mark is under way.
    """
    try:
        data, sent, _, _ = sock.recvmsg(1, _socket.CMSG_SPACE(_FD.size))
        fds = [fd for _, kind, body in sent if kind == _socket.SCM_RIGHTS for (fd,) in _FD.iter_unpack(body)]
        if not data:
            return False
        number = 0
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
