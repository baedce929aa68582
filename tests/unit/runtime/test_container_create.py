"""A container or pod that cannot be made is undone. If it cannot be undone, callers see it and can remove it."""

from __future__ import annotations

import asyncio
import dataclasses
from types import SimpleNamespace
from unittest.mock import AsyncMock, Mock

import pytest

from criserver.errors import CriError, ResourceExhaustedError
from criserver.images import Image
from criserver.images.manifests import ImageConfig
from criserver.oci.cdi import ContainerEdits
from criserver.oci.spec_inputs import Spec
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import apparmor, container_create, filesystems, sandbox_run
from criserver.runtime.lifecycle import ContainerState, EventType, SandboxState, events_of
from criserver.runtime.node_plugins import NodePlugins
from criserver.runtime.record_store import RecordStore
from criserver.store import Change
from tests.support.records import container, sandbox
from tests.support.samples import FakeStore, brought_to


class FakeNode(SimpleNamespace):
    """What making takes of a node, with a ready pod "p", and the events that it would tell."""

    def __init__(self) -> None:
        self.events: list[EventType] = []
        super().__init__(
            store=(store := FakeStore()),
            records=(records := RecordStore(store)),
            images=Mock(checked=AsyncMock()),
            plugins=NodePlugins(),
            handler=Mock(),
            lock=lambda key: asyncio.Lock(),
            background=lambda work, what: None,
        )
        brought_to(records, sandbox("p", SandboxState.READY))
        records.watch(lambda old, new: self.events.extend(events_of(old and old.state, new and new.state)))


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.mark.parametrize("undone", [True, False])
async def test_a_container_that_is_made_but_cannot_be_written_down(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch, undone: bool
) -> None:
    pod = node.records.sandboxes["p"]
    monkeypatch.setattr(container_create, "node_defaults", AsyncMock(hooks=AsyncMock(return_value=ContainerEdits())))
    node.images.get.return_value = Mock(id="i", repo_tags=(), repo_digests=(), config=ImageConfig(entrypoint=("e",)))
    write_now = node.store.write_now

    def only_delete(*changes: Change) -> None:
        if any(change.value is not None for change in changes):
            raise ResourceExhaustedError("the disk is full")
        write_now(*changes)

    async def prepare(*arguments: object) -> tuple[None, Spec]:
        monkeypatch.setattr(node.store, "write_now", only_delete)
        return None, {}

    monkeypatch.setattr(container_create, "_check_features", Mock())
    monkeypatch.setattr(container_create, "_prepare", prepare)
    monkeypatch.setattr(apparmor, "choose", AsyncMock())
    monkeypatch.setattr(filesystems, "discard", AsyncMock(side_effect=None if undone else CriError("busy")))
    asked = container("c", pod)
    with pytest.raises(ResourceExhaustedError, match="the disk is full"):
        await container_create._create(node, "p", asked.config, asked.sent)
    monkeypatch.setattr(node.store, "write_now", write_now)
    if undone:
        assert (node.records.containers, node.events) == ({}, [])
        await node.records.add(asked)  # its name is free
    else:
        (found,) = node.records.visible_containers()
        assert (found.state, found.exit_code, found.reason) == (ContainerState.EXITED, 128, "CreateError")
        assert found.message == "it cannot be made: the disk is full"
        assert node.events == [EventType.CREATED, EventType.STOPPED]


async def test_the_requests_for_all_containers_of_a_pod_have_a_limit(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container_create, "node_defaults", AsyncMock(hooks=AsyncMock(return_value=ContainerEdits())))
    monkeypatch.setattr(container_create, "_check_features", Mock())
    monkeypatch.setattr(container_create, "_prepare", AsyncMock(return_value=(None, {})))
    monkeypatch.setattr(apparmor, "choose", AsyncMock())
    node.images.get.return_value = Mock(id="i", repo_tags=(), repo_digests=(), config=ImageConfig())
    brought_to(node.records, sandbox("q", SandboxState.READY))
    large = cri.KeyValue(key="K", value=b"v" * (4 << 20))

    async def create(name: str, owner: str = "p", *envs: cri.KeyValue) -> None:
        pod = node.records.sandboxes[owner]
        metadata = cri.ContainerMetadata(name=name)
        sent = cri.ContainerConfig(metadata=metadata, image=cri.ImageSpec(image="i"), command=["true"], envs=envs)
        asked = container(name, pod, sent=sent)
        await container_create._create(node, owner, asked.config, asked.sent)

    exited = cri.ContainerConfig(metadata=cri.ContainerMetadata(name="exited"), envs=[large])
    brought_to(node.records, container("exited", node.records.sandboxes["p"], ContainerState.EXITED, exited))
    for name in ("a", "b"):
        await create(name, "p", large)
    before = len(node.records.containers)
    with pytest.raises(ResourceExhaustedError, match=r"^container c: .* pod n/p have 1677\d{4} bytes; 16777216 are"):
        await create("c", "p", large)
    assert len(node.records.containers) == before
    brought_to(node.records, container("exited2", node.records.sandboxes["p"], ContainerState.EXITED, exited))
    await create("c")  # of each name the last one counts: a container that is made again has room
    await create("c", "q", large)
    for gone in [c for c in node.records.containers_of("p") if c.config.name == "exited"]:
        await node.records.forget(await node.records.save(dataclasses.replace(gone, state=ContainerState.REMOVING)))
    await create("d", "p", large)


@pytest.mark.parametrize("trouble", ["what it has", "its record"])
async def test_a_container_that_cannot_be_undone_is_seen(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    brought_to(node.records, found := container("c", node.records.sandboxes["p"]))
    discard = AsyncMock(side_effect=CriError("busy") if trouble == "what it has" else None)
    monkeypatch.setattr(filesystems, "discard", discard)
    node.store.full = True
    await container_create.undo(node, found, "why")
    (seen,) = node.records.visible_containers()
    assert (seen.state, seen.reason, seen.message) == (
        ContainerState.EXITED,
        "CreateError",
        "why",
    )


@pytest.mark.parametrize("trouble", ["what it has", "its record"])
async def test_a_pod_that_cannot_be_undone_is_seen(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    brought_to(node.records, found := sandbox("q"))
    release = AsyncMock(side_effect=CriError("busy") if trouble == "what it has" else None)
    monkeypatch.setattr(sandbox_run, "release", release)
    node.store.full = True
    await sandbox_run.undo(node, found)
    assert [(s.id, s.state) for s in node.records.visible_sandboxes()] == [
        ("p", SandboxState.READY),
        ("q", SandboxState.NOT_READY),
    ]
    assert node.events == [EventType.CREATED, EventType.STOPPED]


A, B = (f"sha256:{letter * 64}" for letter in "ab")


@pytest.mark.parametrize(
    ("named", "given", "shown"),
    [
        (f"z.example/app:1@{B}", "ID", f"z.example/app@{B}"),
        ("z.example/app:1", "ID", f"z.example/app@{A}"),
        ("other.example/app:1", "ID", f"a.example/app@{A}"),
        ("busybox", "ID", f"docker.io/library/busybox@{A}"),
        ("", "z.example/app", f"z.example/app@{A}"),
        ("", "ID", f"a.example/app@{A}"),
        ("No Name", "ID", f"a.example/app@{A}"),
    ],
)
def test_the_digest_of_an_image_is_shown_under_the_name_that_the_pod_has_for_it(
    named: str, given: str, shown: str
) -> None:
    repositories = (f"a.example/app@{A}", f"docker.io/library/busybox@{A}", f"z.example/app@{A}", f"z.example/app@{B}")
    image = Image("sha256:" + "1" * 64, (), repositories, 1, ImageConfig(), A, A, False)
    asked = cri.ImageSpec(image=image.id if given == "ID" else given, user_specified_image=named)
    assert container_create._image_ref(image, cri.ContainerConfig(image=asked).SerializeToString()) == shown
    nameless = Image(image.id, (), (), 1, ImageConfig(), A, A, False)
    assert container_create._image_ref(nameless, cri.ContainerConfig(image=asked).SerializeToString()) == image.id
