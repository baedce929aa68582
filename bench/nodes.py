"""The two runtimes: each is a real daemon with a network of its own, and gets what a kubelet would send."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message_factory import GetMessageClass

from bench.images import IMAGE, PAUSE
from bench.isolation import CGROUP, remove_cgroup
from bench.processes import matching
from criserver.pb.runtime.v1 import api_pb2 as cri

# The daemon's interpreter. `make bench` names one with the libraries of a node's package alone.
PYTHON = os.environ.get("BENCH_PYTHON", sys.executable)
# Seconds that a daemon may take to serve. containerd first connects to all shims, which takes longer with many pods.
_START = 180
_TREE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CNI_BIN = "/usr/lib/cni"
SLEEP = ["sleep", "100000"]

# What the kubelet sends for a container that is not privileged.
MASKED = ["/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list"]
MASKED += ["/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"]
READONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


class Client:
    """Every unary RPC of CRI as a method: ``client.RunPodSandbox(config=...)``."""

    def __init__(self, socket: str) -> None:
        self.channel = grpc.insecure_channel(f"unix:{socket}", options=[("grpc.max_receive_message_length", 16 << 20)])
        for service in cri.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                if not method.server_streaming:
                    call: Any = self.channel.unary_unary(
                        f"/{service.full_name}/{method.name}",
                        request_serializer=lambda m: m.SerializeToString(),
                        response_deserializer=GetMessageClass(method.output_type).FromString,
                    )
                    setattr(self, method.name, self._caller(call, GetMessageClass(method.input_type)))

    @staticmethod
    def _caller(call: Any, request: Any) -> Any:
        def rpc(deadline: float = 60, **fields: Any) -> Any:
            return call(request(**fields), timeout=deadline, wait_for_ready=True)

        return rpc

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class Node:
    """A daemon: it serves inside ``with``. Its pods are removed and it is stopped at the end."""

    name: str

    def __init__(self, base: str, disk: str, number: int) -> None:
        self.base = f"{base}/{self.name}"
        self.root, self.logs = f"{disk}/{self.name}", f"{disk}/{self.name}-logs"
        self.state, self.socket, self.config = f"{self.base}/state", f"{self.base}/cri.sock", f"{self.base}/config.toml"
        for directory in (self.root, self.state, self.logs, f"{self.base}/net.d", f"{self.base}/tmp"):
            os.makedirs(directory)
        with open(f"{self.base}/net.d/10-bench.conflist", "w") as f:
            json.dump(network(number, self.base), f)
        with open(self.config, "w") as f:
            f.write(self.configuration())
        self.process: subprocess.Popen[bytes]
        self.client: Client

    def configuration(self) -> str:
        """The daemon's configuration file."""
        raise NotImplementedError

    def command(self) -> list[str]:
        """The daemon's command line."""
        raise NotImplementedError

    def load(self, archive: str) -> None:
        """Give the daemon the images of a docker-archive."""
        raise NotImplementedError

    def helpers(self) -> list[int]:
        """The PIDs of what the runtime keeps running beside the daemon and the containers."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """The daemon's environment."""
        return dict(os.environ)

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self) -> float:
        """Start the daemon. The seconds until it has answered a call of Version."""
        began = time.monotonic()
        with open(f"{self.base}/daemon.log", "ab") as out:
            self.process = subprocess.Popen(
                self.command(), env=self.environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        # gRPC waits up to a second before it tries to connect again. So the socket is tried first.
        while not _listens(self.socket):
            self._check(began)
        self.client = Client(self.socket)
        while True:
            try:
                self.client.Version()
                return time.monotonic() - began
            except grpc.RpcError:
                self._check(began)

    def _check(self, began: float) -> None:
        if self.process.poll() is not None or time.monotonic() > began + _START:
            raise RuntimeError(f"{self.name} does not serve:\n{self.log()}")
        time.sleep(0.002)

    def stop(self) -> None:
        """Stop the daemon. Its containers go on."""
        self.client.channel.close()
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            print(f"{self.name} does not stop", file=sys.stderr)
            self.process.kill()
            self.process.wait()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None and kind is not KeyboardInterrupt:
            print(f"{self.name}'s log ends:\n{self.log()[-3000:]}", file=sys.stderr)
        try:
            if self.process.poll() is None:
                self.remove_pods()
        except grpc.RpcError as e:
            print(f"{self.name}: pods cannot be removed: {e}", file=sys.stderr)
        finally:
            self.stop()

    def log(self) -> str:
        """What the daemon has logged."""
        with open(f"{self.base}/daemon.log") as f:
            return f.read()

    def version(self) -> str:
        """The runtime and its version."""
        answer = self.client.Version()
        return f"{self.name} {answer.runtime_version}"

    def load_images(self, archives: list[str]) -> None:
        """Give the daemon the images of docker-archives, and wait until it serves them."""
        for archive in archives:
            self.load(archive)
        deadline = time.monotonic() + 20
        for name in (IMAGE, PAUSE):
            while not self.client.ImageStatus(image=cri.ImageSpec(image=name)).HasField("image"):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{self.name} does not have {name}")
                time.sleep(0.05)

    def pod(self, name: str, *, shared: bool = False) -> cri.PodSandboxConfig:
        """A pod as the kubelet describes it. Each container has a PID namespace of its own, or all share one."""
        return cri.PodSandboxConfig(
            metadata=cri.PodSandboxMetadata(name=name, namespace="bench", uid=f"uid-{name}"),
            hostname=name,
            log_directory=f"{self.logs}/{name}",
            linux=cri.LinuxPodSandboxConfig(
                cgroup_parent=f"{CGROUP}/{self.name}/{name}",
                security_context=cri.LinuxSandboxSecurityContext(namespace_options=_namespaces(shared)),
            ),
        )

    def container(self, name: str, *, shared: bool = False, command: list[str] | None = None) -> cri.ContainerConfig:
        """A container that sleeps or runs a command, with a best-effort pod's resources."""
        return cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name=name),
            image=cri.ImageSpec(image=IMAGE),
            command=command or SLEEP,
            log_path=f"{name}.log",
            linux=cri.LinuxContainerConfig(
                resources=cri.LinuxContainerResources(cpu_shares=2, oom_score_adj=1000),
                security_context=cri.LinuxContainerSecurityContext(
                    namespace_options=_namespaces(shared), masked_paths=MASKED, readonly_paths=READONLY
                ),
            ),
        )

    def remove_pods(self, keep: int = 0) -> None:
        """Stop and remove all pods, or all but ``keep``."""
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(self._remove, self.client.ListPodSandbox().items[keep:]))

    def _remove(self, pod: cri.PodSandbox) -> None:
        self.client.StopPodSandbox(pod_sandbox_id=pod.id)
        self.client.RemovePodSandbox(pod_sandbox_id=pod.id)
        remove_cgroup(f"{CGROUP}/{self.name}/{pod.metadata.name}")


class Criserver(Node):
    """This tree's daemon. Its modules are compiled, as the node's package has them."""

    name = "criserver"

    def __init__(self, base: str, disk: str, number: int) -> None:
        super().__init__(base, disk, number)
        self.compiled([PYTHON])

    @staticmethod
    def compiled(interpreter: list[str]) -> None:
        """Compile the modules of this tree for an interpreter and its options."""
        tree = [os.path.join(_TREE, package) for package in ("criserver", "shims", "snapshotter")]
        subprocess.run([*interpreter, "-m", "compileall", "-q", *tree], check=True)

    def configuration(self) -> str:
        return (
            f'root = "{self.root}"\nstate = "{self.state}"\n[grpc]\naddress = "{self.socket}"\n'
            f'[log]\nformat = "json"\n[cni]\nbin_dirs = ["{CNI_BIN}"]\nconf_dir = "{self.base}/net.d"\n'
        )

    def command(self) -> list[str]:
        return [PYTHON, "-m", "criserver", "serve", "--config", self.config]

    def load(self, archive: str) -> None:
        command = [PYTHON, "-m", "criserver", "image", "import", "--config", self.config, archive]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def helpers(self) -> list[int]:
        """The nursery and its forks, the shims, which share its command line."""
        return matching(b"shims.nursery_process")


class Containerd(Node):
    """containerd with its CRI plugin; ``program`` may be any build that reads a version 2 configuration."""

    name = "containerd"

    def __init__(self, base: str, disk: str, number: int, program: str = "containerd") -> None:
        found = shutil.which(program)
        if found is None:
            raise RuntimeError(f"{program} is not an executable; install containerd, or name one by --containerd")
        self.program = os.path.realpath(found)
        super().__init__(base, disk, number)

    def configuration(self) -> str:
        unused = ["internal.v1.restart", "nri.v1.nri", "tracing.processor.v1.otlp", "internal.v1.tracing"]
        unused += [f"snapshotter.v1.{name}" for name in ("aufs", "btrfs", "devmapper", "zfs", "blockfile", "erofs")]
        cri_plugin = 'plugins."io.containerd.grpc.v1.cri"'
        return f"""version = 2
root = "{self.root}"
state = "{self.state}"
disabled_plugins = {json.dumps([f"io.containerd.{name}" for name in unused])}
[grpc]
address = "{self.socket}"
[plugins."io.containerd.internal.v1.opt"]
path = "{self.base}/opt"
[{cri_plugin}]
sandbox_image = "{PAUSE}"
restrict_oom_score_adj = true
disable_apparmor = true
netns_mounts_under_state_dir = true
[{cri_plugin}.cni]
bin_dir = "{CNI_BIN}"
conf_dir = "{self.base}/net.d"
[{cri_plugin}.containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"
[{cri_plugin}.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[{cri_plugin}.containerd.runtimes.runc.options]
Root = "{self.state}/runc"
"""

    def environment(self) -> dict[str, str]:
        """Finds the shim that belongs to the program first, and keeps temporary mounts in the scratch directory."""
        path = f"{os.path.dirname(self.program)}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "TMPDIR": f"{self.base}/tmp"}

    def command(self) -> list[str]:
        return [self.program, "--config", self.config]

    def load(self, archive: str) -> None:
        ctr = ["ctr", "--address", self.socket, "--namespace", "k8s.io", "images", "import", archive]
        subprocess.run(ctr, env=self.environment(), check=True, stdout=subprocess.DEVNULL)

    def helpers(self) -> list[int]:
        """The shims and the pause processes."""
        return matching(b"containerd-shim-runc-v2\0") + matching(b"/infra\0-P\0")


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def _namespaces(shared: bool) -> cri.NamespaceOption:
    return cri.NamespaceOption(network=cri.POD, ipc=cri.POD, pid=cri.POD if shared else cri.CONTAINER)


def network(number: int, directory: str) -> dict[str, Any]:
    """A CNI network list with a bridge and a subnet of its own. Its leases are below ``directory``."""
    bridge = {
        "type": "bridge",
        "bridge": f"cribench{number}",
        "isGateway": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": f"10.{215 + number}.0.0/16"}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": f"{directory}/ipam",
        },
    }
    plugins = [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}]
    plugins += [{"type": "firewall"}, {"type": "tuning", "sysctl": {"net.ipv4.tcp_keepalive_time": "600"}}]
    return {"cniVersion": "1.0.0", "name": f"bench{number}", "plugins": plugins}
