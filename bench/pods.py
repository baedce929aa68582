"""What a pod costs in time and memory: this runtime, containerd, and the bare tools beneath both, in turn.

    python bench/pods.py [--rounds N] [--pods M] [--containerd PATH] [--json FILE]

README.md in this directory says what each row means.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from node import CGROUP, CNI_BIN, SLEEP, Containerd, Criserver, Node, build_images, memory, network, scratch

RUN, CREATE, START = "RunPodSandbox", "CreateContainer", "StartContainer"
BOTH, EXEC, STOP = "CreateContainer + StartContainer", "ExecSync of true", "StopContainer, timeout 0"
REMOVE, LIFE = "StopPodSandbox + RemovePodSandbox", "all of a pod's calls but ExecSync"
CALLS = (RUN, CREATE, START, BOTH, EXEC, STOP, REMOVE, LIFE)
VERSION, RESTED = "Version", "Version after 20 ms of rest"

EXECS = 3
LIST_CALLS = 200
RESTED_CALLS = 50
CONTAINERS_PER_POD = 3
# Seconds between two runtimes' turns: what one still does in the background is not to fall into the other's time.
PAUSE = 0.1
MEMORY_SETTLES = 2.0

Samples = dict[str, list[float]]
T = TypeVar("T")


class Results:
    """Samples by row, and in a row by who was measured."""

    def __init__(self) -> None:
        self.units: dict[str, str] = {}
        self.samples: dict[str, Samples] = {row: {} for row in CALLS}

    def add(self, row: str, who: str, value: float, unit: str = "ms") -> None:
        self.units[row] = unit
        self.samples.setdefault(row, {}).setdefault(who, []).append(value)


class Floor:
    """The same pod made by hand: what remains when a runtime adds nothing."""

    name = "floor"

    def __init__(self, base: str) -> None:
        self._base = f"{base}/floor"
        self._bundle, self._runc = f"{self._base}/bundle", ["runc", "--root", f"{self._base}/runc"]
        self._netns, self._pid_file = f"{self._base}/netns", f"{self._base}/pid"
        self._network = network(0, self._base)
        self._make_bundle()

    def _make_bundle(self) -> None:
        """A bundle of busybox whose process joins the pod's network, as a CRI container does."""
        binaries = f"{self._bundle}/rootfs/bin"
        os.makedirs(binaries)
        shutil.copy("/bin/busybox", binaries)
        for applet in ("sleep", "true"):
            os.symlink("busybox", f"{binaries}/{applet}")
        subprocess.run(["runc", "spec", "--bundle", self._bundle], check=True)
        with open(f"{self._bundle}/config.json") as f:
            document = json.load(f)
        document["process"] |= {"terminal": False, "args": SLEEP, "env": ["PATH=/bin"]}
        document["root"]["readonly"] = False
        document["linux"]["cgroupsPath"] = f"{CGROUP}/{self.name}/{self.name}"
        for namespace in document["linux"]["namespaces"]:
            if namespace["type"] == "network":
                namespace["path"] = self._netns
        with open(f"{self._bundle}/config.json", "w") as f:
            json.dump(document, f)
        with open(self._netns, "w"):
            pass

    def life(self, name: str, add: Callable[[str, float], None]) -> None:
        """One pod from beginning to end."""
        result, run = timed(self._connect, name)
        add(RUN, run)
        _, both = timed(self._run, "run", "--detach", "--bundle", self._bundle, "--pid-file", self._pid_file, name)
        add(BOTH, both)
        for _ in range(EXECS):
            add(EXEC, timed(self._run, "exec", name, "true")[1])
        stop = timed(self._kill)[1]
        add(STOP, stop)
        remove = timed(self._disconnect, name, result)[1]
        add(REMOVE, remove)
        add(LIFE, run + both + stop + remove)

    def _connect(self, name: str) -> dict[str, Any]:
        subprocess.run(["unshare", f"--net={self._netns}", "true"], check=True)
        return self._cni("ADD", name, self._network["plugins"], None)

    def _disconnect(self, name: str, result: dict[str, Any]) -> None:
        self._run("delete", name)
        self._cni("DEL", name, self._network["plugins"][::-1], result)
        subprocess.run(["umount", self._netns], check=True)

    def _kill(self) -> None:
        """The process is an orphan that was left to this one by runc."""
        with open(self._pid_file) as f:
            pid = int(f.read())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def _run(self, *arguments: str) -> None:
        null = subprocess.DEVNULL
        subprocess.run([*self._runc, *arguments], check=True, stdin=null, stdout=null)

    def _cni(
        self, verb: str, name: str, plugins: list[dict[str, Any]], result: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Call the plugins in turn; for ADD each one's result is given to the next."""
        environment = {"CNI_COMMAND": verb, "CNI_CONTAINERID": name, "CNI_NETNS": self._netns, "CNI_IFNAME": "eth0"}
        environment |= {"CNI_PATH": CNI_BIN, "PATH": os.environ["PATH"]}
        for plugin in plugins:
            request = {"cniVersion": self._network["cniVersion"], "name": self._network["name"], **plugin}
            if result is not None:
                request["prevResult"] = result
            words = json.dumps(request).encode()
            done = subprocess.run([f"{CNI_BIN}/{plugin['type']}"], input=words, env=environment, stdout=subprocess.PIPE)
            if done.returncode != 0:
                raise RuntimeError(f"CNI plugin {plugin['type']}, {verb}: {done.stdout.decode()}")
            if verb == "ADD":
                result = json.loads(done.stdout)
        return result or {}


def timed(call: Callable[..., T], *args: Any, **fields: Any) -> tuple[T, float]:
    """What a call returns, and the milliseconds that it took."""
    began = time.monotonic()
    value = call(*args, **fields)
    return value, (time.monotonic() - began) * 1000


def life(node: Node, name: str, add: Callable[[str, float], None]) -> None:
    """One pod from beginning to end, through CRI."""
    client, config = node.client, node.pod(name)
    answer, run = timed(client.RunPodSandbox, config=config)
    pod = answer.pod_sandbox_id
    add(RUN, run)
    answer, create = timed(
        client.CreateContainer, pod_sandbox_id=pod, config=node.container("main"), sandbox_config=config
    )
    container = answer.container_id
    add(CREATE, create)
    start = timed(client.StartContainer, container_id=container)[1]
    add(START, start)
    add(BOTH, create + start)
    for _ in range(EXECS):
        answer, took = timed(client.ExecSync, container_id=container, cmd=["true"], timeout=10)
        if answer.exit_code != 0:
            raise RuntimeError(f"{node.name}: exec of true ended with {answer.exit_code}")
        add(EXEC, took)
    stop = timed(client.StopContainer, container_id=container, timeout=0)[1]
    add(STOP, stop)
    stop_pod = timed(client.StopPodSandbox, pod_sandbox_id=pod)[1]
    remove_pod = timed(client.RemovePodSandbox, pod_sandbox_id=pod)[1]
    add(REMOVE, stop_pod + remove_pod)
    add(LIFE, run + create + start + stop + stop_pod + remove_pod)


def measure_lives(results: Results, floor: Floor, nodes: list[Node], rounds: int) -> None:
    """Each in turn, round after round; the first round is not counted."""
    for number in range(rounds + 1):

        def adder(who: str, count: bool = number > 0) -> Callable[[str, float], None]:
            return lambda row, value: results.add(row, who, value) if count else None

        floor.life(f"floor{number}", adder(floor.name))
        time.sleep(PAUSE)
        for node in nodes if number % 2 else nodes[::-1]:
            life(node, f"pod{number}", adder(node.name))
            time.sleep(PAUSE)
        progress(f"round {number} of {rounds}")


def measure_standing(results: Results, nodes: list[Node], pods: int) -> None:
    """What running pods cost: memory with one container in each, lists with that and with three."""
    configs = {node.name: [node.pod(f"standing{i}") for i in range(pods)] for node in nodes}
    ids: dict[str, list[str]] = {
        node.name: [node.client.RunPodSandbox(config=c).pod_sandbox_id for c in configs[node.name]] for node in nodes
    }
    for container in range(CONTAINERS_PER_POD):
        for node in nodes:
            for pod, config in zip(ids[node.name], configs[node.name], strict=True):
                node.run(pod, config, f"c{container}")
        progress(f"{pods} pods of {container + 1}")
        if container == 0:
            time.sleep(MEMORY_SETTLES)
            for node in nodes:
                measure_pod_memory(results, node, pods)
        if container in (0, CONTAINERS_PER_POD - 1):
            for node in nodes:
                measure_lists(results, node, pods * (container + 1))


def measure_pod_memory(results: Results, node: Node, pods: int) -> None:
    helpers = node.helpers()
    results.add("processes beside daemon and containers", node.name, len(helpers), "")
    for field in ("Pss", "Rss"):
        total = sum(memory(pid, field) for pid in helpers)
        results.add(f"memory of those, per pod: {field.upper()}", node.name, total / pods, "MiB")
    measure_daemon_memory(results, node, pods)


def measure_daemon_memory(results: Results, node: Node, pods: int) -> None:
    for field in ("Pss", "Rss"):
        value = memory(node.process.pid, field)
        results.add(f"daemon with {pods} pods: {field.upper()}", node.name, value, "MiB")


def measure_lists(results: Results, node: Node, containers: int) -> None:
    calls = {
        VERSION: node.client.Version,
        f"ListContainers of {containers}": node.client.ListContainers,
        f"ListPodSandbox with {containers} containers": node.client.ListPodSandbox,
    }
    for row, call in calls.items():
        for _ in range(LIST_CALLS):
            results.add(row, node.name, timed(call)[1])
    for _ in range(RESTED_CALLS):
        time.sleep(0.02)
        results.add(RESTED, node.name, timed(node.client.Version)[1])


def table(results: Results, names: list[str]) -> str:
    """Medians, with minimum and maximum, and the ratios to containerd and to the floor."""
    ours, peer = names[1:]
    lines = [f"{'median (min-max)':42}" + "".join(f"{name:>24}" for name in names) + "   to peer  to floor"]
    for row, samples in results.samples.items():
        cells = [_cell(samples.get(name)) for name in names]
        unit = results.units[row]
        label = f"{row}, {unit}" if unit else row
        line = f"{label:42}" + "".join(f"{cell:>24}" for cell in cells)
        line += f"{_ratio(samples.get(ours), samples.get(peer)):>10}"
        lines.append(line + f"{_ratio(samples.get(ours), samples.get(names[0])):>10}")
    return "\n".join(lines)


def _cell(values: list[float] | None) -> str:
    if values is None:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.2f}".removesuffix(".00")
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def _ratio(values: list[float] | None, other: list[float] | None) -> str:
    return f"{statistics.median(values) / statistics.median(other):.2f}" if values and other else "-"


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    runc = subprocess.run(["runc", "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]
    return {
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "runc": runc,
        "load": os.getloadavg()[0],
    }


def progress(what: str) -> None:
    print(f"\r{what:40}", end="\n" if not sys.stderr.isatty() else "", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure this runtime and containerd side by side.")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="pods that each makes in turn (20)")
    parser.add_argument("--pods", type=int, default=20, metavar="M", help="pods for memory and lists (20)")
    parser.add_argument("--containerd", default="containerd", metavar="PATH", help="another build of containerd")
    parser.add_argument("--json", metavar="FILE", help="write every sample there")
    options = parser.parse_args()
    try:
        measure(options)
    except RuntimeError as e:
        sys.exit(f"pods.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)


def measure(options: argparse.Namespace) -> None:
    """One run; whatever ends it, nothing of it stays on the machine."""
    results, facts = Results(), machine()
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(scratch())
        archives = build_images(base)
        nodes: list[Node] = [Criserver(base, 1), Containerd(base, 2, options.containerd)]
        floor = Floor(base)
        for node in nodes:
            stack.enter_context(node)
            for archive in archives:
                node.load(archive)
            node.await_images()
        facts["runtimes"] = [node.version() for node in nodes]
        for node in nodes:
            measure_daemon_memory(results, node, 0)
        measure_lives(results, floor, nodes, options.rounds)
        measure_standing(results, nodes, options.pods)
    print(", ".join(f"{key}: {value}" for key, value in facts.items()))
    print(table(results, [floor.name, *(node.name for node in nodes)]))
    if options.json:
        with open(options.json, "w") as f:
            json.dump({"machine": facts, "units": results.units, "samples": results.samples}, f, indent=1)


if __name__ == "__main__":
    main()
