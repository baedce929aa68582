"""A control plane of Kubernetes, and a kubelet for each runtime. The programs are those on PATH.

All are in the benchmark's namespaces, so they have their usual ports, and end with it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench.isolation import CGROUP, make_cgroup, remove_cgroup
from bench.nodes import Node

PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "openssl")
_ETCD, _API, _TOKEN = "http://127.0.0.1:2379", 6443, "bench"
_DEADLINE = 120.0  # seconds, for each step of the cluster and each answer


class Program:
    """A program that runs until ``stop``. Its output is in a file of its directory."""

    def __init__(self, directory: str, name: str, words: list[str]) -> None:
        self._log = f"{directory}/{name}.log"
        with open(self._log, "wb") as out:
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=directory)

    def until(self, holds: Callable[[], object], what: str) -> None:
        """Wait until something holds. RuntimeError with the end of the log if it does not, or the program ends."""
        deadline = time.monotonic() + _DEADLINE
        while not holds():
            if self._process.poll() is not None or time.monotonic() > deadline:
                with open(self._log) as file:
                    raise RuntimeError(f"{what}; {self._log} ends:\n{file.read()[-3000:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class ControlPlane:
    """etcd, API server, controller manager and scheduler: it serves inside ``with``."""

    def __init__(self, directory: str) -> None:
        if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
            raise RuntimeError(f"not on PATH: {', '.join(missing)}")
        self.kubeconfig = f"{directory}/kubeconfig"
        self._directory = directory
        self._programs: list[Program] = []
        self._write()

    def __enter__(self) -> ControlPlane:
        self._start("etcd", "--data-dir", f"{self._directory}/etcd", "--unsafe-no-fsync")
        api = self._start(
            "kube-apiserver",
            f"--etcd-servers={_ETCD}",
            f"--secure-port={_API}",
            *("--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", "--authorization-mode=RBAC"),
            *(f"--cert-dir={self._directory}/certs", f"--token-auth-file={self._directory}/tokens"),
            *("--service-cluster-ip-range=10.96.0.0/16", "--service-account-issuer=https://bench"),
            *(f"--service-account-key-file={self._key}", f"--service-account-signing-key-file={self._key}"),
        )
        api.until(self._serves, "the API server does not serve")
        common = [f"--kubeconfig={self.kubeconfig}", "--leader-elect=false", f"--cert-dir={self._directory}/certs"]
        account = [f"--service-account-private-key-file={self._key}"]
        manager = self._start(
            "kube-controller-manager", *common, *account, f"--root-ca-file={self._directory}/certs/apiserver.crt"
        )
        manager.until(lambda: self._has("/api/v1/namespaces/default/serviceaccounts/default"), "no service account")
        manager.until(lambda: self._has("/api/v1/namespaces/default/configmaps/kube-root-ca.crt"), "no root CA")
        self._start("kube-scheduler", *common)
        return self

    def __exit__(self, *_: object) -> None:
        for program in reversed(self._programs):
            program.stop()

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The API server's answer. RuntimeError if it refuses."""
        with contextlib.closing(self._ask(method, path, body)) as answer:
            found: dict[str, Any] = json.load(answer)
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {found.get('message')}")
        return found

    def watch(self, path: str, version: str) -> Iterator[dict[str, Any]]:
        """The events of a list after its resource version, as they come. TimeoutError if none comes for two minutes."""
        with contextlib.closing(self._ask("GET", f"{path}&watch=true&resourceVersion={version}")) as answer:
            for line in answer:
                yield json.loads(line)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection("127.0.0.1", _API, timeout=_DEADLINE, context=context)
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Authorization": f"Bearer {_TOKEN}", "Content-Type": kind, "Connection": "close"}
        connection.request(method, path, json.dumps(body) if body else None, headers)
        return connection.getresponse()

    def _has(self, path: str) -> bool:
        with contextlib.closing(self._ask("GET", path)) as answer:
            return answer.status == 200

    def _serves(self) -> bool:
        with contextlib.suppress(OSError):
            return self._has("/readyz")
        return False

    def _start(self, name: str, *words: str) -> Program:
        self._programs.append(Program(self._directory, name, [name, *words]))
        return self._programs[-1]

    def _write(self) -> None:
        self._key = f"{self._directory}/sa.key"
        subprocess.run(["openssl", "genrsa", "-out", self._key, "2048"], capture_output=True, check=True)
        with open(f"{self._directory}/tokens", "w") as file:
            file.write(f"{_TOKEN},admin,1,system:masters\n")
        cluster = {"server": f"https://127.0.0.1:{_API}", "insecure-skip-tls-verify": True}
        _json(
            self.kubeconfig,
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": cluster}],
                "users": [{"name": "u", "user": {"token": _TOKEN}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            },
        )


class Kubelet:
    """A kubelet with its defaults on one runtime. Its node has the runtime's name, and is ready inside ``with``."""

    def __init__(self, plane: ControlPlane, node: Node, number: int) -> None:
        self._plane, self._node = plane, node
        self._directory, self._address = f"{node.base}/kubelet", f"10.198.0.{number}"
        os.makedirs(self._directory)
        make_cgroup(f"{CGROUP}/{node.name}")
        # The API server takes no kubelet at 127.0.0.1.
        subprocess.run(["ip", "address", "add", f"{self._address}/32", "dev", "lo"], check=True)
        _json(
            f"{self._directory}/config.json",
            {
                "apiVersion": "kubelet.config.k8s.io/v1beta1",
                "kind": "KubeletConfiguration",
                "containerRuntimeEndpoint": f"unix://{node.socket}",
                "cgroupDriver": "cgroupfs",
                "cgroupRoot": f"{CGROUP}/{node.name}",
                "failCgroupV1": False,
                "failSwapOn": False,
                "enforceNodeAllocatable": [],
                "podLogsDir": f"{node.logs}/kubelet",
                "volumePluginDir": f"{self._directory}/plugins",
                "address": self._address,
                "readOnlyPort": 0,
                "healthzPort": 0,
                "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
                "authorization": {"mode": "AlwaysAllow"},
                "oomScoreAdj": 0,
                "imageGCHighThresholdPercent": 100,
                "evictionHard": {"memory.available": "100Mi"},
                "makeIPTablesUtilChains": False,
            },
        )

    def __enter__(self) -> Kubelet:
        words = ["kubelet", "--config", f"{self._directory}/config.json", "--root-dir", f"{self._directory}/root"]
        words += ["--kubeconfig", self._plane.kubeconfig, "--cert-dir", f"{self._directory}/pki"]
        words += ["--hostname-override", self._node.name, "--node-ip", self._address]
        self._program = Program(self._directory, "kubelet", words)
        self._program.until(self._ready, f"{self._node.name} is not ready")
        return self

    def __exit__(self, *_: object) -> None:
        self._program.stop()
        for name in ("/besteffort", "/burstable", ""):
            remove_cgroup(f"{CGROUP}/{self._node.name}/kubepods{name}")

    def _ready(self) -> bool:
        for node in self._plane.call("GET", "/api/v1/nodes")["items"]:
            if node["metadata"]["name"] == self._node.name:
                conditions = {each["type"]: each["status"] for each in node["status"]["conditions"]}
                return conditions.get("Ready") == "True" and not node["spec"].get("taints")
        return False


def _json(path: str, content: dict[str, Any]) -> None:
    with open(path, "w") as file:
        json.dump(content, file)
