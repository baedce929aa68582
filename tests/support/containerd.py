"""A containerd of the tests' own, behind the same client as a node of criserver, to compare the two."""

from __future__ import annotations

import contextlib
import glob
import io
import os
import re
import shutil
import subprocess
import time
from typing import Any

import grpc

from criserver import cli
from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.imagebuilder import busybox_image, write_archive
from tests.support.node import Client, Node
from tests.support.waiting import SLOWNESS, eventually

PAUSE = "localhost/pause:latest"


def installed() -> bool:
    """Whether containerd, its client and its shim are on PATH."""
    return all(shutil.which(name) for name in ("containerd", "ctr", "containerd-shim-runc-v2"))


def version() -> str:
    """The version of the containerd on PATH, such as 2.1."""
    said = subprocess.run(["containerd", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r" v?(\d+\.\d+)", said)
    assert found, said
    return found[1]


class ContainerdNode(Node):
    """containerd with directories, a socket and a network of its own. Its pods have the pause image ``PAUSE``."""

    def __init__(self) -> None:
        super().__init__()
        self._cgroups = f"/{os.path.basename(self.base)}"
        self._settings = f"{self.base}/containerd.toml"
        with open(self._settings, "w") as f:
            f.write(
                f'version = 3\nroot = "{self.root}"\nstate = "{self.state}"\n'
                'disabled_plugins = ["io.containerd.nri.v1.nri"]\n'
                f'[grpc]\naddress = "{self.socket}"\n'
                f"[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = \"{self.certs}\"\n"
                f"[plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = \"{PAUSE}\"\n"
                # Where the tests run without CAP_SYS_RESOURCE, the score of the pause container cannot be lowered.
                "[plugins.'io.containerd.cri.v1.runtime']\nrestrict_oom_score_adj = true\n"
                f"[plugins.'io.containerd.cri.v1.runtime'.cni]\nconf_dir = \"{self.cni}\"\n"
                'bin_dirs = ["/usr/lib/cni"]\n'
            )

    def start(self, *, recovered: bool = True) -> None:
        """Start containerd, wait until it serves, and import the pause image."""
        with open(f"{self.base}/daemon.log", "ab") as out:
            self.process = subprocess.Popen(
                ["containerd", "--config", self._settings],
                stderr=out,
                stdout=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.client = Client(self.socket)
        deadline = time.monotonic() + 60 * SLOWNESS
        while True:
            try:
                self.client.Version(deadline=2 * SLOWNESS)
                break
            except grpc.RpcError:  # the CRI service comes some time after the socket
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"containerd does not serve:\n{self.daemon_log()}") from None
                time.sleep(0.1)
        path = f"{self.base}/pause.tar"
        write_archive(busybox_image(config={"Cmd": ["sleep", "100000"]}), path, PAUSE)
        done = self.import_archive(path)
        assert done.returncode == 0, done.stderr
        eventually(lambda: self.client.ImageStatus(image=cri.ImageSpec(image=PAUSE)).image.id)

    def import_archive(self, path: str) -> subprocess.CompletedProcess[str]:
        """What ``ctr images import`` says."""
        return self._ctr("import", path)

    def image_names(self) -> set[str]:
        """The names that its store has; its CRI service knows them some time later."""
        return {name for name in self._ctr("ls", "-q").stdout.splitlines() if not name.startswith("sha256:")}

    def _ctr(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = ["ctr", "--address", self.socket, "--namespace", "k8s.io", "images", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def run_pod(self, name: str = "pod", deadline: float = 60 * SLOWNESS, handler: str = "", **fields: Any) -> str:
        config = self.pod(name, **fields)
        pod: str = self.client.RunPodSandbox(deadline, config=config, runtime_handler=handler).pod_sandbox_id
        self.described[pod] = config  # containerd 2.1 crashes without it
        return pod

    def pod(self, name: str = "pod", attempt: int = 0, **fields: Any) -> cri.PodSandboxConfig:
        config = super().pod(name, attempt, **fields)
        config.linux.cgroup_parent = self._cgroups
        return config

    def close(self) -> None:
        super().close()
        for path in glob.glob(f"/sys/fs/cgroup/**{self._cgroups}", recursive=True):
            os.rmdir(path)


def names(node: Node) -> set[str]:
    """The names of all images."""
    if isinstance(node, ContainerdNode):
        return node.image_names()
    return {tag for image in node.client.ListImages().images for tag in image.repo_tags}


def import_here(node: Node, path: str) -> subprocess.CompletedProcess[str]:
    """What criserver's own command for an import says."""
    if isinstance(node, ContainerdNode):
        return node.import_archive(path)
    words = ["image", "import", "--config", node.config, path]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)  # in this process: a start of Python takes longer than the import
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
