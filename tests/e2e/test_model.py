"""Random sequences of calls to a real daemon, beside a model of what each call answers and what lists show after it.

CRISERVER_MODEL_EXAMPLES is the number of sequences for a long run, which are others each time; without it there are
few, always the same.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from typing import Any

import grpc
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import pidfd
from tests.support.node import UNTIL_GO, Node
from tests.support.waiting import SLOWNESS, eventually

EXAMPLES = os.environ.get("CRISERVER_MODEL_EXAMPLES")
SETTINGS = settings(
    max_examples=int(EXAMPLES or 15),
    stateful_step_count=50,
    derandomize=EXAMPLES is None,
    deadline=None,
    database=None,
    print_blob=True,
    report_multiple_bugs=False,
    # A search for a shorter sequence takes many minutes with a real daemon.
    phases=(Phase.generate,) if EXAMPLES is None else (Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)

OK = grpc.StatusCode.OK
TWICE, GONE, NOT_NOW = (
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
)
CREATED, RUNNING, EXITED = cri.CONTAINER_CREATED, cri.CONTAINER_RUNNING, cri.CONTAINER_EXITED
READY, NOT_READY = cri.SANDBOX_READY, cri.SANDBOX_NOTREADY

METHODS = (
    "RunPodSandbox",
    "CreateContainer",
    "StartContainer",
    "StopContainer",
    "RemoveContainer",
    "StopPodSandbox",
    "RemovePodSandbox",
)

# It ends by itself with 3 once there is a file; a stop signal ends it with 7.
SCRIPT = f'trap "exit 7" TERM; {UNTIL_GO}; exit 3'
BY_ITSELF, KILLED, CUT = frozenset({3}), frozenset({137}), frozenset({128, 137})
# The signal may come before the trap is set. The first process of a PID namespace ignores it then.
STOPPED = frozenset({7, 137, 143})
# Seconds after which an impatient caller gives up, and calls again.
IMPATIENT = 0.04
# How many calls lie between two kills of the daemon, which take longer than any call.
CALLS_PER_KILL = 6

# No pod of the last name is ever made.
PODS, NEVER_MADE = ["a", "b"], "z"
CONTAINERS = [pod + name for pod in PODS for name in "xy"]
MODES = st.sampled_from([cri.CONTAINER, cri.POD, cri.NODE])
PATIENT = st.sampled_from([True, True, False])
# What a rule is about. Which name that is depends on the model, and nothing may be drawn that depends on it: how far a
# call came before a kill is another time's chance.
CHOICES = st.integers(0, 999)
DELAYS = st.sampled_from([0, 0.005, 0.01, 0.02, 0.04, 0.08])


@dataclass
class Pod:
    """A pod that is there."""

    id: str
    mode: int
    state: int = READY


@dataclass
class Container:
    """A container that is there; ``codes`` are the exit codes that it may have."""

    id: str
    pod: str
    state: int = CREATED
    codes: frozenset[int] = frozenset({0})

    def end(self, codes: frozenset[int]) -> None:
        if self.state == RUNNING:
            self.state, self.codes = EXITED, codes


class Lifecycle(RuleBasedStateMachine):
    """Pods are named by a letter, and containers by their pod's letter and their own.

    ``ids`` has the last ID of each name, also of what is removed. ``kept`` has the names for which the daemon may keep
    the outcome of an impatient call, so that a second call gets it once more.
    """

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node
        self.pods: dict[str, Pod] = {}
        self.containers: dict[str, Container] = {}
        self.ids: dict[str, str] = {}
        self.kept: set[str] = set()
        self.calls = 0

    # What a call is and answers

    def attempt(self, method: str, patience: float | None, fields: dict[str, Any]) -> tuple[grpc.StatusCode, Any]:
        deadline = {} if patience is None else {"deadline": patience * SLOWNESS}
        try:
            return OK, getattr(self.node.client, method)(**deadline, **fields)
        except grpc.RpcError as e:
            return e.code(), e.details()

    def call(self, method: str, expected: grpc.StatusCode, patient: bool, key: str = "", **fields: Any) -> Any:
        """The answer to a call; None if it is refused as expected. An impatient caller calls again after a while."""
        self.calls += 1
        allowed = {expected, OK} if key in self.kept else {expected}
        self.kept.discard(key)
        code, answer = self.attempt(method, None if patient else IMPATIENT, fields)
        if not patient and code is grpc.StatusCode.DEADLINE_EXCEEDED:
            code, answer = self.attempt(method, None, fields)
        elif not patient and code is OK and key:
            self.kept.add(key)
        assert code in allowed, f"{method} of {key or fields} is {code.name}, not {expected.name}: {answer}"
        return answer if code is OK else None

    def pod_fields(self, name: str, mode: int) -> dict[str, Any]:
        if name in self.pods:
            mode = self.pods[name].mode  # a retry is the same request
        namespaces = cri.NamespaceOption(pid=cri.NamespaceMode.Name(mode))
        security = cri.LinuxSandboxSecurityContext(namespace_options=namespaces)
        return {"config": self.node.pod(name, linux=cri.LinuxPodSandboxConfig(security_context=security))}

    def container_fields(self, name: str) -> dict[str, Any]:
        pod = self.pods.get(name[0])
        namespaces = cri.NamespaceOption(pid=cri.NamespaceMode.Name(pod.mode if pod else cri.POD))
        security = cri.LinuxContainerSecurityContext(namespace_options=namespaces)
        config = cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name=name),
            image=cri.ImageSpec(image="localhost/busybox:latest"),
            command=["sh", "-c", SCRIPT],
            log_path=f"{name}.log",
            linux=cri.LinuxContainerConfig(security_context=security),
        )
        return {"pod_sandbox_id": self.id(name[0]), "config": config}

    def id(self, name: str) -> str:
        return self.ids.get(name, "never-made")

    def in_pod(self, pod: str) -> list[str]:
        return [name for name in self.containers if name[0] == pod]

    def in_state(self, *states: int) -> list[str]:
        return [name for name, container in self.containers.items() if container.state in states]

    def startable(self) -> list[str]:
        return [name for name in self.in_state(CREATED) if self.pods[name[0]].state == READY]

    def used_pods(self) -> list[str]:
        """The pods that have had some life, so that random removals do not take most of them away too early."""
        ended = {name[0] for name in self.in_state(RUNNING, EXITED)}
        return [name for name, pod in self.pods.items() if pod.state == NOT_READY or name in ended]

    def suitable(self, method: str) -> list[str]:
        """The names for which a call does something."""
        match method:
            case "RunPodSandbox":
                return [name for name in PODS if name not in self.pods]
            case "CreateContainer":
                ready = [name for name, pod in self.pods.items() if pod.state == READY]
                return [name for name in CONTAINERS if name[0] in ready and name not in self.containers]
            case "StartContainer":
                return self.startable()
            case "RemoveContainer":
                return self.in_state(RUNNING, EXITED) or self.in_state(CREATED)
            case "StopPodSandbox":
                return [name for name in self.used_pods() if self.pods[name].state == READY]
            case "RemovePodSandbox":
                return self.used_pods()
            case _:
                return self.in_state(RUNNING)

    def pick(self, choice: int, method: str) -> str:
        """Mostly a name for which the call does something, else any other."""
        found = sorted(self.suitable(method))
        if not found or choice % 4 == 0:
            found = PODS if "PodSandbox" in method else CONTAINERS
            if method != "RunPodSandbox":
                found = [*found, NEVER_MADE]
            if method in ("StopPodSandbox", "RemovePodSandbox", "RemoveContainer"):
                found = [name for name in found if name not in self.pods and name not in self.containers] or ["nowhere"]
        return found[choice // 4 % len(found)]

    # The rules: one for each call

    @initialize(modes=st.tuples(*(MODES for _ in PODS)))
    def begin(self, modes: tuple[int, ...]) -> None:
        for name, mode in zip(PODS, modes, strict=True):
            answer = self.call("RunPodSandbox", OK, True, **self.pod_fields(name, mode))
            self.has_pod(name, answer.pod_sandbox_id, mode)
        for name in CONTAINERS:
            self.create_one(name, patient=True)
        self.start_one(CONTAINERS[0], patient=True)

    @rule(choice=CHOICES, mode=MODES, patient=PATIENT)
    def run_pod(self, choice: int, mode: int, patient: bool) -> None:
        name = self.pick(choice, "RunPodSandbox")
        fields = self.pod_fields(name, mode)
        answer = self.call("RunPodSandbox", TWICE if name in self.pods else OK, patient, name, **fields)
        if answer is not None:
            self.has_pod(name, answer.pod_sandbox_id, mode)

    def has_pod(self, name: str, pod: str, mode: int) -> None:
        if name in self.pods:
            assert self.pods[name].id == pod
            return
        assert pod not in self.ids.values()
        self.node.pods.add(pod)
        self.pods[name], self.ids[name] = Pod(pod, mode), pod

    @rule(choice=CHOICES, patient=PATIENT)
    def create(self, choice: int, patient: bool) -> None:
        self.create_one(self.pick(choice, "CreateContainer"), patient)

    @rule(choice=CHOICES, patient=PATIENT)
    def run(self, choice: int, patient: bool) -> None:
        if self.suitable("CreateContainer"):
            name = self.pick(choice | 1, "CreateContainer")
            self.create_one(name, patient)
            self.start_one(name, patient)

    def create_one(self, name: str, patient: bool) -> None:
        expected = (
            GONE if name[0] not in self.pods else self.pod_is_ready(name, TWICE if name in self.containers else OK)
        )
        answer = self.call("CreateContainer", expected, patient, name, **self.container_fields(name))
        if answer is not None:
            self.has_container(name, answer.container_id)

    def pod_is_ready(self, name: str, code: grpc.StatusCode) -> grpc.StatusCode:
        return code if self.pods[name[0]].state == READY else NOT_NOW

    def has_container(self, name: str, container: str) -> None:
        if name in self.containers:
            assert self.containers[name].id == container
            return
        assert container not in self.ids.values()
        self.containers[name], self.ids[name] = Container(container, self.id(name[0])), container

    @rule(choice=CHOICES, patient=PATIENT)
    def start(self, choice: int, patient: bool) -> None:
        self.start_one(self.pick(choice, "StartContainer"), patient)

    def start_one(self, name: str, patient: bool) -> None:
        container = self.containers.get(name)
        expected = GONE
        if container is not None:
            expected = self.pod_is_ready(name, OK if container.state == CREATED else NOT_NOW)
        answer = self.call("StartContainer", expected, patient, f"start {self.id(name)}", container_id=self.id(name))
        if answer is not None and container is not None and container.state == CREATED:
            container.state = RUNNING

    @rule(choice=CHOICES, grace=st.sampled_from([0, 1]), patient=PATIENT)
    def stop(self, choice: int, grace: int, patient: bool) -> None:
        name = self.pick(choice, "StopContainer")
        self.call("StopContainer", OK, patient, container_id=self.id(name), timeout=grace)
        if name in self.containers:
            self.containers[name].end(STOPPED if grace else KILLED)

    @rule(choice=CHOICES, patient=PATIENT)
    def remove(self, choice: int, patient: bool) -> None:
        name = self.pick(choice, "RemoveContainer")
        self.call("RemoveContainer", OK, patient, container_id=self.id(name))
        self.containers.pop(name, None)

    @rule(choice=CHOICES, patient=PATIENT)
    def stop_pod(self, choice: int, patient: bool) -> None:
        pod = self.pick(choice, "StopPodSandbox")
        self.call("StopPodSandbox", OK, patient, pod_sandbox_id=self.id(pod))
        if pod in self.pods:
            self.pods[pod].state = NOT_READY
        for name in self.in_pod(pod):
            self.containers[name].end(KILLED)

    @rule(choice=CHOICES, patient=PATIENT)
    def remove_pod(self, choice: int, patient: bool) -> None:
        pod = self.pick(choice, "RemovePodSandbox")
        self.call("RemovePodSandbox", OK, patient, pod_sandbox_id=self.id(pod))
        self.pods.pop(pod, None)
        for name in self.in_pod(pod):
            del self.containers[name]

    @rule(choice=CHOICES)
    def execute(self, choice: int) -> None:
        name = self.pick(choice, "ExecSync")
        container = self.containers.get(name)
        expected = GONE if container is None else OK if container.state == RUNNING else NOT_NOW
        answer = self.call("ExecSync", expected, True, container_id=self.id(name), cmd=["echo", "hi"], timeout=30)
        assert answer is None or (answer.stdout, answer.exit_code) == (b"hi\n", 0)

    @rule(choice=CHOICES)
    def end_by_itself(self, choice: int) -> None:
        if self.in_state(RUNNING):
            container = self.containers[self.pick(choice | 1, "ExecSync")]
            self.call("ExecSync", OK, True, container_id=container.id, cmd=["touch", "/go"], timeout=30)
            self.node.wait(container.id)
            container.end(BY_ITSELF)

    @rule(name=st.sampled_from(CONTAINERS))
    def look(self, name: str) -> None:
        self.call("PodSandboxStatus", OK if name[0] in self.pods else GONE, True, pod_sandbox_id=self.id(name[0]))
        self.call("ContainerStatus", OK if name in self.containers else GONE, True, container_id=self.id(name))

    # The daemon is killed

    @rule(choice=CHOICES, mode=MODES, method=st.sampled_from(sorted(METHODS)), delay=DELAYS)
    def crash(self, choice: int, mode: int, method: str, delay: float) -> None:
        """A kill of the daemon a moment after a call has begun; the call may have been carried out or not."""
        if self.calls < CALLS_PER_KILL:
            return
        self.calls, name = 0, self.pick(choice, method)
        pod = name[0]
        if pod in self.pods:
            mode = self.pods[pod].mode
        match method:
            case "RunPodSandbox":
                fields = self.pod_fields(pod, mode)
            case "CreateContainer":
                fields = self.container_fields(name)
            case "StopPodSandbox" | "RemovePodSandbox":
                fields = {"pod_sandbox_id": self.id(pod)}
            case _:
                fields = {"container_id": self.id(name)}
        answers: list[tuple[grpc.StatusCode, Any]] = []
        caller = threading.Thread(target=lambda: answers.append(self.attempt(method, None, fields)))
        caller.start()
        time.sleep(delay)
        self.node.kill()
        caller.join()
        self.node.start()
        eventually(lambda: '"recovered"' in self.node.daemon_log().rpartition('"serving"')[2])
        self.kept.clear()
        self.take_over(method, pod, name, mode, answers[0][0] is OK)

    def take_over(self, method: str, pod: str, name: str, mode: int, acknowledged: bool) -> None:
        """Take from the lists what the call has done; each thing is as it was before, or as it should be after it."""
        note(f"{method} of {pod}, {name} was {'acknowledged' if acknowledged else 'cut'}")
        if method == "StartContainer" and name in self.containers:
            eventually(lambda: not self.is_starting(name))
        pods = {p.metadata.name: p for p in self.node.client.ListPodSandbox().items}
        containers = {c.metadata.name: c for c in self.node.client.ListContainers().containers}
        match method:
            case "RunPodSandbox" if pod not in self.pods and (acknowledged or pod in pods):
                self.has_pod(pod, pods[pod].id, mode)
            case "CreateContainer" if (
                pod in self.pods
                and self.pods[pod].state == READY
                and name not in self.containers
                and (acknowledged or name in containers)
            ):
                self.has_container(name, containers[name].id)
            case "StartContainer" if name in self.containers and self.containers[name].state == CREATED:
                seen = containers[name].state
                if acknowledged or (self.pods[pod].state == READY and seen != CREATED):
                    self.containers[name].state = RUNNING
                if seen == EXITED and not acknowledged:
                    self.containers[name].end(CUT)
            case "StopContainer" if name in self.containers:
                if acknowledged or containers[name].state == EXITED:
                    self.containers[name].end(KILLED)
            case "RemoveContainer" if name in self.containers:
                self.may_be_removed(name, containers, acknowledged)
            case "StopPodSandbox" if pod in self.pods:
                if acknowledged or pods[pod].state == NOT_READY:
                    self.pods[pod].state = NOT_READY
                for own in self.in_pod(pod):
                    if acknowledged or containers[own].state == EXITED:
                        self.containers[own].end(KILLED)
            case "RemovePodSandbox" if pod in self.pods:
                # A removal that has begun is finished at the start.
                if acknowledged or pod not in pods:
                    del self.pods[pod]
                for own in self.in_pod(pod):
                    self.may_be_removed(own, containers, acknowledged or pod not in self.pods)

    def is_starting(self, name: str) -> bool:
        """Whether a shim goes on with the start that an earlier daemon has begun."""
        container = self.containers[name].id
        shim = pidfd.processes_in(f"{self.node.state}/containers/{container}")
        return self.node.status(container).state == CREATED and shim != []

    def may_be_removed(self, name: str, containers: dict[str, Any], acknowledged: bool) -> None:
        if acknowledged or name not in containers:
            del self.containers[name]
        elif containers[name].state == EXITED:
            self.containers[name].end(KILLED)

    # What holds after each step

    @invariant()
    def lists_show_the_model(self) -> None:
        client = self.node.client
        assert {p.metadata.name: (p.id, p.state) for p in client.ListPodSandbox().items} == {
            name: (p.id, p.state) for name, p in self.pods.items()
        }
        assert {c.metadata.name: (c.id, c.pod_sandbox_id, c.state) for c in client.ListContainers().containers} == {
            name: (c.id, c.pod, c.state) for name, c in self.containers.items()
        }
        for name, container in self.containers.items():
            assert self.node.status(container.id).exit_code in container.codes, name

    def teardown(self) -> None:
        self.node.remove_pods()
        assert self.node.settled() == []
        assert self.node.complaints() == []


def test_calls_answer_as_the_model_of_pods_and_containers_says(node: Node) -> None:
    class OfNode(Lifecycle):
        def __init__(self) -> None:
            super().__init__(node)

    run_state_machine_as_test(OfNode, settings=SETTINGS)
