"""The daemon's answers to a worker that asks for an opaque mark."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from snapshotter import marks
from tests.support.descriptors import room_for


def test_a_mark_for_which_the_daemon_has_no_descriptor_is_refused(tmp_path: Path) -> None:
    """The worker must not take it for done: files that the layer deletes would be back."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            socket.send_fds(theirs, [b"o"], [directory])
        finally:
            os.close(directory)
        with room_for(0):
            assert marks.answer(ours, os.stat(tmp_path).st_dev)
        assert theirs.recv(1) == bytes([errno.EMFILE])
