"""The faults of the soak, each for a second or two, and the kills of the daemon."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from criserver.runtime import cgroups
from tests.support.frozen_disk import frozen, give_disk
from tests.support.node import Node, processes

_DISK = 1 << 30
# Seconds between two faults, and how long one lasts.
_BETWEEN = (2.0, 5.0)
_LASTS = 1.0
_FROZEN = 2.0
_BRIDGE = """#!/bin/sh
[ ! -e {base}/cni-fails ] || {{ echo '{{"code": 11, "msg": "try again later"}}'; exit 1; }}
exec /usr/lib/cni/bridge
"""


def soak_node(scratch: str, watch: str | None) -> Node:
    """A node whose root is an ext4 of its own, with a bridge plugin that can fail, and a limit of processes."""
    node = Node()
    give_disk(node, f"{scratch}/disk", _DISK)
    plugin = Path(node.base, "bin", "bridge")
    plugin.parent.mkdir()
    plugin.write_text(_BRIDGE.format(base=node.base))
    plugin.chmod(0o755)
    os.mkdir(limit_of(node))
    module = f"bench.watched {watch}" if watch else "criserver"
    script = f'echo $$ > {limit_of(node)}/cgroup.procs; exec {sys.executable} -m {module} "$@"'
    node.python, node.program = "/bin/sh", ["-c", script, "sh"]
    close = node.close

    def closed() -> None:
        close()
        os.rmdir(limit_of(node))

    node.close = closed
    return node


def limit_of(node: Node) -> str:
    """The cgroup of the daemon and its helpers, which limits how many they are."""
    roots = cgroups.roots()
    return f"{roots.get('pids') or roots['']}/criserver-soak-{os.path.basename(node.base)}"


class Troubles:
    """``counts`` says how often each fault was made; ``without_shim`` are containers whose shims were killed."""

    def __init__(self, node: Node, pick: random.Random) -> None:
        self.node = node
        self.counts = Counter[str]()
        self.without_shim: set[str] = set()
        self.kills: list[float] = []
        self._pick = pick
        self._began = time.monotonic()
        self._kinds: dict[str, Callable[[], AbstractContextManager[None]]] = {
            "nursery killed": lambda: self._nursery(signal.SIGKILL),
            "nursery stopped": lambda: self._nursery(signal.SIGSTOP),
            "shim killed": lambda: self._shim(signal.SIGKILL),
            "shim stopped": lambda: self._shim(signal.SIGSTOP),
            "CNI fails": self._cni_fails,
            "process limit": self._process_limit,
            "disk full": self._disk_full,
            "disk frozen": lambda: frozen(node.root),
        }

    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def next(self, seconds: float) -> None:
        """Faults for so many seconds, then a kill of the daemon and a new one. Some faults last through the kill."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > _BETWEEN[1]:
            time.sleep(self._pick.uniform(*_BETWEEN))
            with self._one():
                pass
        time.sleep(max(0, left))
        assert self.node.process is not None
        with self._one() if self._pick.random() < 0.3 else contextlib.nullcontext():
            # Its end is not waited for here: a thread that writes to a frozen disk ends when the disk is thawed.
            self.node.process.kill()
            self.kills.append(self.seconds())
        self.node.kill()
        self.node.start()

    @contextmanager
    def _one(self) -> Iterator[None]:
        name = self._pick.choice(list(self._kinds))
        print(f"{self.seconds():.0f} s: {name}", file=sys.stderr, flush=True)
        with self._kinds[name]():
            yield
            time.sleep(_FROZEN if name == "disk frozen" else _LASTS)
        self.counts[name] += 1

    @contextmanager
    def _nursery(self, number: signal.Signals) -> Iterator[None]:
        with _signalled([pid for pid, name, _ in self._helpers() if name == "criserver-nurse"], number):
            yield

    @contextmanager
    def _shim(self, number: signal.Signals) -> Iterator[None]:
        shims = [(pid, where) for pid, name, where in self._helpers() if name == "criserver-shim"]
        chosen = self._pick.sample(shims, min(1, len(shims)))
        if number is signal.SIGKILL:
            self.without_shim.update(os.path.basename(where) for _, where in chosen)
        with _signalled([pid for pid, _ in chosen], number):
            yield

    @contextmanager
    def _cni_fails(self) -> Iterator[None]:
        with open(f"{self.node.base}/cni-fails", "w"):
            pass
        yield
        os.unlink(f"{self.node.base}/cni-fails")

    @contextmanager
    def _process_limit(self) -> Iterator[None]:
        where = Path(limit_of(self.node))
        where.joinpath("pids.max").write_text(str(int(where.joinpath("pids.current").read_text()) + 1))
        try:
            yield
        finally:
            where.joinpath("pids.max").write_text("max")

    @contextmanager
    def _disk_full(self) -> Iterator[None]:
        path = f"{self.node.root}/full"
        try:
            with open(path, "wb") as f, contextlib.suppress(OSError):
                size = 64 << 20
                while size >= 4096:
                    try:
                        os.posix_fallocate(f.fileno(), os.fstat(f.fileno()).st_size, size)
                    except OSError:
                        size //= 2
            yield
        finally:
            os.unlink(path)

    def _helpers(self) -> Iterator[tuple[int, str, str]]:
        """PID, program and directory of the nursery and the shims."""
        for pid, words in processes():
            if "shims.nursery_process" in words:
                with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as f:
                    yield pid, f.read().strip(), words.rpartition(" in ")[2]


@contextmanager
def _signalled(pids: list[int], number: signal.Signals) -> Iterator[None]:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    yield
    for pid in pids if number is signal.SIGSTOP else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
