"""The matrix: every operation with a fault at every one of its points, on a real daemon."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from criserver.cli.client import method
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.faults.operations import ADMIN, BASE_IMAGE, IMAGE, Operation, archives, fails, run_again
from tests.support.faulty import EVENTS, Control
from tests.support.fixtures import import_image
from tests.support.node import Node
from tests.support.waiting import SLOWNESS, eventually

# Seconds that what is left may take to go.
_PATIENCE = 30.0
# Seconds that a task may go on after its call has returned.
_AFTER = 0.3
START_UP = "start-up"
# Where the daemon is killed before the start-up: one CNI plugin of the pod has been run, and the other has not.
_CUT = "program_start:start:os.posix_spawn#2"


@dataclass
class Result:
    """What was found of an operation. ``missed`` are points that a run did not reach.

    ``lasting`` are errors that lasted until the call had ended. ``by_fault`` counts the faults of helpers. ``tell``
    gets each failure at once.
    """

    operation: str
    points: int = 0
    kills: int = 0
    errors: int = 0
    lasting: int = 0
    missed: int = 0
    by_fault: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    tell: Callable[[str], object] = str

    def fail(self, words: str) -> None:
        """Note a failure."""
        self.failures.append(words)
        self.tell(words)


class Matrix:
    """A node whose daemon has the audit hook."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._log = f"{node.base}/points"
        self._read = 0  # how many bytes of it
        self.control = Control(f"{node.base}/control")
        node.program = ["-m", "tests.support.faulty", f"{node.base}/control", self._log]
        self._images: set[str] = set()

    def begin(self, archive: str) -> None:
        """Import the image of containers, and keep in mind what images are here: they stay."""
        import_image(self.node, archive)
        self._archive = archive
        self._images = content_of(self.node)

    def points(self, operation: Operation) -> list[str]:
        """The points of an operation, in their order."""
        known = operation.prepare(self.node)
        self._taken()
        self.control.record()
        operation.call(self.node, known)
        time.sleep(_AFTER * SLOWNESS)
        self.control.off()
        points = self._taken()
        assert (left := self.cleaned()) == [], left
        return points

    def kill(self, operation: Operation, point: str, result: Result) -> None:
        """A SIGKILL at a point, a new daemon, the retry, the removal of all."""
        node = self.node
        known = operation.prepare(node)
        self.control.hit(point)
        said = fails(lambda: operation.call(node, known))
        reached = self.hit()
        self.control.off()
        if reached or self.hit():  # the second time for one that was on its way as the first wait ended
            assert node.process is not None
            node.process.wait(60 * SLOWNESS)
            node.client.channel.close()
            self._name_pods()
            node.start()
            result.kills += 1
            said = fails(lambda: operation.again(node, known))
        else:
            result.missed += 1
        self._judge(f"{operation.name}: SIGKILL at {point}", said, result)

    def error(self, operation: Operation, point: str, number: int, result: Result, *, lasting: bool = False) -> None:
        """An error at a point: the daemon lives, and the retry succeeds. A lasting one ends when the call has ended."""
        node = self.node
        known = operation.prepare(node)
        self.control.hit(point, number, lasting=lasting)
        said = fails(lambda: operation.call(node, known))
        where = f"{operation.name}: {'lasting ' if lasting else ''}{errno.errorcode[number]} at {point}"
        if self.hit():
            result.errors += not lasting
            result.lasting += lasting
        else:
            result.missed += 1
        self.control.off()
        # A disk that fails is the one error that is nobody's doing. A shim that takes no message ends an exec's time.
        silent = lasting and number == errno.EAGAIN and point.partition("#")[0].endswith(("send", "connect"))
        allowed = ({"INTERNAL"} if number == errno.EIO else set()) | ({"DEADLINE_EXCEEDED"} if silent else set())
        if said.partition(":")[0] in {"UNKNOWN", "DEADLINE_EXCEEDED", "INTERNAL"} - allowed:
            result.fail(f"{where}: the call says {said}")
        self._name_pods()
        if said:
            said = fails(lambda: operation.again(node, known))
        self._judge(where, said, result)

    def points_of_start(self) -> list[str]:
        """The points of a start-up with a crashed operation behind it, in their order."""
        self._wreck()
        before = self._recoveries()
        self.control.record()
        self.node.start()
        eventually(lambda: self._recoveries() > before)
        self.control.off()
        points = self._taken()
        assert (left := self.cleaned()) == [], left
        return points

    def fail_start(self, point: str, number: int, result: Result, *, lasting: bool = False) -> None:
        """A fault at a point of the start-up, and another start where the daemon has ended. 0 is a SIGKILL.

        A lasting error ends when the daemon has ended or has recovered. The container that ran before must run on, and
        the pod that was cut off can be made.
        """
        node = self.node
        container = self._wreck()
        before, told = self._recoveries(), len(node.daemon_log())
        self.control.hit(point, number, lasting=lasting)
        fails(node.start)
        assert node.process is not None
        eventually(lambda: self._recoveries() > before or node.process is None or node.process.poll() is not None)
        if self.hit():
            result.errors += bool(number) and not lasting
            result.lasting += lasting
            result.kills += not number
        else:
            result.missed += 1
        self.control.off()
        said = ""
        fault = f"{'lasting ' if lasting else ''}{errno.errorcode[number]}" if number else "SIGKILL"
        where = f"{START_UP}: {fault} at {point}"
        if node.process.poll() is not None:
            # gRPC ends the process if it gets no socket. The daemon looks for descriptors just before.
            words = node.daemon_log()[told:]
            if number and not _in_words(words) and "grpc/aio/_server.py" not in words:
                result.fail(f"{where}: the daemon has ended without saying why: {words[-1000:]}")
            node.client.channel.close()
            said = fails(node.start)
        said = said or fails(lambda: run_again(node))
        if not said and (state := node.status(container).state) != cri.CONTAINER_RUNNING:
            result.fail(f"{where}: the container that ran is {cri.ContainerState.Name(state)}")
        self._judge(where, said, result)

    def _wreck(self) -> str:
        """A daemon that was killed while it made a pod; another pod has a container that is created and one that runs.

        Returns the ID of the one that runs.
        """
        node = self.node
        pod = node.run_pod("other")
        node.create(pod, "created", ["sleep", "1000"])
        container = node.run(pod, "running", ["sleep", "1000"])
        self.control.hit(_CUT)
        fails(lambda: node.run_pod("pod"))
        assert self.hit()
        assert node.process is not None
        node.process.wait(60 * SLOWNESS)
        node.client.channel.close()
        self.control.off()
        self._name_pods()
        return container

    def _recoveries(self) -> int:
        return self.node.daemon_log().count('"recovered"')

    def _judge(self, where: str, said: str, result: Result) -> None:
        if said:
            result.fail(f"{where}: the retry says {said}")
        left = self.cleaned()
        if left:
            result.fail(f"{where}: left: {'; '.join(left)}")
            self._heal()
        for line in self.node.complaints():
            result.fail(f"{where}: the log says {line}")

    def _heal(self) -> None:
        """A new daemon for the next point, as what was left must not be counted twice."""
        node = self.node
        if node.process is not None and node.process.poll() is None:
            node.kill()
        node.start()
        if self.cleaned():
            method(node.client.channel, ADMIN, "PruneImages")(admin.PruneImagesRequest(all=True), timeout=60)
            self.begin(self._archive)

    def cleaned(self) -> list[str]:
        """Remove all pods and the image; what is left then."""
        node = self.node
        assert node.process is not None
        if node.process.poll() is not None:
            return [f"the daemon has ended with {node.process.returncode}"]
        if said := fails(node.remove_pods):
            return [f"removing says {said}"]
        if said := fails(self._remove_images):
            return [f"removing the images says {said}"]
        # A blob or layer whose deletion has failed is garbage, which the next collection deletes.
        method(node.client.channel, ADMIN, "PruneImages")(admin.PruneImagesRequest(), timeout=60)
        deadline = time.monotonic() + _PATIENCE * SLOWNESS
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left

    def _remove_images(self) -> None:
        """All but the image of containers."""
        client = self.node.client
        client.RemoveImage(image={"image": IMAGE})
        for image in client.ListImages().images:
            if BASE_IMAGE not in image.repo_tags:
                client.RemoveImage(image={"image": image.id})

    def _left(self) -> list[str]:
        return left_on(self.node) + sorted(content_of(self.node) ^ self._images)

    def _name_pods(self) -> None:
        """The pods whose IDs no call has returned: their cgroups count too."""
        with contextlib.suppress(FileNotFoundError):
            Node.pods.update(os.listdir(f"{self.node.state}/records/sandboxes"))

    def hit(self) -> bool:
        """Whether the daemon reaches the point that it was to fail at. Some are those of tasks after the call."""
        deadline = time.monotonic() + _AFTER * SLOWNESS
        while not any(line.startswith("hit ") for line in self._taken()):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def _taken(self) -> list[str]:
        """The whole lines of the log since the last call."""
        with contextlib.suppress(FileNotFoundError):
            with open(self._log, "rb") as f:
                f.seek(self._read)
                found = f.read()
            whole = found[: found.rfind(b"\n") + 1]
            self._read += len(whole)
            return whole.decode().splitlines()
        return []


def _in_words(log: str) -> bool:
    """Whether a daemon's last log says in one line why it has ended."""
    return any(line.startswith("criserver: ") for line in log.splitlines())


def left_on(node: Node) -> list[str]:
    """What is left on a node without pods, but for images: see :meth:`Node.leftovers`, and rows and open logs."""
    found = node.leftovers()
    with contextlib.closing(sqlite3.connect(f"file:{node.root}/criserver.db?mode=ro", uri=True)) as db:
        for table in ("sandboxes", "containers"):
            found += [f"row {table} {key}" for (key,) in db.execute(f"SELECT key FROM {table}")]
    for table in ("sandboxes", "containers"):
        found += [f"copy {table} {name}" for name in os.listdir(f"{node.state}/records/{table}")]
    return found + [f"open {path}" for path in node.descriptors() if path.startswith(node.logs)]


def content_of(node: Node) -> set[str]:
    """The blobs, layers and rows of images."""
    found = set()
    for place in ("content/blobs/sha256", "snapshots/layers", "spool"):
        with contextlib.suppress(FileNotFoundError):
            found |= {f"{place}/{name}" for name in os.listdir(f"{node.root}/{place}")}
    with contextlib.closing(sqlite3.connect(f"file:{node.root}/criserver.db?mode=ro", uri=True)) as db:
        for table in ("images", "image_names"):
            found |= {f"row {table} {key}" for (key,) in db.execute(f"SELECT key FROM {table}")}
    return found


def errors_of(point: str) -> tuple[int, ...]:
    """The errors that the kernel gives at a point."""
    return EVENTS[point.rsplit("#", 1)[0].split(":", 2)[2]]


def sample(points: Sequence[str], pick: random.Random) -> list[str]:
    """Each place once, with one of its occurrences."""
    places: dict[str, list[str]] = {}
    for point in points:
        places.setdefault(point.rsplit("#", 1)[0], []).append(point)
    return [pick.choice(found) for found in places.values()]


def table(results: list[Result]) -> str:
    """The table of docs/reliability.md."""
    head = f"| operation | points | kills | errors | lasting | not reached | failures |\n|{'---|' * 7}"
    lines = [
        f"| {r.operation} | {r.points} | {r.kills} | {r.errors} | {r.lasting} | {r.missed} | {len(r.failures)} |"
        for r in results
    ]
    return "\n".join((head, *lines))


@contextlib.contextmanager
def standing(node: Node, directory: str) -> Iterator[Matrix]:
    """A matrix on ``node``, whose daemon runs in the block. ``directory`` is for the archives of its images."""
    base, _ = archives(directory)
    try:
        matrix = Matrix(node)
        node.start()
        matrix.begin(base)
        yield matrix
    finally:
        node.close()
