"""The Debian package: installed offline in a root of its own, upgraded beneath pods, and removed.

The root is this machine's with a writable layer over it, so that what the package depends on is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import grpc
import pytest

from criserver.config import load
from criserver.pb.runtime.v1 import api_pb2 as cri
from snapshotter import mounts
from tests.support.node import BRIDGE, NETWORK, SCRATCH, SUBNET, Client, own_cgroups, processes

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
PYTHON = "{}.{}".format(*sys.version_info)
IMPORT_ALL = """
import sys, pkgutil, importlib
sys.path.insert(0, "/usr/lib/criserver")
ours = ("criserver", "shims", "snapshotter")
names = [m.name for m in pkgutil.walk_packages(sys.path[:1]) if m.name.split(".")[0] in ours]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(*sorted({getattr(m, "__file__", None) or "" for m in sys.modules.values()}), sep="\\n")
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The package as ``make deb`` builds it, but for the time that xz takes."""
    directory = tmp_path_factory.mktemp("deb")
    command = [sys.executable, f"{REPOSITORY}/contrib/deb/build.py", "--python", PYTHON, "--compression", "gzip"]
    subprocess.run([*command, "--output", str(directory)], check=True, cwd="/")
    (path,) = directory.iterdir()
    return str(path)


@pytest.fixture
def root(nothing_left: None) -> Iterator[str]:
    """A root to install into."""
    base = tempfile.mkdtemp(prefix=SCRATCH)
    root = f"{base}/root"
    try:
        subprocess.run(["mount", "-t", "tmpfs", "--make-private", "deb", base], check=True)
        for name in ("upper", "work", "root"):
            os.mkdir(f"{base}/{name}")
        options = f"lowerdir=/,upperdir={base}/upper,workdir={base}/work"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "deb", root], check=True)
        subprocess.run(["mount", "-t", "proc", "proc", f"{root}/proc"], check=True)
        subprocess.run(["mount", "--bind", "/dev", f"{root}/dev"], check=True)
        subprocess.run(["mount", "--rbind", "--make-rslave", "/sys", f"{root}/sys"], check=True)
        for name in ("run", "var/lib/criserver", "etc/cni/net.d"):
            os.makedirs(f"{root}/{name}", exist_ok=True)
            subprocess.run(["mount", "-t", "tmpfs", "deb", f"{root}/{name}"], check=True)
        yield root
    finally:
        for pid, _ in processes():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/root").startswith(base):
                    os.kill(pid, signal.SIGKILL)
        for point in (*mounts.mounts_below(base), base):
            mounts.unmount(point)
        shutil.rmtree(base)
        subprocess.run(["ip", "link", "delete", BRIDGE], check=False, capture_output=True)


def inside(root: str, *command: str, network: bool = False) -> str:
    """What a command prints in the root; without a network, unless it is to have one."""
    prefix = [] if network else ["unshare", "--net"]
    done = subprocess.run(
        [*prefix, "chroot", root, *command],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install(root: str, package: str) -> None:
    shutil.copy(package, f"{root}/run/package.deb")
    inside(root, "dpkg", "--install", "/run/package.deb")


def status(root: str) -> str:
    return inside(root, "dpkg-query", "--show", "--showformat=${db:Status-Status} ${Version}", "criserver")


def serve(root: str) -> subprocess.Popen[bytes]:
    """Start the daemon as its unit does, and wait until it serves."""
    with open(f"{root}/run/daemon.log", "ab") as out:
        command = ["chroot", root, "criserver", "serve", "--config", "/etc/criserver/config.toml"]
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(grpc.RpcError):
            Client(f"{root}/run/criserver/criserver.sock").Version(deadline=2)
            return daemon
        with open(f"{root}/run/daemon.log") as f:
            assert daemon.poll() is None and time.monotonic() < deadline, f.read()


def write_network(root: str) -> None:
    bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "ipam": {}}
    bridge["ipam"] = {"type": "host-local", "ranges": [[{"subnet": SUBNET}]], "dataDir": "/run/ipam"}
    with open(f"{root}/etc/cni/net.d/10-e2e.conflist", "w") as f:
        json.dump({"cniVersion": "1.0.0", "name": NETWORK, "plugins": [bridge]}, f)


def second_build(package: str, directory: str) -> str:
    """The same package as revision 2."""
    tree = f"{directory}/tree"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    with open(f"{tree}/DEBIAN/control") as f:
        control = f.read()
    with open(f"{tree}/DEBIAN/control", "w") as f:
        f.write(re.sub(r"(?m)^(Version: .*)-1", r"\1-2", control))
    path = f"{directory}/second.deb"
    subprocess.run(["dpkg-deb", "-Znone", "--build", tree, path], check=True, capture_output=True)
    return path


def test_all_that_it_needs_is_in_it(root: str, package: str) -> None:
    install(root, package)
    assert inside(root, "criserver", "--version").startswith("criserver ")
    imported = inside(root, f"/usr/bin/python{PYTHON}", "-IS", "-c", IMPORT_ALL).splitlines()
    assert any(path.endswith("api_pb2.py") for path in imported)
    foreign = [p for p in imported if not p.startswith(("/usr/lib/criserver/", f"/usr/lib/python{PYTHON}/")) and p]
    assert foreign == []
    compiled = inside(root, "find", "/usr/lib/criserver/criserver", "-name", f"*.cpython-{PYTHON.replace('.', '')}.pyc")
    assert "cli/__pycache__/__init__" in compiled

    # The configuration is the defaults but for what goes with systemd, which started us.
    shipped, default = load(f"{root}/etc/criserver/config.toml"), load(None)
    assert shipped.cgroup_driver == "systemd"
    assert [f for f in default.__slots__ if getattr(shipped, f) != getattr(default, f)] == ["cgroup_driver"]
    listed = inside(root, "dpkg", "--listfiles", "criserver").splitlines()
    assert "/usr/lib/systemd/system/criserver.service" in listed
    completion = inside(root, "bash", "-c", ". /usr/share/bash-completion/completions/criserver; complete -p criserver")
    assert "-F _criserver criserver" in completion
    assert {"/usr/share/zsh/vendor-completions/_criserver", "/usr/share/fish/vendor_completions.d/criserver.fish"} <= {
        *listed
    }
    text = subprocess.run(["grep", "-rlF", REPOSITORY, f"{root}/usr/lib/criserver"], capture_output=True, text=True)
    assert text.stdout == "", "where it was built is nobody's business"


def test_pods_outlive_an_upgrade_and_end_with_the_removal(
    root: str, package: str, busybox_archive: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    install(root, package)
    configuration = f"{root}/etc/criserver/config.toml"
    inside(root, "sed", "-i", 's/^cgroup_driver = .*/cgroup_driver = "cgroupfs"/', "/etc/criserver/config.toml")
    with open(configuration) as f:
        edited = f.read()
    write_network(root)
    shutil.copy(busybox_archive, f"{root}/run/busybox.tar")
    daemon = serve(root)
    inside(root, "criserver", "image", "import", "/run/busybox.tar")
    client = Client(f"{root}/run/criserver/criserver.sock")
    metadata = cri.PodSandboxMetadata(name="deb", namespace="e2e", uid="deb")
    sandbox = cri.PodSandboxConfig(metadata=metadata, log_directory="/run/logs", linux={"cgroup_parent": ""})
    pod = client.RunPodSandbox(config=sandbox).pod_sandbox_id
    config = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="c"),
        image=cri.ImageSpec(image="localhost/busybox:latest"),
        command=["sh", "-c", "while :; do echo tick; sleep 0.1; done"],
        log_path="c.log",
    )
    container = client.CreateContainer(pod_sandbox_id=pod, config=config).container_id
    client.StartContainer(container_id=container)
    pid = json.loads(client.ContainerStatus(container_id=container, verbose=True).info["info"])["pid"]
    assert container in cgroup_of(pid)

    install(root, second_build(package, str(tmp_path_factory.mktemp("second"))))
    assert "-2+py" in status(root)
    with open(configuration) as f:
        assert f.read() == edited
    daemon.terminate()
    daemon.wait(30)
    daemon = serve(root)
    client = Client(f"{root}/run/criserver/criserver.sock")
    assert client.ContainerStatus(container_id=container).status.state == cri.CONTAINER_RUNNING
    assert container in cgroup_of(pid), "it is the same process"
    assert client.ExecSync(container_id=container, cmd=["echo", "hi"], timeout=60).stdout == b"hi\n"

    # Without systemd nobody stops the daemon for us: the package stays, and so do the pods.
    with pytest.raises(AssertionError, match="stop it first"):
        inside(root, "dpkg", "--remove", "criserver", network=True)
    assert status(root).startswith("installed")
    daemon.terminate()
    daemon.wait(30)
    # A configuration that cannot be read does not keep the package: the pods of the default directories are removed.
    with open(configuration, "a") as f:
        f.write("state = \n")
    inside(root, "dpkg", "--remove", "criserver", network=True)
    assert status(root).startswith("config-files")
    assert [path for path in own_cgroups() if pod in path] == []
    assert not os.path.exists(f"/proc/{pid}")
    assert not os.path.exists(f"{root}/run/criserver")
    assert [p for p in mounts.mounts_below(root) if "criserver/" in p] == []
    assert [name for name in os.listdir(f"{root}/run/ipam/{NETWORK}") if name[0].isdigit()] == []
    assert not os.path.exists(f"{root}/usr/lib/criserver")
    assert os.path.exists(configuration)
    assert os.listdir(f"{root}/var/lib/criserver") != []

    # The purge deletes what criserver has made. It is a file system of its own here, so the directory stays.
    with open(f"{root}/var/lib/criserver/theirs", "w"):
        pass
    os.makedirs(f"{root}/run/criserver/theirs")
    inside(root, "dpkg", "--purge", "criserver")
    assert not os.path.exists(f"{root}/etc/criserver")
    assert sorted(os.listdir(f"{root}/var/lib/criserver")) == ["criserver.root", "theirs"]
    assert os.path.isdir(f"{root}/run/criserver/theirs")


def cgroup_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cgroup") as f:
            return f.read()
    except OSError:
        return ""
