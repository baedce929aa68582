"""Stops shims, as a debugger does."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

from criserver.runtime import pidfd
from tests.support.node import Node, processes


class Freezer:
    """Stops shims; they go on when it is closed."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.stopped: dict[str, int] = {}

    def shims(self, *keys: str) -> dict[str, int]:
        """The shims of containers, or of a pod's infra process."""
        found: dict[str, int] = {}
        for pid, words in processes():
            place, _, key = words.rpartition("/")
            if key in keys and place.endswith(f"in {self.node.state}/containers") and "shims" in words:
                found[key] = pid
        assert found.keys() == set(keys)
        return found

    def freeze(self, *keys: str) -> None:
        """Stop the shims of containers, or of a pod's infra process."""
        for key, pid in self.shims(*keys).items():
            os.kill(pid, signal.SIGSTOP)
            self.stopped[key] = pid

    def thaw(self) -> None:
        for pid in self.stopped.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def gone(self) -> bool:
        """Whether none of the shims is there any more, but for what an init that takes its time has to reap."""
        return not any(pidfd.start_ticks(pid) and pidfd.zombie_code(pid) is None for pid in self.stopped.values())


@pytest.fixture
def freezer(node: Node) -> Iterator[Freezer]:
    freezer = Freezer(node)
    yield freezer
    freezer.thaw()
