"""Images from a real registry and from archives, into a real content store and snapshotter."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from criserver.api.image_service import ImageService
from criserver.errors import (
    CriError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from criserver.images import ContentStore, Platform, manifests
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.stats import DiskUsage
from criserver.store import Change
from snapshotter import LayerLimits
from tests.support.imagebuilder import (
    BuiltImage,
    Dir,
    File,
    Layer,
    Link,
    add_blob,
    build_image,
    build_index,
    busybox_image,
    digest,
    tar_of,
    write_archive,
    write_docker_archive,
    write_layout,
    write_tar,
)
from tests.support.registry import Registry, registry
from tests.support.rooms import Rooms

__all__ = ["registry"]


@pytest.fixture
async def rooms(tmp_path: Path) -> AsyncIterator[Rooms]:
    found = Rooms(str(tmp_path))
    yield found
    found.close()


def two_layers(text: bytes = b"one", **more: Any) -> BuiltImage:
    base: Layer = {"etc": Dir(), "etc/os": b"base", "etc/big": os.urandom(300_000)}
    return build_image([base, {"etc/text": File(text, 0o600)}], {"Cmd": ["sh"], "User": "1000:5"}, **more)


async def test_pull_by_tag(rooms: Rooms, registry: Registry) -> None:
    built = two_layers()
    name = registry.push(built, "tag:1")
    image = await rooms.images.pull(name)
    assert image.id == built.id
    assert image.manifest == built.digest
    assert image.repo_tags == (name,)
    assert image.repo_digests == (f"{registry.address}/tag@{built.digest}",)
    assert image.size == sum(len(blob) for d, blob in built.blobs.items() if d != built.digest)
    assert (image.config.cmd, image.user.user, image.pinned) == (("sh",), 1000, False)
    assert rooms.read(image, "etc/text") == b"one"
    assert rooms.read(image, "etc/os") == b"base"
    assert rooms.content.digests() == set(built.blobs)
    assert os.listdir(f"{rooms.root}/content/ingest") == []
    assert rooms.images.list() == [image]


async def test_what_a_registry_does_not_have_is_told_in_its_own_words(rooms: Rooms, registry: Registry) -> None:
    name = registry.push(two_layers(b"x"), "known:1").replace("known:1", "known:2")
    with pytest.raises(NotFoundError, match=r"manifests/2: 404 Not Found \(MANIFEST_UNKNOWN: manifest unknown\)"):
        await rooms.images.pull(name)


async def test_a_blob_that_is_larger_than_any_layer_may_be_is_not_fetched(
    rooms: Rooms, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms.snapshotter, "limits", LayerLimits(max_bytes=200_000))
    with pytest.raises(ResourceExhaustedError, match=r"blob sha256:\w+ has \d+ bytes, more than 200000 \(max_bytes\)"):
        await rooms.images.pull(registry.push(two_layers(), "large:1"))
    assert rooms.leftovers() == []


async def test_pull_by_digest_and_by_both(rooms: Rooms, registry: Registry) -> None:
    built = two_layers()
    registry.push(built, "digest:1")
    name = f"{registry.address}/digest@{built.digest}"
    image = await rooms.images.pull(name)
    assert (image.repo_tags, image.repo_digests) == ((), (name,))
    assert await rooms.images.pull(f"{registry.address}/digest:other@{built.digest}") == image
    assert rooms.images.get(name) == image


async def test_pull_of_docker_schema_2(rooms: Rooms, registry: Registry) -> None:
    built = two_layers(docker=True)
    image = await rooms.images.pull(registry.push(built, "docker:2"))
    assert (image.id, image.manifest) == (built.id, built.digest)
    assert rooms.read(image, "etc/text") == b"one"


@pytest.mark.parametrize(("compression", "docker"), [("zstd", False), ("none", False), ("none", True)])
async def test_pull_of_layers_that_are_no_gzip(
    rooms: Rooms, registry: Registry, compression: str, docker: bool
) -> None:
    built = two_layers(docker=docker, compression=compression)
    image = await rooms.images.pull(registry.push(built, f"{compression}:{docker}".lower()))
    assert image.id == built.id
    assert rooms.read(image, "etc/text") == b"one"
    assert rooms.read(image, "etc/os") == b"base"


async def test_pull_from_an_index_takes_the_best_variant_that_runs_here(registry: Registry, tmp_path: Path) -> None:
    variants = [Platform("linux", "arm", variant) for variant in ("v6", "v7", "v8")]
    built = {p.variant: two_layers(p.variant.encode(), platform=p) for p in variants}
    name = registry.push(build_index(built.values()), "variants:1")
    for variant in built:
        rooms = Rooms(str(tmp_path / variant), Platform("linux", "arm", variant))
        image = await rooms.images.pull(name)
        assert image.id == built[variant].id
        assert rooms.read(image, "etc/text") == variant.encode()
        rooms.close()
    rooms = Rooms(str(tmp_path / "v5"), Platform("linux", "arm", "v5"))
    with pytest.raises(NotFoundError, match="no image for linux/arm/v5; it has linux/arm/v6, linux/arm/v7"):
        await rooms.images.pull(name)
    rooms.close()


@pytest.mark.parametrize("docker", [False, True])
async def test_pull_from_an_index_takes_this_platform(rooms: Rooms, registry: Registry, docker: bool) -> None:
    own = two_layers(docker=docker)
    other = two_layers(b"other", docker=docker, platform=Platform("linux", "s390x"))
    index = build_index([other, own], docker=docker)
    image = await rooms.images.pull(registry.push(index, f"index-{docker}:1".lower()))
    assert (image.id, image.manifest) == (own.id, own.digest)
    assert image.repo_digests[0].endswith(f"@{index.digest}")
    assert rooms.content.digests() == set(own.blobs)


async def test_an_image_for_another_platform_is_refused(rooms: Rooms, registry: Registry) -> None:
    other = two_layers(platform=Platform("linux", "s390x"))
    for built in (other, build_index([other])):
        with pytest.raises(NotFoundError, match="linux/s390x"):
            await rooms.images.pull(registry.push(built, "foreign:1"))
        assert rooms.leftovers() == []


@pytest.mark.parametrize("by", ["tag", "digest"])
async def test_an_image_that_is_as_it_was_costs_a_head_request(rooms: Rooms, registry: Registry, by: str) -> None:
    built = two_layers(os.urandom(9), platform=rooms.platform)
    index = build_index([built])
    name = registry.push(index, f"same:{by}")
    name = name if by == "tag" else f"{registry.address}/same@{index.digest}"
    image = await rooms.images.pull(name)
    before = registry.requests()
    assert await rooms.images.pull(name) == image
    (line,) = registry.requests()[len(before) :]
    assert line.startswith("HEAD /v2/same/manifests/")


async def test_layers_that_are_here_are_not_fetched_again(rooms: Rooms, registry: Registry) -> None:
    base = {"base": os.urandom(5000)}
    first, second = build_image([base, {"a": b"1"}]), build_image([base, {"a": b"2"}])
    await rooms.images.pull(registry.push(first, "shared:1"))
    name = registry.push(second, "shared:2")
    before = registry.blob_requests()
    image = await rooms.images.pull(name)
    fetched = registry.blob_requests()[len(before) :]
    assert sorted(fetched) == sorted(set(second.blobs) - set(first.blobs) - {second.digest})
    assert rooms.read(image, "a") == b"2"
    assert len(rooms.snapshotter.layers()) == 3


async def test_concurrent_pulls_fetch_once(rooms: Rooms, registry: Registry) -> None:
    built = two_layers(os.urandom(1000))
    names = [registry.push(built, f"together:{tag}") for tag in ("1", "2")]
    before = registry.blob_requests()
    found = await asyncio.gather(*(rooms.images.pull(name) for name in [*names, *names]))
    fetched = registry.blob_requests()[len(before) :]
    assert sorted(fetched) == sorted(set(built.blobs) - {built.digest})
    assert {image.id for image in found} == {built.id}
    assert rooms.images.list()[0].repo_tags == tuple(names)


async def test_a_cancelled_pull_leaves_nothing_and_one_that_is_shared_goes_on(rooms: Rooms, registry: Registry) -> None:
    name = registry.push(two_layers(os.urandom(3_000_000)), "cancelled:1")
    one, two = (asyncio.create_task(rooms.images.pull(name)) for _ in range(2))
    await asyncio.sleep(0.01)
    one.cancel()
    assert (await two).repo_tags == (name,)
    with pytest.raises(asyncio.CancelledError):
        await one
    await rooms.images.remove(name)
    for delay in (0, 0.01, 0.03, 0.05):
        task = asyncio.create_task(rooms.images.pull(name))
        await asyncio.sleep(delay)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            assert rooms.images.list() == []
        else:
            await rooms.images.remove(name)  # it was done already
        assert rooms.leftovers() == []


async def test_a_moved_tag_leaves_the_old_image_without_it(rooms: Rooms, registry: Registry) -> None:
    old, new = two_layers(b"old"), two_layers(b"new")
    name = registry.push(old, "moved:1")
    await rooms.images.pull(name)
    registry.push(new, "moved:1")
    await rooms.images.pull(name)
    assert rooms.images.get(name).id == new.id
    assert rooms.images.get(old.id).repo_tags == ()
    assert rooms.images.get(old.id).repo_digests == (f"{registry.address}/moved@{old.digest}",)
    assert {image.id for image in rooms.images.list()} == {old.id, new.id}


async def test_the_same_image_with_another_manifest(rooms: Rooms, registry: Registry) -> None:
    built = two_layers()
    as_docker = replace_manifest_type(built)
    await rooms.images.pull(registry.push(built, "twice:1"))
    image = await rooms.images.pull(registry.push(as_docker, "twice:2"))
    assert image.id == built.id
    assert image.manifest == as_docker.digest
    assert len(image.repo_tags) == len(image.repo_digests) == 2
    assert rooms.content.digests() == set(as_docker.blobs)


async def test_getting(rooms: Rooms, registry: Registry) -> None:
    name = registry.push(two_layers(), "got:1")
    image = await rooms.images.pull(name)
    for ref in (name, image.repo_digests[0], image.id, image.id[7:], image.id[7:19], image.id[:19]):
        assert rooms.images.get(ref) == image, ref
        assert rooms.images.list(ref) == [image], ref
    assert rooms.images.list(f"{registry.address}/got") == [image]
    for ref in ("nothing", "sha256:" + "0" * 64, "0" * 64, f"{registry.address}/got:2", "Bad Name", ""):
        assert rooms.images.get(ref) is None, ref
    assert rooms.images.list(f"{registry.address}/go") == []
    assert rooms.images.list("Bad Name") == []


async def test_a_verbose_status_has_the_configuration(rooms: Rooms, tmp_path: Path) -> None:
    built, path = two_layers(), str(tmp_path / "image.tar")
    write_archive(built, path, "verbose:1")
    (image,) = await rooms.images.import_archive(path)
    service = ImageService(rooms.images, "", lambda: DiskUsage(0, 0, 0))

    async def info() -> dict[str, Any]:
        spec = cri.ImageSpec(image=image.id)
        assert not (await service.image_status(cri.ImageStatusRequest(image=spec))).info
        status = await service.image_status(cri.ImageStatusRequest(image=spec, verbose=True))
        found: dict[str, Any] = json.loads(status.info["info"])
        return found

    found = await info()
    assert found.pop("imageSpec") == json.loads(built.blobs[built.id])
    assert found["chainID"] == image.chain_id
    assert found["config"]["cmd"] == ["sh"]
    Path(rooms.content.path(image.id)).write_bytes(b"{}")
    assert await info() == found
    os.unlink(rooms.content.path(image.id))
    assert await info() == found


async def test_an_image_with_very_long_texts_is_refused_and_one_that_is_here_stays(
    rooms: Rooms, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build_image([{"a": b"1"}], {"Env": [f"A{n}=" + "x" * 10_000 for n in range(27)]})
    name = registry.push(built, "texts:1")
    write_archive(built, str(tmp_path / "a.tar"), "texts:2")
    for bring in (lambda: rooms.images.pull(name), lambda: rooms.images.import_archive(str(tmp_path / "a.tar"))):
        with pytest.raises(InvalidArgumentError, match=r"have 270\d\d\d bytes; 262144 are the most allowed"):
            await bring()
        assert rooms.leftovers() == []
    with monkeypatch.context() as earlier:
        earlier.setattr(manifests, "MAX_PROCESS", 1 << 20)
        image = await rooms.images.pull(name)
    rooms.close()
    again = Rooms(rooms.root)
    try:
        assert again.images.wanted(name).config == image.config
        again.images._suspects.layers.add(image.chain_id)
        await again.images.checked(again.images.wanted(name))
        assert (await again.images.pull(name)).id == image.id
    finally:
        again.close()


async def test_an_ambiguous_id(rooms: Rooms, registry: Registry) -> None:
    built = [build_image([{"n": b"%d" % n}]) for n in range(20)]
    for number, image in enumerate(built):
        path = f"{rooms.root}/{number}.tar"
        write_archive(image, path)
        await rooms.images.import_archive(path)
    starts = [image.id[7] for image in built]
    twice = next(start for start in starts if starts.count(start) > 1)
    with pytest.raises(InvalidArgumentError, match="image IDs begin with"):
        rooms.images.get(twice)


@pytest.mark.parametrize("by", ["tag", "digest", "id"])
async def test_remove_takes_every_name_and_all_content(rooms: Rooms, registry: Registry, by: str) -> None:
    built = two_layers()
    names = [registry.push(built, f"removed:{tag}") for tag in "12"]
    for name in names:
        image = await rooms.images.pull(name)
    usage = rooms.images.fs_usage()
    assert usage.bytes > image.size
    assert usage.inodes > len(built.blobs)
    ref = {"tag": names[0], "digest": image.repo_digests[0], "id": image.id}[by]
    await asyncio.gather(rooms.images.remove(ref), rooms.images.remove(ref))
    await rooms.images.remove(ref)
    assert rooms.images.list() == []
    assert rooms.leftovers() == []
    assert (rooms.images.fs_usage().bytes, rooms.images.fs_usage().inodes) == (0, 0)


async def test_remove_leaves_what_others_need(rooms: Rooms, registry: Registry) -> None:
    base = {"base": os.urandom(5000)}
    kept, gone = build_image([base, {"a": b"1"}]), build_image([base, {"a": b"2"}])
    image = await rooms.images.pull(registry.push(kept, "others:1"))
    await rooms.images.pull(registry.push(gone, "others:2"))
    await rooms.images.remove(gone.id)
    assert rooms.content.digests() == set(kept.blobs)
    assert len(rooms.snapshotter.layers()) == 2
    assert rooms.read(image, "base") == base["base"]


async def test_layers_under_a_container_stay_until_it_is_gone(rooms: Rooms, registry: Registry) -> None:
    image = await rooms.images.pull(registry.push(two_layers(), "used:1"))
    await rooms.snapshotter.prepare("container", image.chain_id)
    await rooms.images.remove(image.id)
    assert rooms.content.digests() == set()
    assert len(rooms.snapshotter.layers()) == 2
    await rooms.snapshotter.remove("container")
    await rooms.images.collect()
    assert rooms.leftovers() == []


async def test_images_are_there_after_a_restart(rooms: Rooms, registry: Registry) -> None:
    name = registry.push(two_layers(), "restart:1")
    image = await rooms.images.pull(name)
    usage = rooms.images.fs_usage()
    again = Rooms(rooms.root)
    await again.images.collect()
    assert again.images.list() == [image]
    assert again.images.get(name) == image
    assert again.images.fs_usage() == usage
    again.close()


async def test_a_blob_that_the_disk_cannot_read_costs_its_image_alone(
    rooms: Rooms, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = await rooms.images.pull(registry.push(two_layers(), "bad:1"))
    good = await rooms.images.pull(registry.push(two_layers(b"other"), "good:1"))
    real = ContentStore.open

    def failing(content: ContentStore, digest: str) -> BinaryIO:
        if digest == bad.id:
            raise OSError(errno.EUCLEAN, os.strerror(errno.EUCLEAN))
        return real(content, digest)

    with monkeypatch.context() as patched:
        patched.setattr(ContentStore, "open", failing)
        again = Rooms(rooms.root)
    assert [image.id for image in again.images.list()] == [good.id]
    again.close()


class SlowWrites:
    """Writes of the database that wait for ``gate``. ``begun`` says that one waits."""

    def __init__(self, rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate, self.begun, self._write = asyncio.Event(), asyncio.Event(), rooms.store.write
        monkeypatch.setattr(rooms.store, "write", self._slow)

    async def _slow(self, *changes: Change) -> None:
        self.begun.set()
        await self.gate.wait()
        await self._write(*changes)

    async def cancelled_meanwhile(self, call: Coroutine[Any, Any, object]) -> None:
        """Make a call whose caller goes away during a write."""
        task = asyncio.ensure_future(call)
        await self.begun.wait()
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0.01)
        assert not task.done()
        self.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_removal_whose_caller_goes_away_is_done_to_its_end(
    rooms: Rooms, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = await rooms.images.pull(registry.push(two_layers(), "gone:1"))
    await SlowWrites(rooms, monkeypatch).cancelled_meanwhile(rooms.images.remove(image.id))
    assert rooms.images.list() == []
    assert rooms.leftovers() == []


async def test_an_image_that_is_pinned_while_it_is_removed_is_gone(
    rooms: Rooms, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = await rooms.images.pull(registry.push(two_layers(), "pinned:1"))
    writes = SlowWrites(rooms, monkeypatch)
    removal = asyncio.create_task(rooms.images.remove(image.id))
    await writes.begun.wait()
    pinning = asyncio.create_task(rooms.images.pin(image.id, pinned=True))
    await asyncio.sleep(0.01)
    writes.gate.set()
    await removal
    with pytest.raises(NotFoundError):
        await pinning
    assert rooms.leftovers() == []


@pytest.mark.parametrize("kind", ["pull", "import"])
async def test_an_image_whose_caller_goes_away_while_it_is_recorded_is_whole(
    rooms: Rooms, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    built, path = two_layers(), str(tmp_path / "image.tar")
    name = registry.push(built, "recorded:1")
    write_archive(built, path, name)
    work = rooms.images.pull(name) if kind == "pull" else rooms.images.import_archive(path)
    await SlowWrites(rooms, monkeypatch).cancelled_meanwhile(work)
    (image,) = rooms.images.list()
    assert rooms.content.digests() == set(built.blobs)
    assert rooms.read(image, "etc/text") == b"one"
    assert rooms.read(image, "etc/os") == b"base"


@pytest.mark.parametrize("damage", ["layer", "layer blob", "short blob", "config", "manifest", "record", "garbage"])
async def test_a_restart_repairs_what_a_crash_left(rooms: Rooms, registry: Registry, damage: str) -> None:
    built = two_layers()
    name = registry.push(built, "crash:1")
    image = await rooms.images.pull(name)
    layer = built.manifest["layers"][0]["digest"]
    match damage:
        case "layer":
            shutil.rmtree(rooms.snapshotter.layers()[image.chain_id].path)
        case "layer blob":
            os.unlink(rooms.content.path(layer))
        case "short blob":
            os.truncate(rooms.content.path(layer), 0)
        case "config":
            os.truncate(rooms.content.path(image.id), 5)
        case "manifest":
            os.unlink(rooms.content.path(built.digest))
        case "record":
            rooms.store.write_now(Change("images", image.id, b'{"manifest": 1}'))
        case "garbage":  # as a kill leaves it between the last blob and the record, or within a removal
            rooms.store.write_now(Change("images", image.id, None))
    again = Rooms(rooms.root)
    assert again.images.list() == []
    await again.images.collect()
    assert again.leftovers() == []
    image = await again.images.pull(name)
    assert again.read(image, "etc/text") == b"one"
    again.close()


async def test_a_blob_that_cannot_be_deleted_keeps_no_other(rooms: Rooms, registry: Registry) -> None:
    built = two_layers()
    image = await rooms.images.pull(registry.push(built, "stuck:1"))
    path = rooms.content.path(built.manifest["layers"][0]["digest"])
    os.unlink(path)
    os.makedirs(f"{path}/directory")
    await rooms.images.remove(image.id)
    assert rooms.leftovers() == []
    assert rooms.content.digests() == set()


KILLED = """
import asyncio, sys
from tests.support.rooms import Rooms

async def main():
    rooms = Rooms(sys.argv[1])
    await rooms.images.collect()
    print("ready", flush=True)
    while True:
        for name in sys.argv[2:]:
            await rooms.images.pull(name)
        for name in sys.argv[2:]:
            await rooms.images.remove(name)

asyncio.run(main())
"""


async def test_a_kill_at_any_moment_of_pulls_and_removals(tmp_path: Path, registry: Registry) -> None:
    base = {"base": os.urandom(200_000)}
    images = [build_image([base, {"n": os.urandom(9)}]) for _ in range(2)]
    built = {registry.push(image, f"killed:{number}"): image for number, image in enumerate(images)}
    for round_ in range(8):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", KILLED, str(tmp_path), *built, stdout=asyncio.subprocess.PIPE
        )
        await process.stdout.readline()
        await asyncio.sleep(random.uniform(0, 0.6))
        process.kill()
        await process.wait()
        rooms = Rooms(str(tmp_path))
        await rooms.images.collect()
        blobs: set[str] = set()
        for image in rooms.images.list():
            (name,) = image.repo_tags
            blobs |= set(built[name].blobs)
            assert rooms.read(image, "base") == base["base"]
        assert rooms.content.digests() == blobs, round_
        assert all(digest(rooms.content.open(d).read()) == d for d in blobs)
        for name in built:
            assert rooms.read(await rooms.images.pull(name), "base") == base["base"]
        for name in built:
            await rooms.images.remove(name)
        assert rooms.leftovers() == []
        rooms.close()


async def test_import_of_an_oci_archive(rooms: Rooms, tmp_path: Path) -> None:
    built = busybox_image()
    write_archive(built, str(tmp_path / "a.tar"), "localhost/busybox:latest")
    (image,) = await rooms.images.import_archive(str(tmp_path / "a.tar"), pinned=True)
    assert (image.id, image.manifest, image.pinned) == (built.id, built.digest, True)
    assert image.repo_tags == ("localhost/busybox:latest",)
    assert image.repo_digests == (f"localhost/busybox@{built.digest}",)
    with open("/bin/busybox", "rb") as f:
        assert rooms.read(image, "bin/busybox") == f.read()
    again = Rooms(rooms.root)
    assert again.images.list() == [image]
    again.close()


async def test_import_takes_this_platform_from_an_index(rooms: Rooms, tmp_path: Path) -> None:
    own, other = two_layers(), two_layers(platform=Platform("linux", "s390x"))
    write_archive(build_index([other, own]), str(tmp_path / "a.tar"))
    (image,) = await rooms.images.import_archive(str(tmp_path / "a.tar"))
    assert (image.id, image.repo_tags, image.repo_digests) == (own.id, (), ())


@pytest.mark.parametrize("packed", ["none", "gzip", "zstd"])
async def test_import_of_a_docker_archive(rooms: Rooms, tmp_path: Path, packed: str) -> None:
    built = two_layers()
    write_docker_archive(built, str(tmp_path / "a.tar"), ["app:1", "example.com/app:2"], packed=packed)
    (image,) = await rooms.images.import_archive(str(tmp_path / "a.tar"))
    assert image.id == built.id
    assert (image.repo_tags, image.repo_digests) == (("docker.io/library/app:1", "example.com/app:2"), ())
    assert rooms.read(image, "etc/text") == b"one"
    assert await rooms.images.import_archive(str(tmp_path / "a.tar")) == [image]
    await rooms.images.remove("app:1")
    assert rooms.leftovers() == []


async def test_import_reads_layers_side_by_side(rooms: Rooms, tmp_path: Path) -> None:
    built = build_image([{f"{number}": os.urandom(3_000_000)} for number in range(4)])
    write_archive(built, str(tmp_path / "a.tar"))
    (image,) = await rooms.images.import_archive(str(tmp_path / "a.tar"))
    assert rooms.content.digests() == set(built.blobs)
    assert len(rooms.read(image, "0")) == 3_000_000


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
async def test_import_of_what_skopeo_wrote(rooms: Rooms, tmp_path: Path, kind: str) -> None:
    built = two_layers()
    write_layout(built, str(tmp_path / "layout"))
    target = f"{kind}:{tmp_path}/a.tar:example.com/app:1"
    command = ["skopeo", "--insecure-policy", "copy", "-q", f"oci:{tmp_path}/layout:latest", target]
    await asyncio.to_thread(subprocess.run, command, check=True)
    (image,) = await rooms.images.import_archive(str(tmp_path / "a.tar"))
    assert image.repo_tags == ("example.com/app:1",)
    assert rooms.read(image, "etc/text") == b"one"
    assert rooms.read(image, "etc/os") == b"base"


async def test_import_of_a_layer_that_is_a_link_in_the_archive(rooms: Rooms, tmp_path: Path) -> None:
    layer = tar_of({"a": b"1"})
    built = build_image([{"a": b"1"}, {"b": b"2"}, {"a": b"1"}])
    assert digest(layer) == digest(built.layers[0])
    write_docker_archive(built, str(tmp_path / "plain.tar"))
    members: dict[str, Any] = read_tar(str(tmp_path / "plain.tar"))
    members["2/layer.tar"] = Link("../0/layer.tar")
    write_tar(str(tmp_path / "a.tar"), members)
    (image,) = await rooms.images.import_archive(str(tmp_path / "a.tar"))
    assert image.id == built.id


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        ({}, InvalidArgumentError, "is no"),
        ({"a": b"b"}, InvalidArgumentError, "neither index.json nor manifest.json"),
        ({"index.json": b"{"}, InvalidArgumentError, "index.json is not valid JSON"),
        ({"index.json": b'{"schemaVersion": 2, "manifests": []}'}, InvalidArgumentError, "lists no images"),
        ({"index.json": b" " * (5 << 20)}, InvalidArgumentError, "index.json has 5242880 bytes"),
        ({"manifest.json": b"[]"}, InvalidArgumentError, "not a list of images"),
        ({"manifest.json": b'[{"Config": "c"}]'}, InvalidArgumentError, "lacks Config or Layers"),
        ({"manifest.json": b'[{"Config": "/etc/passwd", "Layers": []}]'}, NotFoundError, "no file /etc/passwd"),
        ({"manifest.json": b'[{"Config": "../../etc/passwd", "Layers": []}]'}, NotFoundError, "no file ../"),
    ],
)
async def test_archives_that_are_refused(
    rooms: Rooms, tmp_path: Path, members: dict[str, bytes], error: type[CriError], message: str
) -> None:
    write_tar(str(tmp_path / "a.tar"), members)
    with pytest.raises(error) as caught:
        await rooms.images.import_archive(str(tmp_path / "a.tar"))
    assert str(caught.value).startswith(f"archive {tmp_path}/a.tar")
    assert message in str(caught.value)
    assert rooms.leftovers() == []


@pytest.mark.parametrize("damage", ["cut", "gzip", "missing", "blob", "size", "layer"])
async def test_damaged_archives(rooms: Rooms, tmp_path: Path, damage: str) -> None:
    built = two_layers()
    layer = built.manifest["layers"][0]["digest"]
    path = str(tmp_path / "a.tar")
    blobs = dict(built.blobs)
    match damage:
        case "blob":
            blobs[layer] = blobs[layer][:-1] + b"x"
        case "size":
            blobs[layer] += b"x"
        case "layer":
            del blobs[layer]
    write_archive(replace(built, blobs=blobs), path)
    match damage:
        case "cut":
            os.truncate(path, os.path.getsize(path) // 2)
        case "gzip":
            Path(path).write_bytes(gzip.compress(Path(path).read_bytes())[:-20])
        case "missing":
            os.unlink(path)
    expected = {
        "cut": "is damaged: ",
        "gzip": "its compressed data is invalid, or ends early",
        "missing": "No such file",
        "blob": f"blob {layer}: the content received has digest",
        "size": "bytes, and its manifest says",
        "layer": "has no file blobs/sha256",
    }
    with pytest.raises(Exception, match=expected[damage]) as caught:
        await rooms.images.import_archive(path)
    assert hasattr(caught.value, "code")
    assert rooms.leftovers() == []


async def test_one_verification_at_a_time_and_it_ends_with_who_asked(rooms: Rooms, tmp_path: Path) -> None:
    built = build_image([{"a": os.urandom(20_000_000)}])
    write_archive(built, str(tmp_path / "a.tar"))
    await rooms.images.import_archive(str(tmp_path / "a.tar"))
    first: Any = rooms.images.verify()
    async with contextlib.aclosing(first):
        await anext(first)
        with pytest.raises(FailedPreconditionError, match="already; wait for it"):
            await anext(rooms.images.verify())
    last = [found async for found in rooms.images.verify()][-1]
    assert (last.blobs, last.layers, last.damage) == (len(built.blobs), 1, ())
    assert last.bytes == last.total_bytes == sum(map(len, built.blobs.values()))


async def test_what_goes_during_a_verification_is_no_damage(rooms: Rooms, tmp_path: Path) -> None:
    for number in range(3):
        write_archive(build_image([{"a": os.urandom(5_000_000)}]), str(tmp_path / "a.tar"), f"localhost/{number}:1")
        await rooms.images.import_archive(str(tmp_path / "a.tar"))
    found = rooms.images.verify()
    damage = list((await anext(found)).damage)
    for image in rooms.images.list():
        await rooms.images.remove(image.id)
    async for verified in found:
        damage += verified.damage
    assert damage == []


@pytest.mark.parametrize("kind", ["record", "files", "below"])
async def test_a_damaged_layer_is_found(rooms: Rooms, registry: Registry, kind: str) -> None:
    image = await rooms.images.pull(registry.push(two_layers(), f"layers:{kind}"))
    layer = rooms.snapshotter.layers()[image.chain_id]
    match kind:
        case "record":
            os.truncate(f"{layer.path}/meta.json", 3)
        case "files":
            shutil.rmtree(f"{layer.path}/fs")
        case "below":
            del rooms.snapshotter._layers[layer.parent or ""]
    (damage,) = [damage async for found in rooms.images.verify() for damage in found.damage]
    assert (damage.kind, damage.digest, damage.images) == ("layer", image.chain_id, (image,))
    reason = {"record": "is unusable", "files": "cannot be read: No such file", "below": f"{layer.parent}, is missing"}
    assert reason[kind] in damage.reason


def replace_manifest_type(built: BuiltImage) -> BuiltImage:
    """The same configuration and layers under another manifest."""
    document = {**built.manifest, "annotations": {"again": "yes"}}
    blobs = {d: blob for d, blob in built.blobs.items() if d != built.digest}
    top = add_blob(blobs, built.descriptor["mediaType"], json.dumps(document).encode())
    return replace(built, blobs=blobs, descriptor=top)


def read_tar(path: str) -> dict[str, object]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}
