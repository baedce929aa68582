"""A program that answers system calls of containers (seccomp_unotify(2)): it refuses each with one error."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

# struct seccomp_notif and seccomp_notif_resp of linux/seccomp.h, and the ioctls that take them.
_REQUEST_SIZE = 80
_ANSWER = struct.Struct("=QqiI")
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_MAX_STATE = 1 << 16


class SeccompAgent:
    """Listens at ``path``. ``states`` has what an OCI runtime said of each process (ContainerProcessState)."""

    def __init__(self, path: str, code: int) -> None:
        self.states: list[dict[str, Any]] = []
        self._code = code
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen()
        self._thread = threading.Thread(target=self._accept)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Answer calls while the block lasts, and until the processes in question have ended."""
        self._thread.start()
        try:
            yield
        finally:
            self._socket.shutdown(socket.SHUT_RDWR)
            self._thread.join()
            self._socket.close()

    def _accept(self) -> None:
        threads = []
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                break
            with connection:
                state, found, _, _ = connection.recvmsg(_MAX_STATE, socket.CMSG_SPACE(4))
            if not state:
                continue  # the OCI runtime has connected, and failed then
            self.states.append(json.loads(state))
            listener = array.array("i", found[0][2])[0]
            threads.append(threading.Thread(target=self._answer, args=(listener,)))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def _answer(self, listener: int) -> None:
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        while poll.poll()[0][1] & select.POLLIN:  # and not POLLHUP: the filter's last process has ended
            request = bytearray(_REQUEST_SIZE)
            try:
                fcntl.ioctl(listener, _RECEIVE, request)
                answer = bytearray(_ANSWER.pack(struct.unpack_from("=Q", request)[0], 0, -self._code, 0))
                fcntl.ioctl(listener, _SEND, answer)
            except OSError as e:
                if e.errno != errno.ENOENT:  # a signal has ended the call
                    raise
        os.close(listener)
