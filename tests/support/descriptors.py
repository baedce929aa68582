"""The file descriptors of this process: which are open, and too few of them."""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def room_for(count: int) -> Iterator[None]:
    """No more than so many descriptors can be opened."""
    gc.collect()  # what earlier tests have left would be closed meanwhile
    free = os.open("/", os.O_PATH)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def open_on(path: str | Path) -> list[str]:
    """The descriptors of this process on the file system of ``path``."""
    device = os.stat(path).st_dev
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of the listing itself
            if os.fstat(int(fd)).st_dev == device:
                found.append(fd)
    return found
