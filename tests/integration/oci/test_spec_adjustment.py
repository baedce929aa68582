"""What plugins of the node ask for, in a real container; and what the real OCI runtime reports that it cannot give."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from criserver.errors import FailedPreconditionError
from criserver.oci.adjustment_faults import RuntimeFacts, runtime_facts
from criserver.oci.adjustment_value import SpecAdjustment
from criserver.oci.spec_adjustment import adjust
from criserver.runtime import host
from tests.support.bundles import Bundles

pytestmark = pytest.mark.skipif(not shutil.which("runc") or not shutil.which("busybox"), reason="needs runc, busybox")


@pytest.fixture(scope="module")
def bundles(nothing_left: None) -> Iterator[Bundles]:
    bundles = Bundles()
    try:
        yield bundles
    finally:
        bundles.close()


@pytest.fixture(scope="module")
def runtime() -> RuntimeFacts:
    """The facts of the node's own runc."""
    done = subprocess.run(["runc", "features"], check=True, capture_output=True)
    return runtime_facts(json.loads(done.stdout))


SCRIPT = (
    "echo $WHO; cat /mnt/file; stat -c %t:%T /dev/blank; (exec 3<>/dev/blank) && echo open; ulimit -c; "
    "cat /proc/sys/kernel/shm_rmid_forced /proc/self/oom_score_adj; ls /dev/gone; id -u"
)


def test_a_container_has_what_plugins_ask_for(bundles: Bundles, runtime: RuntimeFacts, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of a plugin\n")
    spec = bundles.spec(["false"])
    spec["process"]["env"].append("WHO=kubelet")
    spec["linux"]["devices"] = [{"path": "/dev/gone", "type": "c", "major": 1, "minor": 5}]
    asked = SpecAdjustment(
        env={"WHO": "plugin"},
        args=("sh", "-c", SCRIPT),
        hooks=(
            (
                "createRuntime",
                {"path": "/bin/sh", "args": ["sh", "-c", f"echo $OF > {tmp_path}/hook"], "env": ["OF=1"]},
            ),
        ),
        mounts={
            "/mnt": {
                "destination": "/mnt",
                "type": "bind",
                "source": str(tmp_path),
                "options": ["rbind", "ro", "rslave"],
            }
        },
        devices={"/dev/blank": {"path": "/dev/blank", "type": "c", "major": 1, "minor": 3}, "/dev/gone": None},
        rlimits=({"type": "RLIMIT_CORE", "soft": 512, "hard": 1024},),
        sysctls={"kernel.shm_rmid_forced": "1"},
        oom_score_adj=777,
        resources={"pids": {"limit": 50}, "cpu": {"shares": 200}},
    )
    found = bundles.run(adjust(spec, asked, host.facts(), runtime))
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == ["plugin", "of a plugin", "1:3", "open", "1", "1", "777", "0"]
    assert "/dev/gone: No such file" in found.stderr
    assert (tmp_path / "hook").read_text() == "1\n"


@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="the host has no /dev/fuse to give")
def test_a_removed_device_cannot_be_made_again(bundles: Bundles, runtime: RuntimeFacts) -> None:
    """The rule of the device cgroup goes with the device, not only its node."""
    spec = bundles.spec(["sh", "-c", "mknod /tmp/x c 10 229 && (exec 3<>/tmp/x) && echo open"], ["CAP_MKNOD"])
    spec["linux"]["devices"] = [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]
    spec["linux"]["resources"]["devices"].append(
        {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rwm"}
    )
    assert bundles.run(spec).stdout == "open\n"
    found = bundles.run(adjust(spec, SpecAdjustment(devices={"/dev/fuse": None}), host.facts(), runtime))
    assert (found.returncode, found.stdout) == (1, "")
    assert "Operation not permitted" in found.stderr


def test_a_removed_namespace_is_the_nodes(bundles: Bundles, runtime: RuntimeFacts) -> None:
    spec = bundles.spec(["readlink", "/proc/self/ns/uts"])
    nodes_own = str(Path("/proc/self/ns/uts").readlink())
    assert bundles.run(spec).stdout.strip() != nodes_own
    found = bundles.run(adjust(spec, SpecAdjustment(namespaces={"uts": None}), host.facts(), runtime))
    assert found.stdout.strip() == nodes_own


def test_a_scheduler_is_given_or_refused_never_left_out(bundles: Bundles, runtime: RuntimeFacts) -> None:
    spec = bundles.spec(["cut", "-d", " ", "-f", "41", "/proc/self/stat"])  # the policy (proc(5))
    asked = SpecAdjustment(
        container_id="c1", scheduler={"policy": "SCHED_BATCH"}, owners={("LinuxSched", ""): "batcher"}
    )
    try:
        adjusted = adjust(spec, asked, host.facts(), runtime)
    except FailedPreconditionError as e:
        assert "NRI plugin batcher adjusts LinuxSched of container c1" in str(e)
        assert not runtime.process_priorities
    else:
        assert bundles.run(adjusted).stdout == f"{os.SCHED_BATCH}\n"
