"""A pod from up to down, by a runtime over CRI, and by hand with only the tools that a runtime must call."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeVar

from bench.isolation import CGROUP, remove_cgroup
from bench.nodes import CNI_BIN, SLEEP, Node, network
from bench.processes import await_end

T = TypeVar("T")
# Gets the name of a row, and milliseconds.
Add = Callable[[str, float], None]


def timed(call: Callable[..., T], *args: Any, **fields: Any) -> tuple[T, float]:
    """What a call returns, and the milliseconds that it took."""
    began = time.monotonic()
    value = call(*args, **fields)
    return value, (time.monotonic() - began) * 1000


def nowhere(row: str, value: float) -> None:
    """An ``Add`` for what is not to be counted."""


class Pod:
    """A runtime's pod of one container."""

    def __init__(self, node: Node, name: str, *, shared: bool = False, command: list[str] | None = None) -> None:
        self._node = node
        self.config = node.pod(name, shared=shared)
        self._container = node.container("main", shared=shared, command=command)
        self.id = self.container = ""

    def up(self, add: Add = nowhere) -> None:
        """Make it, with its container."""
        client, config = self._node.client, self.config
        answer, run = timed(client.RunPodSandbox, config=config)
        self.id = answer.pod_sandbox_id
        answer, create = timed(
            client.CreateContainer, pod_sandbox_id=self.id, config=self._container, sandbox_config=config
        )
        self.container = answer.container_id
        start = timed(client.StartContainer, container_id=self.container)[1]
        add("RunPodSandbox", run)
        add("CreateContainer", create)
        add("StartContainer", start)
        add("pod-up", run + create + start)

    def exec(self, add: Add = nowhere) -> None:
        """Run true in the container."""
        answer, took = timed(self._node.client.ExecSync, container_id=self.container, cmd=["true"], timeout=30)
        if answer.exit_code != 0:
            raise RuntimeError(f"{self._node.name}: exec of true ended with {answer.exit_code}")
        add("exec", took)

    def down(self, add: Add = nowhere) -> None:
        """Remove it."""
        client, total = self._node.client, 0.0
        for name, fields in (
            ("StopContainer", {"container_id": self.container, "timeout": 0}),
            ("RemoveContainer", {"container_id": self.container}),
            ("StopPodSandbox", {"pod_sandbox_id": self.id}),
            ("RemovePodSandbox", {"pod_sandbox_id": self.id}),
        ):
            took = timed(getattr(client, name), **fields)[1]
            add(name, took)
            total += took
        add("pod-down", total)
        remove_cgroup(self.config.linux.cgroup_parent)


class BarePod:
    """The same pod made by hand: unshare, CNI plugins, and runc with a bundle of busybox. It is the floor."""

    def __init__(self, base: str, name: str) -> None:
        self._name, self._base = name, f"{base}/floor/{name}"
        self._runc = ["runc", "--root", f"{base}/floor/runc"]
        self._bundle, self._netns = f"{self._base}/bundle", f"{self._base}/netns"
        self._network = network(0, f"{base}/floor")
        self._environment = {"CNI_CONTAINERID": name, "CNI_NETNS": self._netns, "CNI_IFNAME": "eth0"}
        self._environment |= {"CNI_PATH": CNI_BIN, "PATH": os.environ["PATH"]}
        self._make_bundle()

    def up(self, add: Add = nowhere) -> None:
        """Make it, with its container."""
        run = timed(self._connect)[1]
        words = ["run", "--detach", "--bundle", self._bundle, "--pid-file", f"{self._base}/pid", self._name]
        start = timed(self._run, *words)[1]
        with open(f"{self._base}/pid") as f:
            self._pidfd = os.pidfd_open(int(f.read()))
        add("RunPodSandbox", run)
        add("StartContainer", start)
        add("pod-up", run + start)

    def exec(self, add: Add = nowhere) -> None:
        """Run true in the container."""
        add("exec", timed(self._run, "exec", self._name, "true")[1])

    def down(self, add: Add = nowhere) -> None:
        """Remove it."""
        total = 0.0
        for row, call in (
            ("StopContainer", self._kill),
            ("RemoveContainer", lambda: self._run("delete", self._name)),
            ("StopPodSandbox", self._disconnect),
        ):
            took = timed(call)[1]
            add(row, took)
            total += took
        add("pod-down", total)
        remove_cgroup(f"{CGROUP}/floor/{self._name}")
        shutil.rmtree(self._base)

    def _make_bundle(self) -> None:
        """A bundle of busybox. Its process joins the pod's network, as a CRI container does."""
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
        document["linux"]["cgroupsPath"] = f"{CGROUP}/floor/{self._name}/{self._name}"
        for namespace in document["linux"]["namespaces"]:
            if namespace["type"] == "network":
                namespace["path"] = self._netns
        with open(f"{self._bundle}/config.json", "w") as f:
            json.dump(document, f)
        with open(self._netns, "w"):
            pass

    def _connect(self) -> None:
        subprocess.run(["unshare", f"--net={self._netns}", "true"], check=True)
        self._result: dict[str, Any] | None = None
        for plugin in self._network["plugins"]:
            self._result = json.loads(self._cni("ADD", plugin))

    def _disconnect(self) -> None:
        for plugin in self._network["plugins"][::-1]:
            self._cni("DEL", plugin)
        subprocess.run(["umount", self._netns], check=True)

    def _kill(self) -> None:
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        await_end(self._pidfd)

    def _run(self, *arguments: str) -> None:
        null = subprocess.DEVNULL
        subprocess.run([*self._runc, *arguments], check=True, stdin=null, stdout=null)

    def _cni(self, verb: str, plugin: dict[str, Any]) -> bytes:
        """Call a plugin with the result of the plugins before it."""
        request = {"cniVersion": self._network["cniVersion"], "name": self._network["name"], **plugin}
        if self._result is not None:
            request["prevResult"] = self._result
        done = subprocess.run(
            [f"{CNI_BIN}/{plugin['type']}"],
            input=json.dumps(request).encode(),
            env={**self._environment, "CNI_COMMAND": verb},
            stdout=subprocess.PIPE,
        )
        if done.returncode != 0:
            raise RuntimeError(f"CNI plugin {plugin['type']}, {verb}: {done.stdout.decode()}")
        return done.stdout
