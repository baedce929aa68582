"""A plugin of the node (NRI), a process of its own, that can be killed or stopped where it is told something.

``python -m tests.support.faulty_plugin`` is the process. It writes a line "plugin>METHOD#N" to the log of points for
each request, while the file "plugin-order" is there, which names the point and the fault. The file "plugin-told" has a
line for each request at any time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import ClassVar

from tests.support.node import Node
from tests.support.nri_plugin import SERVICE, plugged
from tests.support.waiting import eventually


class FaultyPlugin:
    """The test's side: the process, which :meth:`ensure` starts where it does not run."""

    FAULTS: ClassVar = ("killed", "stopped")

    def __init__(self, base: str, log: str) -> None:
        self._base, self._log = base, log
        self._process: subprocess.Popen[bytes] | None = None

    def ensure(self, node: Node) -> None:
        """Have the plugin run and be connected."""
        ready = Path(self._base, "plugin-ready")
        if self._process is not None and self._process.poll() is None and ready.exists():
            return
        self.close()
        words = [sys.executable, "-m", "tests.support.faulty_plugin"]
        # Not in the command line: what has the node's directory in that is left by the daemon.
        where = {"FAULTY_PLUGIN": f"{self._base}:{self._log}"}
        self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, env={**os.environ, **where})
        eventually(ready.exists)

    def told(self) -> Counter[str]:
        """How often it was asked for each method, but for the bystander."""
        with contextlib.suppress(FileNotFoundError):
            return Counter(Path(self._base, "plugin-told").read_text().split())
        return Counter()

    def record(self) -> None:
        self.harm("none", "")

    def harm(self, point: str, fault: str) -> None:
        Path(self._base, "plugin-order.new").write_text(f"{point} {fault}\n")
        os.rename(f"{self._base}/plugin-order.new", f"{self._base}/plugin-order")

    def off(self) -> None:
        Path(self._base, "plugin-order").unlink(missing_ok=True)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        Path(self._base, "plugin-ready").unlink(missing_ok=True)


def main() -> None:
    base, log_path = os.environ["FAULTY_PLUGIN"].split(":")
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    told = os.open(f"{base}/plugin-told", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    counts = Counter[str]()
    lock = threading.Lock()
    seen: list[tuple[int, int]] = []

    def reached(method: str, request: object) -> None:
        if getattr(getattr(request, "pod", None), "name", "") == "bystander":
            return
        os.write(told, f"{method}\n".encode())
        try:
            with open(f"{base}/plugin-order") as f:
                wanted, _, fault = f.read().strip().partition(" ")
                status = os.fstat(f.fileno())
        except FileNotFoundError:
            return
        with lock:
            if seen != [(status.st_ino, status.st_mtime_ns)]:
                seen[:] = [(status.st_ino, status.st_mtime_ns)]
                counts.clear()
            counts[method] += 1
            point = f"plugin>{method}#{counts[method]}"
        if point != wanted:
            os.write(log, f"{point}\n".encode())
            return
        os.unlink(f"{base}/plugin-order")
        os.write(log, f"hit {point}\n".encode())
        if fault == "stopped":
            os.write(log, f"stopped {os.getpid()}\n".encode())
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    def answer(method: str):  # type: ignore[no-untyped-def]  # of any method
        return lambda request: reached(method, request)

    others = {method.name for method in SERVICE.methods} - {"Configure", "Synchronize", "Shutdown"}
    with plugged(f"{base}/nri/nri.sock", **{name: answer(name) for name in others}) as plugin:
        Path(base, "plugin-ready").touch()
        plugin.closed.wait()
    Path(base, "plugin-ready").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
