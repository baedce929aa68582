"""A process is ended together with all processes that it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from shims import tree
from tests.support.waiting import eventually

# Prints its own PID and those of a child, of a child in a session of its own, of a grandchild that ignores what can be
# ignored, and of one that was started by another thread.
FAMILY = """
import subprocess, sys, threading, time
sleep = "import time; time.sleep(1000)"
deaf = "import signal, subprocess, sys; signal.signal(15, signal.SIG_IGN); " \\
    "p = subprocess.Popen(['sleep', '1000']); print(p.pid, flush=True); p.wait()"
found = [subprocess.Popen(["sleep", "1000"]).pid, subprocess.Popen(["sleep", "1000"], start_new_session=True).pid]
child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
found += [child.pid, int(child.stdout.readline())]
def work():
    other = subprocess.Popen(["sleep", "1000"])
    found.append(other.pid)
    other.wait()
threading.Thread(target=work).start()
while len(found) < 5:
    time.sleep(0.01)
print(*found, flush=True)
time.sleep(1000)
"""


# Sleeps of this run alone.
OWN = f"1000.{os.getpid()}"


def family() -> tuple[subprocess.Popen[bytes], list[int]]:
    process = subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process, [process.pid, *map(int, process.stdout.readline().split())]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def gone(pids: list[int], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(runs, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_process_ends_with_its_children_and_theirs() -> None:
    process, pids = family()
    assert len(pids) == 6
    assert all(map(runs, pids))
    tree.end(process.pid)
    assert process.wait(30) == -signal.SIGKILL
    assert gone(pids)


def test_what_is_stopped_already_ends_too() -> None:
    process, pids = family()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    tree.end(process.pid)
    assert process.wait(30) == -signal.SIGKILL
    assert gone(pids)


def test_a_process_that_has_ended_is_no_error() -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    tree.end(process.pid)
    process.wait()
    tree.end(process.pid)


def test_a_process_of_somebody_else_is_left_alone() -> None:
    process, pids = family()
    tree.end(pids[1])  # a child of our child
    tree.end(process.pid, lambda: False)
    assert all(map(runs, pids))
    tree.end(process.pid, lambda: True)
    process.wait(30)
    assert gone(pids)


def test_one_that_starts_others_all_the_time() -> None:
    busy = f"import subprocess\nwhile True: subprocess.Popen(['sleep', '{OWN}'], start_new_session=True)"
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", busy])
        group = eventually(partial(_children, process.pid))
        tree.end(process.pid)
        process.wait(30)
        assert gone([*group])
        # None that was started a moment before the end has got away.
        assert _sleepers() == []


def _children(parent: int) -> set[int]:
    return {pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if tree._parent(pid) == parent}


def _sleepers() -> list[int]:
    deadline = time.monotonic() + 20
    while True:
        found = [
            int(name)
            for name in os.listdir("/proc")
            if name.isdecimal()
            and _words(name) == f"sleep\0{OWN}\0".encode()
            and tree._parent(int(name)) in (1, os.getpid())
        ]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def _words(name: str) -> bytes:
    try:
        return Path(f"/proc/{name}/cmdline").read_bytes()
    except OSError:
        return b""
