"""A container that writes much: how long until all is in its log, and what CPU time the runtime takes for it."""

from __future__ import annotations

import os
import subprocess
import time

from bench.lives import Pod
from bench.nodes import Node
from bench.processes import on_cpu
from bench.run import Run
from bench.table import FLOOR

_LINE = "x" * 99  # and a newline
_LAST = "the-last-line"
_DEADLINE = 300.0


def measure(run: Run) -> None:
    """The floor is the same producer, with cat between it and the file."""
    script = f"yes {_LINE} | head -n {run.sizes.log_lines}; echo {_LAST}; exec sleep 100000"
    with run.nodes() as nodes:
        for number, node in run.turns([None, *nodes], warm_up=True):
            seconds, cpu = _logged(node, number, script) if node else _by_cat(nodes[0].logs, script)
            if number:
                run.add("log-time", node.name if node else FLOOR, seconds)
                run.add("log-cpu", node.name if node else FLOOR, cpu)


def _logged(node: Node, number: int, script: str) -> tuple[float, float]:
    """The container waits at the end, so that its shim is still there to be asked for its CPU time."""
    pod = Pod(node, f"log{number}", command=["sh", "-c", script])
    path = f"{node.logs}/log{number}/main.log"
    before, began = on_cpu([node.process.pid, *node.helpers()]), time.monotonic()
    pod.up()
    _await_last_line(path)
    seconds, cpu = time.monotonic() - began, on_cpu([node.process.pid, *node.helpers()]) - before
    pod.down()
    os.unlink(path)
    return seconds, cpu


def _by_cat(directory: str, script: str) -> tuple[float, float]:
    path = f"{directory}/floor.log"
    began = time.monotonic()
    with open(path, "wb") as file:
        producer = subprocess.Popen(["busybox", "sh", "-c", script], stdout=subprocess.PIPE)
        cat = subprocess.Popen(["cat"], stdin=producer.stdout, stdout=file)
    _await_last_line(path)
    seconds, cpu = time.monotonic() - began, on_cpu([cat.pid])
    producer.kill()
    for process in (producer, cat):
        process.wait()
    os.unlink(path)
    return seconds, cpu


def _await_last_line(path: str) -> None:
    deadline = time.monotonic() + _DEADLINE
    while time.monotonic() < deadline:
        time.sleep(0.005)
        if os.path.exists(path):
            with open(path, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 80))
                if _LAST.encode() in file.read():
                    return
    raise RuntimeError(f"{path} does not get its last line")
