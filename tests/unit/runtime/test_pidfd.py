"""What /proc says of a process that ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from criserver.runtime import pidfd
from tests.support.waiting import eventually

# The first thread ends alone (exit(2), not exit_group(2)). The other one goes on until standard input is closed.
_ENDS_ITS_FIRST_THREAD = """
import ctypes, os, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(3))).start()
ctypes.CDLL(None).syscall(60 if os.uname().machine == "x86_64" else 93, 0)
"""


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_process_has_ended_when_its_last_thread_has() -> None:
    with subprocess.Popen([sys.executable, "-c", _ENDS_ITS_FIRST_THREAD], stdin=subprocess.PIPE) as process:
        eventually(lambda: state(process.pid) == "Z")
        assert pidfd.zombie_code(process.pid) is None
        assert process.stdin is not None
        process.stdin.close()
        eventually(lambda: pidfd.zombie_code(process.pid) == 3)
        assert process.wait(10) == 3
    assert pidfd.zombie_code(process.pid) is None
