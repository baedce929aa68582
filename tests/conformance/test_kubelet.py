"""A kubelet with an API server, and kubectl: exec, attach, logs, cp and port-forward, over both transports.

etcd, kube-apiserver, kubelet and kubectl are those on PATH. There is no scheduler: pods name their node.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support import https, kubelet, static_pod
from tests.support.node import Node
from tests.support.services import Services, fetched
from tests.support.terminal import Terminal
from tests.support.waiting import end, eventually

PROGRAMS = ("etcd", "kube-apiserver", "kubelet", "kubectl")
# The node's address, on the loopback interface: the API server does not speak to a kubelet at 127.0.0.1.
ADDRESS = "10.198.0.2"
ETCD, ETCD_PEERS, API, KUBELET = 23791, 23801, 16444, 20251
IMAGE = "localhost/busybox:latest"
TOKEN = "tests"

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: real mounts, namespaces and containers"),
    pytest.mark.skipif(
        not all(shutil.which(program) for program in PROGRAMS), reason=f"not on PATH: {', '.join(PROGRAMS)}"
    ),
    pytest.mark.skipif(kubelet.another_runs(), reason="another kubelet runs here"),
]


class Cluster:
    """One node; ``close`` ends all of it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.directory = f"{node.base}/kube"
        self.kubeconfig = f"{self.directory}/kubeconfig"
        self._processes: list[subprocess.Popen[bytes]] = []
        self.manifests = f"{self.directory}/manifests"
        os.makedirs(self.manifests)
        subprocess.run(["ip", "address", "add", f"{ADDRESS}/32", "dev", "lo"], check=True)

    def start(self) -> None:
        """Returns when the node is ready."""
        self._write()
        self._start(
            *("etcd", "--data-dir", f"{self.directory}/etcd", "--unsafe-no-fsync"),
            *("--listen-client-urls", f"http://127.0.0.1:{ETCD}"),
            *("--advertise-client-urls", f"http://127.0.0.1:{ETCD}"),
            *("--listen-peer-urls", f"http://127.0.0.1:{ETCD_PEERS}"),
        )
        self._start(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{ETCD}",
            f"--secure-port={API}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--cert-dir={self.directory}/certs",
            f"--token-auth-file={self.directory}/tokens",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--service-account-issuer=https://tests",
            f"--service-account-key-file={self.directory}/sa.key",
            f"--service-account-signing-key-file={self.directory}/sa.key",
            "--disable-admission-plugins=ServiceAccount",
            "--kubelet-preferred-address-types=InternalIP",
        )
        eventually(self._serves, 60)
        self._start(
            *("kubelet", "--config", f"{self.directory}/kubelet.json", "--root-dir", f"{self.directory}/kubelet"),
            *("--kubeconfig", self.kubeconfig, "--hostname-override", "n1", "--node-ip", ADDRESS),
        )
        eventually(lambda: "True" in self.get("node", "n1", '{.status.conditions[?(@.type=="Ready")].status}'), 60)

    def kubectl(self, *words: str) -> list[str]:
        return ["kubectl", "--kubeconfig", self.kubeconfig, *words]

    def get(self, kind: str, name: str, path: str) -> str:
        """A field of an object, "" where it is not there (yet)."""
        words = self.kubectl("get", kind, name, "-o", f"jsonpath={path}")
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=False).stdout

    def run(self, name: str, command: list[str], **fields: Any) -> None:
        """A running pod with one container."""
        container = {"name": "c", "image": IMAGE, "imagePullPolicy": "Never", "command": command, **fields}
        spec = {
            "nodeName": "n1",
            "automountServiceAccountToken": False,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "containers": [container],
        }
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        words = self.kubectl("create", "-f", "-")
        subprocess.run(words, input=json.dumps(pod).encode(), capture_output=True, timeout=30, check=True)
        eventually(lambda: self.get("pod", name, "{.status.phase}") == "Running", 60)

    def close(self) -> None:
        if os.path.exists(self.kubeconfig):
            words = self.kubectl("delete", "pods", "--all", "--force", "--grace-period=0")
            subprocess.run(words, capture_output=True, timeout=60, check=False)
            with contextlib.suppress(AssertionError):
                eventually(self._idle, 30)
        for process in reversed(self._processes):
            end(process, 20)
        self.node.remove_pods()
        subprocess.run(["ip", "address", "delete", f"{ADDRESS}/32", "dev", "lo"], check=False)
        kubelet.remove_cgroups("cgroupfs")
        shutil.rmtree(self.directory, ignore_errors=True)

    def _idle(self) -> bool:
        """Whether the kubelet has stopped every pod; it removes them a minute later."""
        return all(p.state == cri.SANDBOX_NOTREADY for p in self.node.client.ListPodSandbox().items)

    def _write(self) -> None:
        subprocess.run(
            ["openssl", "genrsa", "-out", f"{self.directory}/sa.key", "2048"], capture_output=True, check=True
        )
        with open(f"{self.directory}/tokens", "w") as f:
            f.write(f"{TOKEN},admin,1,system:masters\n")
        cluster = {"server": f"https://127.0.0.1:{API}", "insecure-skip-tls-verify": True}
        self._json(
            "kubeconfig",
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": cluster}],
                "users": [{"name": "u", "user": {"token": TOKEN}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            },
        )
        self._json(
            "kubelet.json",
            kubelet.configuration(
                self.node.socket,
                self.manifests,
                **kubelet.beside_others(self.directory),
                featureGates={"PodAndContainerStatsFromCRI": True},
                address=ADDRESS,
                port=KUBELET,
            ),
        )

    def _json(self, name: str, content: dict[str, Any]) -> None:
        with open(f"{self.directory}/{name}", "w") as f:
            json.dump(content, f)

    def _start(self, *words: str) -> None:
        with open(f"{self.directory}/{words[0]}.log", "wb") as log:
            self._processes.append(
                subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=self.directory
                )
            )

    def ask_kubelet(self, path: str) -> str:
        """What the kubelet answers itself."""
        return https.fetched(f"https://{ADDRESS}:{KUBELET}{path}", 10)

    def _serves(self) -> bool:
        with contextlib.suppress(OSError):
            return https.fetched(f"https://127.0.0.1:{API}/readyz", 10, Authorization=f"Bearer {TOKEN}") == "ok"
        return False


@pytest.fixture(scope="module")
def cluster(node: Node) -> Iterator[Cluster]:
    """With two pods: one sleeps, one has a shell at a terminal."""
    cluster = Cluster(node)
    try:
        cluster.start()
        cluster.run("work", ["sleep", "100000"])
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(autouse=True)
def clean_pods() -> None:
    """The pods are the kubelet's."""


@pytest.fixture(params=["websocket", "spdy"], autouse=True)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The protocols of kubectl."""
    value = "true" if request.param == "websocket" else "false"
    monkeypatch.setenv("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", value)
    monkeypatch.setenv("KUBECTL_PORT_FORWARD_WEBSOCKETS", value)
    return str(request.param)


def container(cluster: Cluster, pod: str) -> str:
    return cluster.get("pod", pod, "{.status.containerStatuses[0].containerID}").removeprefix("criserver://")


def arguments(cluster: Cluster, pod: str) -> str:
    """The command lines of all processes of a pod's container."""
    return cluster.node.sh(container(cluster, pod), "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")


def test_exec_at_a_terminal_with_resizes_and_an_exit_code(cluster: Cluster) -> None:
    with Terminal(cluster.kubectl("exec", "-it", "work", "--", "sh")) as person:
        person.until(b"# ")
        person.type("stty size\n")
        person.until(b"30 100")
        for width, height in ((77, 22), (132, 50)):
            person.resize(width, height)
            eventually(lambda: size(person) == (width, height))  # noqa: B023
        person.type("exit 7\n")
        assert person.wait() == 7


def size(person: Any) -> tuple[int, int]:
    person.until(b"# ")
    person.type("stty size\n")
    person.until(b"stty size\r\n")
    height, width = person.until(b"\r\n").split()
    return int(width), int(height)


def test_ctrl_c_at_a_terminal_ends_what_runs_there_and_not_the_shell(cluster: Cluster) -> None:
    with Terminal(cluster.kubectl("exec", "-it", "work", "--", "sh")) as person:
        person.until(b"# ")
        person.type("sleep 4321\n")
        eventually(lambda: "sleep 4321" in arguments(cluster, "work"))
        person.type("\x03")
        person.until(b"# ")
        person.type("echo $((6*7)) $?\n")
        person.until(b"42 130")
        person.until(b"# ")  # not before: what is typed while a command runs is read in another mode
        person.type("\x04")  # Ctrl-D
        assert person.wait() == 0


def test_a_closed_window_ends_the_exec(cluster: Cluster) -> None:
    with Terminal(cluster.kubectl("exec", "-it", "work", "--", "sh", "-c", "trap '' HUP; sleep 5432")) as person:
        eventually(lambda: "sleep 5432" in arguments(cluster, "work"))
        person.hang_up()
        person.process.wait(20)
    eventually(lambda: "sleep 5432" not in arguments(cluster, "work"), 20)


def test_ctrl_c_without_a_terminal_ends_the_exec(cluster: Cluster) -> None:
    process = subprocess.Popen(cluster.kubectl("exec", "work", "--", "sleep", "6543"))
    eventually(lambda: "sleep 6543" in arguments(cluster, "work"))
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    eventually(lambda: "sleep 6543" not in arguments(cluster, "work"), 20)


def test_exec_with_input_two_outputs_and_an_exit_code(cluster: Cluster) -> None:
    words = cluster.kubectl("exec", "-i", "work", "--", "sh", "-c", "cat; echo err >&2; exit 4")
    done = subprocess.run(words, input=b"x" * 300_000, capture_output=True, timeout=60, check=False)
    assert done.stdout == b"x" * 300_000
    assert done.stderr.startswith(b"err\n")
    assert done.returncode == 4


def test_attach_at_a_terminal_and_again_after_going_away(cluster: Cluster, transport: str) -> None:
    pod = f"shell-{transport}"
    cluster.run(pod, ["sh"], stdin=True, tty=True)
    with Terminal(cluster.kubectl("attach", "-it", pod)) as person:
        person.type("echo $((6*7)); mine=kept\n")
        person.until(b"42")
        person.resize(77, 22)
        person.type("stty size\n")
        eventually(lambda: cluster.node.sh(container(cluster, pod), "stty size < /dev/pts/0") == "22 77\n")
        person.hang_up()
        person.process.wait(20)
    with Terminal(cluster.kubectl("attach", "-it", pod)) as person:
        person.type("echo still $mine\n")
        person.until(b"still kept")
        person.type("exit\n")
        assert person.wait() == 0
    eventually(lambda: cluster.get("pod", pod, "{.status.phase}") == "Succeeded", 30)


def test_logs_are_followed_to_the_containers_end(cluster: Cluster, transport: str) -> None:
    pod = f"talks-{transport}"
    cluster.run(pod, ["sh", "-c", "for i in $(seq 30); do echo line $i; sleep 0.1; done; printf tail"])
    done = subprocess.run(cluster.kubectl("logs", "-f", pod), capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "".join(f"line {i}\n" for i in range(1, 31)) + "tail"


def test_a_big_file_is_copied_both_ways(cluster: Cluster, transport: str, tmp_path: Path) -> None:
    there, back, name = tmp_path / "there", tmp_path / "back", f"/tmp-{transport}"
    there.write_bytes(os.urandom(20 << 20))
    for words in ((str(there), f"work:{name}"), (f"work:{name}", str(back))):
        subprocess.run(cluster.kubectl("cp", *words), capture_output=True, timeout=120, check=True)
    assert sha256(back.read_bytes()) == sha256(there.read_bytes())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_twenty_connections_at_a_time_are_forwarded(cluster: Cluster) -> None:
    (sandbox,) = (p.id for p in cluster.node.client.ListPodSandbox().items if p.metadata.name == "work")
    services = Services(f"{cluster.node.state}/ns/{sandbox}/net")
    process = subprocess.Popen(
        cluster.kubectl("port-forward", "pod/work", ":7002"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        port = int(line.split(" ->")[0].rpartition(":")[2])
        with ThreadPoolExecutor(20) as pool:
            assert list(pool.map(fetched, [port] * 20)) == [b"hello from the pod"] * 20
    finally:
        process.terminate()
        process.wait(10)
        services.close()


def test_an_exec_that_says_nothing_stays(cluster: Cluster) -> None:
    """The proxies on the way do not end what is quiet for some seconds."""
    words = cluster.kubectl("exec", "work", "--", "sh", "-c", "sleep 8; echo done")
    assert subprocess.run(words, capture_output=True, timeout=60, check=True).stdout == b"done\n"


def test_the_kubelet_has_its_statistics_by_cri(cluster: Cluster) -> None:
    def found() -> dict[str, Any]:
        pods = json.loads(cluster.ask_kubelet("/stats/summary"))["pods"]
        return next((pod for pod in pods if pod["podRef"]["name"] == "work"), {})

    eventually(lambda: "network" in found() and found().get("containers"), 30)
    (only,) = found()["containers"]
    assert only["name"] == "c"
    assert only["memory"]["workingSetBytes"] > 0
    assert only["rootfs"]["inodesUsed"] > 0
    assert found()["network"]["rxBytes"] >= 0
    lines = [line for line in cluster.ask_kubelet("/metrics/cadvisor").splitlines() if 'pod="work"' in line]
    for metric in ("container_cpu_usage_seconds_total", "container_memory_working_set_bytes"):
        assert any(line.startswith(metric) and 'container="c"' in line for line in lines), metric


@pytest.mark.parametrize("transport", ["websocket"], indirect=True)  # it has nothing to do with this
def test_a_static_pod_is_started_probed_restarted_logged_and_removed(cluster: Cluster) -> None:
    static_pod.live(cluster.node, cluster.manifests, "n1", cluster.ask_kubelet)
