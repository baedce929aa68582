"""How fast a shim logs: 100-byte lines through a pipe into a log file, beside `cat` doing no framing at all.

    python bench/log_throughput.py [DIRECTORY] [MEGABYTES]

DIRECTORY is where the files are written (default /dev/shm, so that the disk is not what is measured).
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from shims.log_writer import LogWriter
from shims.loop import Loop
from shims.output import Output

LINE = b"x" * 99 + b"\n"


def _log(fd: int, path: Path) -> None:
    loop = Loop()
    log = LogWriter(str(path))
    output = Output(loop, fd, "stdout", log)
    loop.until(lambda: output.ended)
    assert log.dropped == 0


def _cat(fd: int, path: Path) -> None:
    with path.open("wb") as file:
        subprocess.run(["cat"], stdin=fd, stdout=file, check=True)


def measure(sink: Callable[[int, Path], None], source: Path, target: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a process that runs `sink` on what another writes into a pipe."""
    reader, writer = os.pipe()
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        sink(reader, target)
        os._exit(0)
    with source.open("rb") as file:
        producer = subprocess.Popen(["cat"], stdin=file, stdout=writer)
    os.close(reader)
    os.close(writer)
    _, status, usage = os.wait4(pid, 0)
    wall = time.monotonic() - begun
    assert status == 0
    assert producer.wait() == 0
    return wall, _cpu(usage)


def _cpu(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Print a line for each way, the best of three."""
    directory = sys.argv[1] if len(sys.argv) > 1 else "/dev/shm"
    megabytes = int(sys.argv[2]) if len(sys.argv) > 2 else 300
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        source, target = Path(scratch, "source"), Path(scratch, "target")
        block = LINE * 10_000
        with source.open("wb") as file:
            for _ in range(megabytes):
                file.write(block)
        for name, sink in (("shim", _log), ("cat", _cat)):
            results = []
            for _ in range(3):
                results.append(measure(sink, source, target))
                target.unlink()
            wall, cpu = min(results)
            print(f"{name:5} {megabytes / wall:6.0f} MB/s  {wall:5.2f} s, {cpu:5.2f} s of CPU")


if __name__ == "__main__":
    main()
