"""Bundles that are given to the OCI runtime directly, for tests of one part of the OCI spec."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WAIT = 30.0
CGROUP = f"/criserver-test-bundles-{os.getpid()}"
PATH = "PATH=/bin:/usr/bin"


class Bundles:
    """A root file system with busybox, and containers of it that run to their end; `close` removes all."""

    def __init__(self, runtime: str = "runc") -> None:
        self.runtime = runtime
        self.directory = Path(tempfile.mkdtemp(dir="/run", prefix="bundles-"))
        self.rootfs = self.directory / "rootfs"
        self.number = 0
        for name in ("bin", "proc", "dev", "etc", "mnt", "tmp"):
            (self.rootfs / name).mkdir(parents=True)
        busybox = os.path.realpath(shutil.which("busybox") or "")
        shutil.copy(busybox, self.rootfs / "bin" / "busybox")
        applets = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout.split()
        for applet in set(applets) - {"busybox"}:
            (self.rootfs / "bin" / applet).symlink_to("busybox")

    def spec(self, args: Sequence[str], capabilities: Sequence[str] = ()) -> dict[str, Any]:
        """A spec without devices of its own and without a seccomp filter."""
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0, "additionalGids": []},
                "args": list(args),
                "env": [PATH],
                "cwd": "/",
                "capabilities": {kind: list(capabilities) for kind in ("bounding", "effective", "permitted")},
            },
            "root": {"path": str(self.rootfs), "readonly": True},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
            ],
            "linux": {
                "namespaces": [{"type": kind} for kind in ("ipc", "uts", "mount", "pid", "network")],
                "resources": {"devices": [{"allow": False, "access": "rwm"}]},
                "devices": [],
            },
        }

    def run(self, spec: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        """Run a container to its end."""
        self.number += 1
        name = f"c{self.number}"
        bundle = self.directory / name
        bundle.mkdir()
        spec["linux"]["cgroupsPath"] = f"{CGROUP}/{name}"
        (bundle / "config.json").write_text(json.dumps(spec))
        runtime = [self.runtime, "--root", str(self.directory / "runc")]
        try:
            return subprocess.run(
                [*runtime, "run", "--bundle", str(bundle), name],
                capture_output=True,
                text=True,
                timeout=WAIT,
                check=False,
            )
        finally:
            subprocess.run([*runtime, "delete", "--force", name], capture_output=True, timeout=WAIT, check=False)

    def close(self) -> None:
        """Remove all files and cgroups."""
        shutil.rmtree(self.directory)
        for parent in (*Path("/sys/fs/cgroup").glob(f"*{CGROUP}"), Path(f"/sys/fs/cgroup{CGROUP}")):
            if parent.is_dir():
                parent.rmdir()
