"""New limits of a container: which are merged, and which are refused before anything is changed."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pytest

from criserver.errors import FailedPreconditionError
from criserver.oci.spec_inputs import HostFacts
from criserver.oci.spec_resources import resource_limits
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups, container_update, host
from criserver.stats import CgroupUsage, Memory, Swap
from tests.support.records import container, sandbox


def usage(rss: int | None, swap: Swap | None, shmem: int | None = None) -> CgroupUsage:
    memory = Memory(100, limit=None, working_set=90, rss=rss, page_faults=None, major_page_faults=None, shmem=shmem)
    return CgroupUsage(0, None, memory, swap, None, None, None)


@pytest.mark.parametrize(
    ("limit", "rss", "swap", "refused"),
    [
        (39, 40, Swap(0, 0), True),
        (39, 40, None, True),
        (40, 40, None, False),
        # The kernel can take back the page cache.
        (50, 40, None, False),
        # The kernel can swap.
        (39, 40, Swap(0, None), False),
        (39, 40, Swap(0, 10), False),
        # No limit, and none that is changed.
        (-1, 40, None, False),
        (0, 40, None, False),
        (39, None, None, False),
    ],
)
def test_a_limit_by_which_version_2_would_kill(limit: int, rss: int | None, swap: Swap | None, refused: bool) -> None:
    with (
        pytest.raises(FailedPreconditionError, match="below its present use of 40 bytes")
        if refused
        else (contextlib.nullcontext())
    ):
        container_update._check_memory("c", limit, usage(rss, swap))


def test_shared_memory_cannot_be_taken_back_either() -> None:
    """As the buffers of a database, or a volume in memory."""
    container_update._check_memory("c", 40, usage(10, Swap(0, 0), shmem=30))
    with pytest.raises(FailedPreconditionError, match="below its present use of 40 bytes"):
        container_update._check_memory("c", 39, usage(10, Swap(0, 0), shmem=30))


def test_new_limits_are_merged() -> None:
    before = cri.LinuxContainerResources(cpu_shares=7, memory_limit_in_bytes=64, memory_swap_limit_in_bytes=80)
    before.hugepage_limits.add(page_size="2MB", limit=1)
    before.unified["pids.max"] = "7"
    asked = cri.LinuxContainerResources(memory_limit_in_bytes=72, unified={"memory.high": "5"})
    asked.hugepage_limits.add(page_size="1GB", limit=2)
    container_update._merge(before, asked)
    expected = cri.LinuxContainerResources(cpu_shares=7, memory_limit_in_bytes=72)
    expected.hugepage_limits.add(page_size="1GB", limit=2)
    expected.unified.update({"pids.max": "7", "memory.high": "5"})
    assert before == expected
    container_update._merge(before, cri.LinuxContainerResources(memory_swap_limit_in_bytes=90))
    assert (before.memory_limit_in_bytes, before.memory_swap_limit_in_bytes) == (72, 90)


@pytest.mark.parametrize(
    ("asked", "swap"),
    [
        (cri.LinuxContainerResources(memory_limit_in_bytes=72), "5"),
        (cri.LinuxContainerResources(memory_limit_in_bytes=72, unified={"memory.swap.max": "6"}), "6"),
        (cri.LinuxContainerResources(memory_limit_in_bytes=72, memory_swap_limit_in_bytes=80), "8"),
        (cri.LinuxContainerResources(cpu_shares=9), None),
    ],
)
def test_the_kernel_gets_the_swap_limit_of_the_record(
    monkeypatch: pytest.MonkeyPatch, asked: cri.LinuxContainerResources, swap: str | None
) -> None:
    """Kubelets with limited swap set it by ``unified``. crictl and others send a memory limit without it."""
    monkeypatch.setattr(host, "facts", lambda: HostFacts((), unified_cgroups=True, swap_accounting=True))
    pod = sandbox("p")
    sent = cri.ContainerConfig(metadata=cri.ContainerMetadata(name="c"), image=cri.ImageSpec(image="i"))
    sent.linux.resources.memory_limit_in_bytes = 64
    sent.linux.resources.unified["memory.swap.max"] = "5"
    before, node = container("c", pod, sent=sent), Mock()
    node.records.sandbox.return_value = pod
    limits = container_update._limits(node, before, asked)
    assert limits.get("unified", {}).get("memory.swap.max") == swap
    after = container_update.with_resources(before, pod.config, asked)
    in_force = resource_limits(after.config.resources, host.facts())
    assert in_force["unified"]["memory.swap.max"] == (swap or "5")


def test_a_process_that_ends_meanwhile_has_no_oom_score_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["true"]) as ended, subprocess.Popen(["sleep", "1000"]) as lives:
        try:
            ended.wait()
            monkeypatch.setattr(cgroups, "processes", lambda _: [ended.pid, lives.pid])
            monkeypatch.setattr(cgroups, "path", lambda *_: "")
            container_update._set_oom_score(Mock(), Mock(), 500)
            assert Path(f"/proc/{lives.pid}/oom_score_adj").read_text() == "500\n"
        finally:
            lives.kill()
