"""A node for tests: a real daemon in a scratch directory on a tmpfs, and a client of its socket.

E2E_CGROUP_DRIVER ("cgroupfs" where it is not set, or "systemd") and E2E_RUNTIME (runc) are what its daemon is given;
E2E_SLOWNESS is by how much longer everything may take than here (1), as on an emulated processor.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups
from snapshotter import mounts
from tests.support.waiting import SLOWNESS, eventually


def _own_number() -> int:
    """A number of this run alone: others may be at work on the machine. Nothing else uses 10.NUMBER.0.0/16."""
    taken = {96, 198, 211}  # test_kubelet.py and test_network.py have addresses there
    with open("/proc/net/route") as f:
        for line in f.readlines()[1:]:
            for word in line.split()[1:3]:  # the destination and the gateway
                first, second, *_ = int(word, 16).to_bytes(4, sys.byteorder)
                taken |= {second} if first == 10 else set()
    return next(n for n in (20 + (os.getpid() + step) % 200 for step in range(200)) if n not in taken)


RUN = _own_number()
BRIDGE = f"crie2e{RUN}"
SUBNET = f"10.{RUN}.0.0/16"
GATEWAY = f"10.{RUN}.0.1"
NETWORK = f"e2e{RUN}"
SCRATCH = f"/run/cri-e2e-{RUN}-"
DRIVER = os.environ.get("E2E_CGROUP_DRIVER", "cgroupfs")
# Seconds. A call that takes so long hangs.
PATIENCE = 120 * SLOWNESS
# The OCI runtime of all tests that do not name one: a path, or a name on PATH; or a shim, as `handler` says.
RUNTIME = os.environ.get("E2E_RUNTIME", "runc")


def handler(name: str, runtime: str) -> str:
    """The table of a handler: with an OCI runtime, or with a shim of containerd's kind by its name or its path."""
    shim = runtime.startswith("io.containerd.") or os.path.basename(runtime).startswith("containerd-shim-")
    return f'[runtimes.{name}]\n{"shim" if shim else "path"} = "{runtime}"\n'


class Client:
    """Every unary RPC of CRI as a method: ``client.RunPodSandbox(config=...)``.

    ``client.RunPodSandbox.begin(config=...)`` does not wait for the answer: it is a grpc.Future that can be cancelled.
    """

    def __init__(self, socket: str) -> None:
        self.channel = grpc.insecure_channel(f"unix:{socket}", options=[("grpc.max_receive_message_length", 16 << 20)])
        for service in cri.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                make = self.channel.unary_stream if method.server_streaming else self.channel.unary_unary
                call: Any = make(
                    f"/{service.full_name}/{method.name}",
                    request_serializer=lambda m: m.SerializeToString(),
                    response_deserializer=GetMessageClass(method.output_type).FromString,
                )
                setattr(self, method.name, self._caller(call, GetMessageClass(method.input_type)))

    @staticmethod
    def _caller(call: Any, request: Any) -> Any:
        def rpc(deadline: float = PATIENCE, headers: Mapping[str, str] | None = None, **fields: Any) -> Any:
            metadata = tuple((headers or {}).items())
            return call(request(**fields), timeout=deadline, wait_for_ready=True, metadata=metadata)

        def begin(**fields: Any) -> Any:
            return call.future(request(**fields), timeout=PATIENCE, wait_for_ready=True)

        rpc.begin = begin  # type: ignore[attr-defined]
        return rpc

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class Node:
    """One daemon. ``start`` and ``kill`` may alternate; ``close`` undoes everything."""

    pods: ClassVar[set[str]] = set()  # of all nodes of this run

    def __init__(self, runtimes: str = "", infra: str = "/usr/bin/catatonit") -> None:
        self.base = tempfile.mkdtemp(prefix=SCRATCH)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=711", "cri-e2e", self.base], check=True)
        self.root, self.state = f"{self.base}/root", f"{self.base}/state"
        self.logs, self.cni, self.certs = f"{self.base}/logs", f"{self.base}/net.d", f"{self.base}/certs.d"
        self.netns = f"{self.base}/netns"
        for directory in (self.root, self.state, self.logs, self.cni, self.certs, f"{self.base}/cdi"):
            os.makedirs(directory)
        # Of its own, as on a node: the disk may be full while the state directory is not.
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=711", "cri-e2e", self.root], check=True)
        self.socket = f"{self.base}/cri.sock"
        self.config = f"{self.base}/config.toml"
        with open(self.config, "w") as f:
            f.write(
                f'root = "{self.root}"\nstate = "{self.state}"\n'
                f'[grpc]\naddress = "{self.socket}"\n'
                f'[log]\nformat = "json"\nlevel = "debug"\n'
                f'[cni]\nconf_dir = "{self.cni}"\nbin_dirs = ["{self.base}/bin", "/usr/lib/cni"]\n'
                f'netns_dir = "{self.netns}"\n'
                f"timeout = {int(10 * SLOWNESS)}\n"
                f'[nri]\nsocket_path = "{self.base}/nri/nri.sock"\nplugin_path = "{self.base}/nri/plugins"\n'
                f'plugin_config_path = "{self.base}/nri/conf.d"\n'
                f"plugin_request_timeout = {int(5 * SLOWNESS)}\n"
                f'[cdi]\ndirs = ["{self.base}/cdi"]\n'
                f'[registry]\nconfig_path = "{self.certs}"\n'
                f'[runtime]\ncgroup_driver = "{DRIVER}"\ninfra = "{infra}"\n' + (runtimes or handler("runc", RUNTIME))
            )
        self.write_network()
        self.python = sys.executable
        self.program = ["-m", "criserver"]
        self._complaints = 0  # that were told already
        self.described: dict[
            str, cri.PodSandboxConfig
        ] = {}  # the pods whose containers are created with their pod's description
        self.process: subprocess.Popen[bytes] | None = None
        self.client: Client

    def write_network(self) -> None:
        """The bridge network of the tests."""
        bridge = {
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": True,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": SUBNET}]], "dataDir": f"{self.base}/ipam"},
        }
        plugins = [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}]
        with open(f"{self.cni}/10-e2e.conflist", "w") as f:
            json.dump({"cniVersion": "1.0.0", "name": NETWORK, "plugins": plugins}, f)

    def start(self, *, recovered: bool = True) -> None:
        """Start the daemon and wait until it serves, and until it has ``recovered`` all pods unless that is False."""
        logged = len(self.daemon_log()) if os.path.exists(f"{self.base}/daemon.log") else 0
        with open(f"{self.base}/daemon.log", "ab") as out:
            self.process = subprocess.Popen(
                [self.python, *self.program, "serve", "--config", self.config],
                stderr=out,
                stdout=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.client = Client(self.socket)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.client.Version(deadline=2 * SLOWNESS)
                break
            except grpc.RpcError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"the daemon does not serve:\n{self.daemon_log()}") from None
        if recovered:
            eventually(lambda: "recovered" in self.daemon_log()[logged:], 120)

    def kill(self) -> None:
        """SIGKILL the daemon."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.client.channel.close()

    def stop(self) -> int:
        """SIGTERM the daemon; its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE)
        self.client.channel.close()
        return code

    def rewrite(self, table: str, key: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Change a record in the database of a daemon that does not run, and in its second copy."""
        with contextlib.closing(sqlite3.connect(f"{self.root}/criserver.db")) as db, db:
            (stored,) = db.execute(f"SELECT value FROM {table} WHERE key = ?", (key,)).fetchone()
            changed = json.dumps(change(json.loads(stored))).encode()
            db.execute(f"UPDATE {table} SET value = ? WHERE key = ?", (changed, key))
        with open(f"{self.state}/records/{table}/{key}", "wb") as f:
            f.write(key.encode() + b"\n" + changed)

    def daemon_log(self) -> str:
        with open(f"{self.base}/daemon.log") as f:
            return f.read()

    def complaints(self) -> list[str]:
        """New lines of the daemon's log in which asyncio reports an error that no code has taken."""
        words = ("Exception in callback", "exception was never retrieved", "was never awaited")
        found = [line for line in self.daemon_log().splitlines() if any(word in line for word in words)]
        new, self._complaints = found[self._complaints :], len(found)
        return new

    def remove_pods(self) -> None:
        """Stop and remove every pod."""
        for pod in self.client.ListPodSandbox().items:
            self.pods.add(pod.id)
            self.client.StopPodSandbox(pod_sandbox_id=pod.id)
            self.client.RemovePodSandbox(pod_sandbox_id=pod.id)

    def leftovers(self) -> list[str]:
        """What is on the node although no pod is: mounts, pins, bundles, addresses, shims."""
        found = [point for point in mounts.mounts_below(self.base) if point != self.root]
        for directory in (self.netns, *(f"{self.state}/{name}" for name in ("ns", "sandboxes", "containers"))):
            with contextlib.suppress(FileNotFoundError):
                found += [f"{directory}/{name}" for name in os.listdir(directory)]
        found += self._kept_by_runtimes()
        for directory in ("snapshots/active", "snapshots/staging", "content/ingest", "checkpoints"):
            with contextlib.suppress(FileNotFoundError):
                found += [f"{self.root}/{directory}/{name}" for name in os.listdir(f"{self.root}/{directory}")]
        with contextlib.suppress(FileNotFoundError):
            found += [f"ipam {name}" for name in os.listdir(f"{self.base}/ipam/{NETWORK}") if name[0].isdigit()]
        found += [
            f"process {pid}: {words}" for pid, words in processes() if self.base in words and "serve" not in words
        ]
        return found + cgroups_of_pods()

    def settled(self) -> list[str]:
        """What is left once all had time to go: a shim that has told of its end is there for a moment yet."""
        deadline = time.monotonic() + 60 * SLOWNESS
        while (left := self.leftovers()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left

    def descriptors(self) -> list[str]:
        """What the daemon has open, as the kernel names it."""
        assert self.process is not None
        found = []
        for path in glob.glob(f"/proc/{self.process.pid}/fd/*"):
            with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
                found.append(os.readlink(path))
        return found

    def streams(self) -> int:
        """How many sockets, pipes and terminals the daemon has: its clients' and its containers'.

        Files and directories are not among them. It opens some at any time by itself, as to measure a snapshot.
        """
        return sum(link.startswith(("socket:", "pipe:", "/dev/ptmx", "/dev/pts/")) for link in self.descriptors())

    def close(self) -> None:
        """Undo everything, whatever state it is in."""
        try:
            if self.process is not None and self.process.poll() is None:
                with contextlib.suppress(grpc.RpcError):
                    self.remove_pods()
                self.stop()
        finally:
            if self.process is not None and self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            for kept in self._kept_by_runtimes():
                root, name = os.path.split(kept)
                subprocess.run([RUNTIME, "--root", root, "delete", "-f", name], check=False)
            for pid, words in processes():
                if self.base in words:
                    with contextlib.suppress(ProcessLookupError):  # a shim may be ending by itself
                        os.kill(pid, signal.SIGKILL)
            for point in (*mounts.mounts_below(self.base), self.base):
                mounts.unmount(point)
            shutil.rmtree(self.base)
            subprocess.run(["ip", "link", "delete", BRIDGE], check=False, capture_output=True)

    def _kept_by_runtimes(self) -> list[str]:
        """The directories of containers that the OCI runtimes know; crun has a hidden cache beside them."""
        return glob.glob(f"{self.state}/runtimes/*/*")

    def pod(self, name: str = "pod", attempt: int = 0, **fields: Any) -> cri.PodSandboxConfig:
        """A pod as a kubelet would describe it, each container with a PID namespace of its own."""
        linux = fields.pop("linux", None) or cri.LinuxPodSandboxConfig(
            security_context=cri.LinuxSandboxSecurityContext(namespace_options=cri.NamespaceOption(pid=cri.CONTAINER))
        )
        return cri.PodSandboxConfig(
            metadata=cri.PodSandboxMetadata(name=name, namespace="e2e", uid=f"uid-{name}", attempt=attempt),
            hostname=fields.pop("hostname", name),
            log_directory=f"{self.logs}/{name}",
            linux=linux,
            **fields,
        )

    def run_pod(self, name: str = "pod", deadline: float = PATIENCE, handler: str = "", **fields: Any) -> str:
        """A running sandbox's ID."""
        config = self.pod(name, **fields)
        pod: str = self.client.RunPodSandbox(deadline, config=config, runtime_handler=handler).pod_sandbox_id
        self.pods.add(pod)
        return pod

    def create(self, pod: str, name: str, command: list[str] | None = None, **fields: Any) -> str:
        """A created container's ID."""
        headers = fields.pop("headers", None)
        config = cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name=name, attempt=fields.pop("attempt", 0)),
            image=cri.ImageSpec(
                image=fields.pop("image", "localhost/busybox:latest"),
                user_specified_image=fields.pop("user_specified_image", ""),
            ),
            command=command or [],
            log_path=fields.pop("log_path", f"{name}.log"),
            **fields,
        )
        described = self.described.get(pod)
        return self.client.CreateContainer(
            pod_sandbox_id=pod, config=config, sandbox_config=described, headers=headers
        ).container_id

    def run(self, pod: str, name: str, command: list[str] | None = None, **fields: Any) -> str:
        """A started container's ID."""
        container = self.create(pod, name, command, **fields)
        self.client.StartContainer(container_id=container)
        return container

    def status(self, container: str) -> cri.ContainerStatus:
        return self.client.ContainerStatus(container_id=container).status

    def pid(self, container: str) -> int:
        """The first process of a container, on the host."""
        pid: int = json.loads(self.client.ContainerStatus(container_id=container, verbose=True).info["info"])["pid"]
        return pid

    def wait(self, container: str, seconds: float = 60) -> cri.ContainerStatus:
        """The status of a container once it has exited."""
        eventually(lambda: self.status(container).state == cri.CONTAINER_EXITED, seconds)
        return self.status(container)

    def log(self, container: str) -> str:
        """What a container printed, with the log's framing taken off; without a line that is half written."""
        with open(self.status(container).log_path) as f:
            return "".join(line.split(" ", 3)[3] for line in f if line.endswith("\n"))

    def sh(self, container: str, script: str, timeout: int = int(60 * SLOWNESS)) -> str:
        """What a shell script in the container prints; it must succeed."""
        result = self.client.ExecSync(container_id=container, cmd=["sh", "-c", script], timeout=timeout)
        assert result.exit_code == 0, result
        return result.stdout.decode()


@contextlib.contextmanager
def filled(mount: str) -> Iterator[None]:
    """No room on a tmpfs."""

    def fill() -> bool:
        """Whether it is filled: the kernel refuses a size that is too small by what was written since it was read."""
        size = os.statvfs(mount)
        used = (size.f_blocks - size.f_bfree) * size.f_frsize
        return subprocess.run(["mount", "-o", f"remount,size={used}", mount], check=False).returncode == 0

    eventually(fill)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,size=8g", mount], check=True)


# A shell script that waits in a container until the test lets it go on.
UNTIL_GO = "while [ ! -e /go ]; do sleep 0.05; done"


def go(pid: int) -> None:
    """Let the container with this first process go on from UNTIL_GO. No daemon is needed for it."""
    Path(f"/proc/{pid}/root/go").touch()


def processes() -> Iterator[tuple[int, str]]:
    """The PIDs of all processes, each with its command line and its directory, which is what tells shims apart."""
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                with open(f"/proc/{name}/cmdline", errors="surrogateescape") as f:
                    words = f.read().replace("\0", " ")
                if words:  # one that is just ending has none
                    yield int(name), f"{words} in {os.readlink(f'/proc/{name}/cwd')}"


def cgroup(pod: str, container: str) -> str:
    """The cgroup of a container whose pod has been given no cgroup parent, below the hierarchies' roots."""
    return cgroups.path(cgroups.own_parent(DRIVER, pod), container)


def limit_of(pod: str, container: str, controller: str, name: str) -> str:
    """What a file of such a container's cgroup says; ``name`` is version 1's, or 2's for the controller ""."""
    return Path(cgroups.roots()[controller] + cgroup(pod, container), name).read_text().strip()


def cgroups_of_pods() -> list[str]:
    """The cgroups that are there of pods of this run."""
    return [path for path in own_cgroups() if any(pod in path for pod in Node.pods)]


def own_cgroups() -> list[str]:
    """Cgroups that a daemon makes by itself, a directory a pod; another daemon's pods may be among them."""
    tops = set(cgroups.roots().values())
    return [
        found for top in tops for part in ("criserver", "criserver.slice") for found in glob.glob(f"{top}/{part}/*/")
    ]


@contextmanager
def refused(code: grpc.StatusCode, *words: str) -> Iterator[None]:
    """The call within must be refused with this code and all of these words."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    said = caught.value.details() or ""
    assert caught.value.code() is code, said
    for word in words:
        assert word in said, said


def rss(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
