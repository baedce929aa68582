"""The cgroup of a pod that has a process of its own is left alone: it is the cgroup of that process."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cadvisor_cgroup, cgroups
from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.record_store import RecordStore
from tests.support.records import container, sandbox
from tests.support.samples import FakeStore, brought_to

SENT = cri.PodSandboxConfig(
    metadata=cri.PodSandboxMetadata(name="p", namespace="n", uid="u"),
    linux=cri.LinuxPodSandboxConfig(
        security_context=cri.LinuxSandboxSecurityContext(namespace_options=cri.NamespaceOption(pid=cri.CONTAINER))
    ),
)


@pytest.mark.parametrize("with_process", [True, False])
async def test_the_end_of_a_container(monkeypatch: pytest.MonkeyPatch, with_process: bool) -> None:
    removed = Mock()
    monkeypatch.setattr(cgroups, "exists", lambda _: True)
    monkeypatch.setattr(cgroups, "remove", removed)
    monkeypatch.setattr(cgroups, "make_empty", Mock())
    records = RecordStore(FakeStore())
    pod = sandbox("p", SandboxState.READY, SENT, sandbox_container=with_process)
    brought_to(records, pod)
    running = container("c", pod, ContainerState.RUNNING, pid=1)
    brought_to(records, running)
    infra = Mock()
    infra.started.pid = 7
    background = Mock()
    node: Any = Mock(records=records, processes={"p": infra} if with_process else {}, background=background)
    node.lock = lambda _: Turn()
    assert cadvisor_cgroup.process_of(node, pod) == (7 if with_process else 1)
    cadvisor_cgroup.watch(node)
    await records.observe(running.ended(0, ""))
    await background.call_args.args[0]
    assert removed.called is not with_process


class Turn:
    """A lock that is free."""

    async def __aenter__(self) -> None: ...
    async def __aexit__(self, *_: object) -> None: ...
