"""What an earlier daemon left and this one cannot undo: callers see it, so that they can remove it later."""

from __future__ import annotations

import asyncio
import errno
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import AsyncMock, Mock

import pytest

from criserver.boot import boot_id
from criserver.errors import CriError, ResourceExhaustedError
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import filesystems, process_records, recovery, sandbox_files, sandbox_run, strays
from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.record_store import RecordStore
from criserver.telemetry import families
from tests.support.descriptors import room_for
from tests.support.records import container, sandbox
from tests.support.samples import FakeStore, brought_to


class FakeNode(SimpleNamespace):
    """What recovery takes of a node, with a ready pod "p"; nothing is on its disk."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            config=Mock(state=str(directory), root=str(directory)),
            records=(records := RecordStore(FakeStore())),
            snapshotter=Mock(removable=list),
            lock=lambda key: asyncio.Lock(),
            background=lambda work, what: asyncio.ensure_future(work),
            runtime_roots=lambda: str(directory / "runtimes"),
            recovering={},
            begin=asyncio.ensure_future,
        )
        brought_to(records, sandbox("p", SandboxState.NOT_READY))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, ...]]:
    """What is counted of records, by kind and outcome."""
    found = Counter[tuple[str, ...]]()
    monkeypatch.setattr(families.RECOVERY, "add", lambda amount, *labels: found.update({labels: amount}))
    return found


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNode:
    monkeypatch.setattr(strays, "end_orphans", AsyncMock())  # it would end those of other tests' daemons
    return FakeNode(tmp_path)


async def test_a_container_that_cannot_be_rolled_back_is_seen(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch, counted: Counter[tuple[str, ...]]
) -> None:
    brought_to(node.records, container("c", node.records.sandboxes["p"]))
    monkeypatch.setattr(filesystems, "discard", AsyncMock(side_effect=CriError("something is mounted there")))
    monkeypatch.setattr(filesystems, "unmount", AsyncMock())
    await recovery.recover(node)
    (seen,) = node.records.visible_containers()
    assert (seen.state, seen.reason) == (ContainerState.EXITED, "CreateError")
    assert seen.message == "the daemon ended while it was being made"
    assert counted == {("sandbox", "found"): 1, ("container", "found"): 1, ("container", "failed"): 1}


@pytest.mark.parametrize("trouble", ["plugins that do not end", "an infra process that does not", "its network"])
async def test_a_pod_that_cannot_be_rolled_back_is_seen(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch, counted: Counter[tuple[str, ...]], trouble: str
) -> None:
    brought_to(node.records, sandbox("q"))
    steps = {
        "plugins that do not end": AsyncMock(),
        "an infra process that does not": AsyncMock(),
        "its network": AsyncMock(),
    }
    steps[trouble].side_effect = CriError("busy")
    waiting, ending, releasing = steps.values()
    monkeypatch.setattr(strays, "wait", waiting)
    monkeypatch.setattr(process_records, "of_infra", lambda node, sandbox: Mock(end_start=ending))
    monkeypatch.setattr(sandbox_run, "release", releasing)
    await recovery.recover(node)
    assert {s.id: s.state for s in node.records.visible_sandboxes()}["q"] is SandboxState.NOT_READY
    assert os.listdir(node.config.root) == []
    assert counted == {("sandbox", "found"): 2, ("container", "found"): 0, ("sandbox", "failed"): 1}


async def test_what_is_rolled_back_is_counted(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch, counted: Counter[tuple[str, ...]]
) -> None:
    brought_to(node.records, sandbox("q"))
    monkeypatch.setattr(strays, "wait", AsyncMock())
    monkeypatch.setattr(process_records, "of_infra", lambda node, sandbox: Mock(end_start=AsyncMock()))
    monkeypatch.setattr(sandbox_run, "release", AsyncMock())
    node.plugins = Mock(sandbox_removed=AsyncMock())
    await recovery.recover(node)
    assert counted == {("sandbox", "found"): 2, ("container", "found"): 0, ("sandbox", "rolled_back"): 1}


@pytest.mark.parametrize("what", ["container", "pod"])
@pytest.mark.parametrize(
    "lacking", [OSError(errno.EMFILE, os.strerror(errno.EMFILE)), ResourceExhaustedError("the database is full")]
)
async def test_what_runs_is_recovered_later_if_the_node_lacks_something_now(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch, counted: Counter[tuple[str, ...]], what: str, lacking: Exception
) -> None:
    """Otherwise nobody would notice its end."""
    later: list[tuple[str, Callable[[], Awaitable[None]]]] = []
    node.try_again = lambda key, work, words: later.append((key, work))
    lack = [lacking]
    process = Mock(shim=Mock(connected=False, reconnect=AsyncMock(return_value=True)))

    def found(*_: object) -> Mock:
        if lack:
            raise lack.pop()
        return process

    if what == "container":
        brought_to(node.records, container("x", node.records.sandboxes["p"], ContainerState.RUNNING))
        checkpoint = AsyncMock()
        monkeypatch.setattr(recovery, "recover_checkpoint", checkpoint)
        monkeypatch.setattr(process_records, "of_container", found)
    else:
        brought_to(node.records, sandbox("x", SandboxState.READY))
        monkeypatch.setattr(recovery, "unpinned", lambda *_: [])
        monkeypatch.setattr(process_records, "of_infra", found)
        monkeypatch.setattr(sandbox_files, "adopt", Mock())
        node.sandbox_files_dir = node.sandbox_dir = str
    await recovery.recover(node)
    assert counted["container" if what == "container" else "sandbox", "failed"] == 1
    assert not process.shim.reconnect.called
    ((key, work),) = later
    assert key == "x"
    await work()
    assert process.shim.reconnect.called
    assert len(later) == 1
    if what == "container":
        checkpoint.assert_awaited_once()  # another checkpoint may be under way when it is recovered again


@pytest.mark.parametrize(("boot", "state"), [("another", SandboxState.NOT_READY), ("", SandboxState.READY)])
async def test_a_pod_without_namespaces_of_its_own_ends_with_the_boot(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch, boot: str, state: SandboxState
) -> None:
    """Otherwise its init containers would not run again. The boot of an older release's pod is not known."""
    options = cri.NamespaceOption(network=cri.NODE, ipc=cri.NODE, pid=cri.CONTAINER)
    sent = cri.PodSandboxConfig(metadata=cri.PodSandboxMetadata(name="x", namespace="n", uid="u"))
    sent.linux.security_context.namespace_options.CopyFrom(options)
    brought_to(node.records, sandbox("x", SandboxState.READY, sent, boot_id=boot))
    node.namespaces_dir = node.sandbox_files_dir = node.sandbox_dir = str
    monkeypatch.setattr(sandbox_files, "adopt", Mock())
    await recovery.recover(node)
    assert node.records.sandboxes["x"].state is state
    assert node.records.sandboxes["x"].boot_id == (boot or boot_id())  # so that the next boot ends it


def test_a_process_that_cannot_be_looked_up_counts_as_alive(tmp_path: Path) -> None:
    assert not recovery._has_process(str(tmp_path), "one")
    for content in ("", "-1", str(os.getpid())):
        (tmp_path / "init.pid").write_text(content)
        assert not recovery._has_process(str(tmp_path), "one")
    with room_for(0):
        assert recovery._has_process(str(tmp_path), "one")
