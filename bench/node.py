"""What benchmarks share: a scratch directory that leaves nothing behind, and runtimes served from it.

Each runtime is a real daemon with a network of its own, driven over CRI with what a kubelet would send.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message_factory import GetMessageClass

from criserver.pb.runtime.v1 import api_pb2 as cri

IMAGE = "localhost/bench:latest"
PAUSE = "localhost/pause:latest"
CNI_BIN = "/usr/lib/cni"
CGROUP = "/criserver-bench"
LINK_PREFIX = "cribench"
INFRA = "/usr/bin/catatonit"
SLEEP = ["sleep", "100000"]

# What the kubelet sends for a container that is not privileged.
MASKED = ["/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list"]
MASKED += ["/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"]
READONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]

_PR_SET_CHILD_SUBREAPER = 36


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
    """A daemon below a scratch directory: serving inside ``with``, its pods removed and itself stopped after."""

    name: str

    def __init__(self, scratch: str, number: int, *, root: str | None = None) -> None:
        self.base = f"{scratch}/{self.name}"
        self.root, self.state, self.logs = root or f"{self.base}/root", f"{self.base}/state", f"{self.base}/logs"
        self.socket, self.config = f"{self.base}/cri.sock", f"{self.base}/config.toml"
        self.network = network(number, self.base)
        for directory in (self.root, self.state, self.logs, f"{self.base}/net.d"):
            os.makedirs(directory, exist_ok=directory == root)
        with open(f"{self.base}/net.d/10-bench.conflist", "w") as f:
            json.dump(self.network, f)
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
        with open(f"{self.base}/daemon.log", "wb") as out:
            self.process = subprocess.Popen(
                self.command(),
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # a Ctrl-C is for this program, which stops the daemon itself
            )
        self.client = Client(self.socket)
        deadline = time.monotonic() + 30
        while True:
            try:
                self.client.Version(deadline=2)
                return self
            except grpc.RpcError as e:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{self.name} does not serve ({e}):\n{self.log()}") from None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None and kind is not KeyboardInterrupt:
            print(f"{self.name}'s log ends:\n{self.log()[-3000:]}", file=sys.stderr)
        try:
            if self.process.poll() is None:
                self.remove_pods()
        except grpc.RpcError as e:
            print(f"{self.name}: pods cannot be removed: {e}", file=sys.stderr)
        finally:
            self.client.channel.close()
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                print(f"{self.name} does not stop", file=sys.stderr)
                self.process.kill()
                self.process.wait()

    def log(self) -> str:
        """What the daemon has logged."""
        with open(f"{self.base}/daemon.log") as f:
            return f.read()

    def version(self) -> str:
        """The runtime and its version."""
        answer = self.client.Version()
        return f"{self.name} {answer.runtime_version}"

    def await_images(self) -> None:
        """Wait until the daemon serves the images that it was given."""
        deadline = time.monotonic() + 20
        for name in (IMAGE, PAUSE):
            while not self.client.ImageStatus(image=cri.ImageSpec(image=name)).HasField("image"):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{self.name} does not have {name}")
                time.sleep(0.05)

    def pod(self, name: str) -> cri.PodSandboxConfig:
        """A pod as the kubelet describes it; each of its containers has a PID namespace of its own."""
        return cri.PodSandboxConfig(
            metadata=cri.PodSandboxMetadata(name=name, namespace="bench", uid=f"uid-{name}"),
            hostname=name,
            log_directory=f"{self.logs}/{name}",
            linux=cri.LinuxPodSandboxConfig(
                cgroup_parent=f"{CGROUP}/{self.name}",
                security_context=cri.LinuxSandboxSecurityContext(namespace_options=_namespaces()),
            ),
        )

    def container(self, name: str) -> cri.ContainerConfig:
        """A container that sleeps, with a best-effort pod's resources."""
        return cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name=name),
            image=cri.ImageSpec(image=IMAGE),
            command=SLEEP,
            log_path=f"{name}.log",
            linux=cri.LinuxContainerConfig(
                resources=cri.LinuxContainerResources(cpu_shares=2, oom_score_adj=1000),
                security_context=cri.LinuxContainerSecurityContext(
                    namespace_options=_namespaces(), masked_paths=MASKED, readonly_paths=READONLY
                ),
            ),
        )

    def run(self, pod: str, config: cri.PodSandboxConfig, name: str) -> str:
        """A running container's ID."""
        create = self.client.CreateContainer(
            pod_sandbox_id=pod, config=self.container(name), sandbox_config=config
        ).container_id
        self.client.StartContainer(container_id=create)
        return str(create)

    def remove_pods(self) -> None:
        """Stop and remove every pod."""
        for pod in self.client.ListPodSandbox().items:
            self.client.StopPodSandbox(pod_sandbox_id=pod.id)
            self.client.RemovePodSandbox(pod_sandbox_id=pod.id)


class Criserver(Node):
    """This tree's daemon."""

    name = "criserver"

    def configuration(self) -> str:
        return (
            f'root = "{self.root}"\nstate = "{self.state}"\n[grpc]\naddress = "{self.socket}"\n'
            f'[log]\nformat = "json"\n[cni]\nbin_dirs = ["{CNI_BIN}"]\nconf_dir = "{self.base}/net.d"\n'
        )

    def command(self) -> list[str]:
        return [sys.executable, "-m", "criserver", "serve", "--config", self.config]

    def load(self, archive: str) -> None:
        command = [sys.executable, "-m", "criserver", "image", "import", "--config", self.config, archive]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def helpers(self) -> list[int]:
        """The nursery and its forks, the shims, which share its command line."""
        return [pid for pid in descendants(self.process.pid) if b"shims.nursery_process" in command_line(pid)]


class Containerd(Node):
    """containerd with its CRI plugin; ``program`` may be any build that reads a version 2 configuration."""

    name = "containerd"

    def __init__(self, scratch: str, number: int, program: str = "containerd", *, root: str | None = None) -> None:
        found = shutil.which(program)
        if found is None:
            raise RuntimeError(f"{program} is not an executable; install containerd, or name one by --containerd")
        self.program = os.path.realpath(found)
        self._fresh = [path for path in ("/run/containerd/s", "/run/containerd") if not os.path.exists(path)]
        super().__init__(scratch, number, root=root)
        os.makedirs(f"{self.base}/tmp")

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
        """The shims, which outlive the process that started them and are therefore this program's, and the pauses."""
        shims = [pid for pid in descendants(os.getpid()) if b"containerd-shim" in command_line(pid).split(b"\0")[0]]
        below = [pid for shim in shims for pid in descendants(shim)]
        return shims + [pid for pid in below if command_line(pid).startswith(b"/infra\0")]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            super().__exit__(kind, error, _)
        finally:
            self._remove_sockets()

    def _remove_sockets(self) -> None:
        """Shims listen in /run/containerd whatever the configuration says, and leave a socket where they are killed."""
        for directory, _, files in os.walk(f"{self.state}/io.containerd.runtime.v2.task"):
            for name in {"address", "bootstrap.json"} & set(files):  # of containerd 1 and 2
                with open(f"{directory}/{name}") as f:
                    for path in re.findall(r'unix://([^"\s]+)', f.read()):
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(path)
        for path in self._fresh:
            with contextlib.suppress(OSError):
                os.rmdir(path)


def _namespaces() -> cri.NamespaceOption:
    return cri.NamespaceOption(network=cri.POD, ipc=cri.POD, pid=cri.CONTAINER)


def network(number: int, directory: str) -> dict[str, Any]:
    """A CNI network list whose bridge and subnet are of its own; its leases are kept below ``directory``."""
    bridge = {
        "type": "bridge",
        "bridge": f"{LINK_PREFIX}{number}",
        "isGateway": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": f"10.{215 + number}.0.0/16"}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": f"{directory}/ipam",
        },
    }
    plugins = [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}]
    return {"cniVersion": "1.0.0", "name": f"bench{number}", "plugins": plugins}


def build_images(directory: str) -> list[str]:
    """Paths of two docker-archives: IMAGE with the host's busybox, and PAUSE with its catatonit."""
    applets = subprocess.run(["busybox", "--list"], check=True, capture_output=True, text=True).stdout.split()
    busybox = shutil.which("busybox") or "/bin/busybox"
    links = [f"bin/{applet}" for applet in applets if applet != "busybox"]
    image = _archive(f"{directory}/bench.tar", IMAGE, {"bin/busybox": busybox}, links, {"Env": ["PATH=/bin"]})
    return [image, _archive(f"{directory}/pause.tar", PAUSE, {"infra": INFRA}, [], {"Entrypoint": ["/infra", "-P"]})]


def _archive(path: str, tag: str, files: dict[str, str], links: list[str], config: dict[str, Any]) -> str:
    """Write an image of one layer: static programs, and links to busybox."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for name in ("bin", "proc", "sys", "dev", "etc", "tmp"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for name, source in files.items():
            tar.add(os.path.realpath(source), name)
        for name in links:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)
    document = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer.getvalue()).hexdigest()]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [tag], "Layers": ["layer.tar"]}]
    with tarfile.open(path, "w") as tar:
        for name, data in (
            ("config.json", json.dumps(document).encode()),
            ("layer.tar", layer.getvalue()),
            ("manifest.json", json.dumps(manifest).encode()),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    """A directory on a tmpfs of its own; at the end nothing is left of it, nor of what ran in it.

    This process becomes the reaper of its orphans, so that every daemon and shim stays its descendant. What is
    still there at the end, after each runtime has been asked to remove its pods, is named on standard error.
    """
    if os.geteuid() != 0:
        raise RuntimeError("must be run as root: it mounts, makes namespaces and starts containers")
    if links := _links():
        raise RuntimeError(
            f"network links {', '.join(links)} are there: wait for the other benchmark, or delete them if it was killed"
        )
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    base = tempfile.mkdtemp(prefix="cribench-", dir="/run")
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=700", "cribench", base], check=True)
        yield base
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _undo(base)


def _undo(base: str) -> None:
    forced = _kill_descendants()
    points = _mounts(base)
    forced += [f"mount {point}" for point in points if point != base]
    for point in reversed(points):
        subprocess.run(["umount", "--lazy", point], check=False)
    os.rmdir(base)
    for hierarchy in _hierarchies():
        top = hierarchy + CGROUP
        for directory, _, _ in os.walk(top, topdown=False):
            if directory != top and os.path.dirname(directory) != top:  # these two are made for the pods to be in
                forced.append(f"cgroup {directory.removeprefix(hierarchy)}")
            os.rmdir(directory)
    for link in _links():
        subprocess.run(["ip", "link", "delete", link], check=True)
    for what in dict.fromkeys(forced):  # a cgroup is in each hierarchy
        print(f"undone by force: {what}", file=sys.stderr)


def _kill_descendants() -> list[str]:
    forced = []
    while pids := descendants(os.getpid()):
        for pid in pids:
            words = command_line(pid).replace(b"\0", b" ").decode(errors="replace")
            if words:  # a zombie has none
                forced.append(f"process {pid}: {words}")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)
    return forced


def _mounts(base: str) -> list[str]:
    """The mount points at and below ``base``, in the order in which they were mounted."""
    with open("/proc/self/mountinfo") as f:
        return [point for line in f if (point := line.split()[4]) == base or point.startswith(f"{base}/")]


def _hierarchies() -> list[str]:
    """Where cgroup hierarchies are mounted, of either version."""
    with open("/proc/self/mountinfo") as f:
        return [line.split()[4] for line in f if line.partition(" - ")[2].startswith("cgroup")]


def _links() -> list[str]:
    return [name for name in os.listdir("/sys/class/net") if name.startswith(LINK_PREFIX)]


def descendants(ancestor: int) -> list[int]:
    """The PIDs of all processes that descend from one, those that have ended and are not reaped yet included."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as f:
                parent = int(f.read().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found, pending = [], [ancestor]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def command_line(pid: int) -> bytes:
    """A process's arguments, each ended by NUL; empty for one that is gone."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            return f.read()
    except OSError:
        return b""


def memory(pid: int, field: str = "Pss") -> float:
    """``field`` of a process's memory (/proc/PID/smaps_rollup, proc(5)) in MiB."""
    with open(f"/proc/{pid}/smaps_rollup") as f:
        for line in f:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
    raise KeyError(field)
