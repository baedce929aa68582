"""The matrix of helper processes: each that an operation uses is killed, stopped or hangs where it is used.

The points are those of :mod:`tests.faults.matrix` at which the daemon starts a program, or sends something to a shim or
to the nursery, the calls of the OCI runtime, and what a plugin of the node (NRI) is told.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.faults.matrix import START_UP, Matrix, Result
from tests.faults.operations import Operation, fails
from tests.support import faulty_runtime
from tests.support.faulty_plugin import FaultyPlugin
from tests.support.faulty_runtime import FaultyRuntime
from tests.support.fixtures import RUNC
from tests.support.helper_faults import HELPER_EVENTS
from tests.support.node import Node
from tests.support.waiting import SLOWNESS, eventually

# Shorter here: in seconds, on a machine of usual speed.
DEADLINES = {
    "criserver.runtime.nursery.FORK_TIMEOUT": 1,
    "criserver.runtime.nursery.START_TIMEOUT": 2,
    "criserver.runtime.shim_link.REPLY_TIMEOUT": 1.5,
    "criserver.runtime.container_process.START_TIMEOUT": 3,
    "criserver.runtime.container_process._GONE_TIMEOUT": 1.5,
    "criserver.runtime.container_process._SHIM_PATIENCE": 1,
    "criserver.runtime.oci_runtime._DELETE_TIMEOUT": 1.5,
    "criserver.runtime.oci_runtime._UPDATE_TIMEOUT": 2,
    "criserver.network.user_namespace._DEADLINE": 2,
    "snapshotter.overlay._USERNS_SECONDS": 2,
    "criserver.runtime.oci_runtime._FEATURES_TIMEOUT": 2,
    "criserver.daemon.FEATURES_INTERVAL": 1,
    "snapshotter.limits.LayerLimits.max_stall": 2,
}
_CNI_TIMEOUT = 2
# A call that takes longer than this has waited for the helper.
_LONG = 1.0
# All deadlines above together are shorter than this.
_LIMIT = 30.0
# Its gRPC codes say that the daemon is at fault, or that nobody knows who is.
_WRONG = ("INTERNAL", "UNKNOWN")


class HelperMatrix(Matrix):
    """A node whose helpers can be harmed. A pod with a container, the bystander, is beside each operation."""

    def __init__(self, node: Node) -> None:
        """``node`` is made with :func:`helper_node`."""
        super().__init__(node)
        words = [f"{name}={seconds * SLOWNESS}" for name, seconds in DEADLINES.items()]
        node.program = [*node.program, *words]
        config = Path(node.config)
        limit = f"timeout = {int(10 * SLOWNESS)}\n"
        config.write_text(config.read_text().replace(limit, f"timeout = {int(_CNI_TIMEOUT * SLOWNESS)}\n"))
        self.runtime = FaultyRuntime(node)
        node.program = [f"PATH={self.runtime.programs}:{os.environ['PATH']}", node.python, *node.program]
        node.python = "/usr/bin/env"
        self.plugin = FaultyPlugin(node.base, self._log)
        self._calls = ThreadPoolExecutor(1)

    def close(self) -> None:
        self.plugin.close()
        self._calls.shutdown()

    def faults(self, operation: Operation) -> list[tuple[str, str]]:
        """Each point with each of its faults."""
        known = self._prepare(operation)
        self._record()
        operation.call(self.node, known)
        points = self._recorded()
        assert (left := self.cleaned()) == [], left
        return [(point, fault) for point in points for fault in _faults_of(point)]

    def harm(self, operation: Operation, point: str, fault: str, result: Result) -> None:
        """A helper is harmed at a point: the call ends, its retry succeeds, nobody else waits, nothing is left."""
        known = self._prepare(operation)
        place = self.control if _is_of_daemon(point) else self.plugin if point.startswith("plugin>") else self.runtime
        place.harm(point, fault)
        began = time.monotonic()
        call = self._calls.submit(fails, lambda: operation.call(self.node, known))
        ended: list[float] = []
        call.add_done_callback(lambda _: ended.append(time.monotonic()))
        where = f"{operation.name}: {fault} at {point}"
        stopped: list[int] = []
        hit = self._await_hit(call, stopped)
        hit_at = time.monotonic()
        if hit:
            result.by_fault[fault] += 1
            other = fails(lambda: self._bystander_calls(point))
            if other:
                result.fail(f"{where}: a call of another pod says {other}")
            # A call that waited for its helper is still waiting when the others have been answered.
            if ended and ended[0] - hit_at > _LONG * SLOWNESS:
                result.fail(f"{where}: calls of another pod took {time.monotonic() - hit_at:.1f} s")
        else:
            result.missed += 1
        said = call.result()
        took = time.monotonic() - began
        for place in (self.control, self.plugin, self.runtime):
            place.off()
        stopped += self._stopped()
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        if took > _LIMIT * SLOWNESS:
            result.fail(f"{where}: the call took {took:.1f} s")
        if said.startswith(_WRONG) or "Deadline Exceeded" in said:
            result.fail(f"{where}: the call says {said}")
        self.plugin.ensure(self.node)
        self._name_pods()
        if said:
            said = fails(lambda: operation.again(self.node, known))
        self._judge(where, said, result)

    def faults_of_start(self) -> list[tuple[str, str]]:
        """Each point of a start-up with each of its faults."""
        self.node.kill()
        self._taken()
        self._record()
        self.node.start()
        return [(point, fault) for point in self._recorded() for fault in _faults_of(point)]

    def harm_start(self, point: str, fault: str, result: Result) -> None:
        """A helper of the start-up is harmed: in bounded time the daemon serves, or ends and the next one serves.

        Soon it has all that it had before.
        """
        node = self.node
        pod = node.run_pod("other")
        container = node.run(pod, "running", ["sleep", "1000"])
        before = node.client.Status().runtime_handlers
        node.kill()
        self._taken()
        (self.control if _is_of_daemon(point) else self.runtime).harm(point, fault)
        began = time.monotonic()
        said = fails(lambda: node.start(recovered=False))
        took = time.monotonic() - began
        where = f"{START_UP}: {fault} at {point}"
        stopped: list[int] = []
        if self._await_hit(self._calls.submit(str), stopped):
            result.by_fault[fault] += 1
        else:
            result.missed += 1
        self.control.off()
        self.runtime.off()
        for pid in stopped + self._stopped():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        if took > _LIMIT * SLOWNESS:
            result.fail(f"{where}: the start took {took:.1f} s")
        assert node.process is not None
        if node.process.poll() is not None:
            node.client.channel.close()
            said = fails(node.start)
        if not said:
            said = fails(lambda: eventually(lambda: node.client.Status().runtime_handlers == before))
        said = said or fails(lambda: node.create(pod, "late", ["sleep", "1000"]))
        if not said and (state := node.status(container).state) != cri.CONTAINER_RUNNING:
            said = f"the container that ran is {cri.ContainerState.Name(state)}"
        self._judge(where, said, result)

    def _prepare(self, operation: Operation) -> str:
        self.plugin.ensure(self.node)
        self.bystanding = self.node.run_pod("bystander")
        self.bystander = self.node.run(self.bystanding, "b", ["sleep", "1000"])
        self.runtime.spare(self.bystander)
        before = self.plugin.told()
        known = operation.prepare(self.node)
        eventually(lambda: self._is_told(self.plugin.told() - before))
        self._taken()
        return known

    def _is_told(self, told: Counter[str]) -> bool:
        """Whether the plugin has taken all events of a preparation: it is told of some after their calls."""
        exited = self.node.client.ListContainers(filter={"state": {"state": cri.CONTAINER_EXITED}}).containers
        posts = all(told[f"Post{name}"] == told[name] for name in ("CreateContainer", "StartContainer"))
        return posts and told["StopContainer"] == len(exited)

    def _bystander_calls(self, point: str) -> None:
        """Calls of another pod, and one that makes a container where they do not share the helper."""
        node = self.node
        node.client.Status()
        node.client.ListContainers()
        node.status(self.bystander)
        assert node.client.ExecSync(container_id=self.bystander, cmd=["true"], timeout=5).exit_code == 0
        if "send" not in point and "plugin>" not in point:
            node.run(self.bystanding, "new", ["sleep", "1000"])

    def _record(self) -> None:
        self.control.record()
        self.runtime.record()
        self.plugin.record()

    def _recorded(self) -> list[str]:
        time.sleep(0.3 * SLOWNESS)
        for place in (self.control, self.plugin, self.runtime):
            place.off()
        return [point for point in self._taken() if _faults_of(point)]

    def _await_hit(self, call: Future[str], stopped: list[int]) -> bool:
        """Whether the point is reached, by the call or a task after it."""
        end = None
        while True:
            lines = self._taken()
            stopped += [int(line.split()[1]) for line in lines if line.startswith("stopped ")]
            if any(line.startswith("hit ") for line in lines):
                return True
            if call.done():
                end = end or time.monotonic() + 0.3 * SLOWNESS
                if time.monotonic() > end:
                    return False
            time.sleep(0.005)

    def _stopped(self) -> list[int]:
        return [int(line.split()[1]) for line in self._taken() if line.startswith("stopped ")]


def _is_of_daemon(point: str) -> bool:
    return ">" not in point


def _faults_of(point: str) -> tuple[str, ...]:
    if point.startswith("plugin>"):
        return FaultyPlugin.FAULTS
    caller, is_program, _ = point.partition(">")
    if is_program:
        return faulty_runtime.FAULTS[caller]
    return HELPER_EVENTS.get(point.rsplit("#", 1)[0].rpartition(":")[2], ())


def helper_node() -> Node:
    """A node for the matrix, whose daemon does not run yet."""
    newer = '[runtimes.newer]\npath = "BASE/newer"\n' if RUNC else ""
    return Node(runtimes=f'ctr_stop_timeout = 10\n[runtimes.runc]\npath = "BASE/runtime"\n{newer}')


def table(results: list[Result]) -> str:
    """The table of docs/reliability.md."""
    kinds = ("killed", "cut", "stopped", "hanging", "shim killed", "shim stopped")
    head = f"| operation | {' | '.join(kinds)} | not reached | failures |\n|{'---|' * (len(kinds) + 3)}"
    lines = [
        f"| {r.operation} | {' | '.join(str(r.by_fault[kind]) for kind in kinds)} | {r.missed} | {len(r.failures)} |"
        for r in results
    ]
    return "\n".join((head, *lines))
