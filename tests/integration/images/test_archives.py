"""Archives of several images: all are imported, and what is no image of this node is told."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import os
import subprocess
import tarfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard

from criserver.errors import CriError, InvalidArgumentError, NotFoundError, ResourceExhaustedError, UnimplementedError
from criserver.images import Image, LeftOut, Platform, archive_members
from criserver.images.archive import Archive
from criserver.images.manifests import OCI_CONFIG, OCI_MANIFEST
from snapshotter.limits import LayerLimits
from tests.support.imagebuilder import (
    BuiltImage,
    add_blob,
    build_image,
    build_index,
    tar_of,
    write_archive,
    write_docker_archive,
    write_layout,
    write_tar,
)
from tests.support.rooms import Rooms

OTHER = Platform("linux", "s390x")
SIGNATURE = "application/vnd.dev.cosign.simplesigning.v1+json"


@pytest.fixture
async def rooms(tmp_path: Path) -> AsyncIterator[Rooms]:
    found = Rooms(str(tmp_path / "rooms"))
    yield found
    found.close()


def own(text: str, **more: Any) -> BuiltImage:
    return build_image([{"text": text.encode()}], **more)


def artifact(config: str = "application/vnd.cncf.helm.config.v1+json", layer: str = SIGNATURE) -> BuiltImage:
    """A manifest that is no image's: a chart, or with an image's configuration a signature of cosign."""
    blobs: dict[str, bytes] = {}
    body = json.dumps({"rootfs": {"type": "layers", "diff_ids": [f"sha256:{'0' * 64}"]}}).encode()
    described = add_blob(blobs, config, body)
    document = {"schemaVersion": 2, "config": described, "layers": [add_blob(blobs, layer, b"{}")]}
    return BuiltImage(blobs, add_blob(blobs, OCI_MANIFEST, json.dumps(document).encode()))


def layout(*entries: tuple[BuiltImage, Mapping[str, str]], **more: bytes) -> dict[str, bytes]:
    """The members of an OCI layout of these images, each with its annotations."""
    blobs = {digest: blob for image, _ in entries for digest, blob in image.blobs.items()}
    described = [{**image.descriptor, "annotations": dict(annotations)} for image, annotations in entries]
    return {
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
        "index.json": json.dumps({"schemaVersion": 2, "manifests": described}).encode(),
        **{f"blobs/{digest.replace(':', '/')}": blob for digest, blob in blobs.items()},
        **more,
    }


def tag(name: str) -> dict[str, str]:
    return {"org.opencontainers.image.ref.name": name}


def named(name: str) -> dict[str, str]:
    return {"io.containerd.image.name": name, **tag(name.rpartition(":")[2])}


async def imported(rooms: Rooms, path: Path, **more: Any) -> tuple[dict[str, tuple[str, ...]], list[LeftOut]]:
    """The tags of the images, by the images' IDs, and what was left out."""
    left_out: list[LeftOut] = []
    images: Sequence[Image] = await rooms.images.import_archive(str(path), left_out=left_out, **more)
    assert images == [rooms.images.get(image.id) for image in images]
    return {image.id: image.repo_tags for image in images}, left_out


@pytest.mark.parametrize("given", ["", "example.com/mine"])
async def test_a_layout_of_several_tags_by_skopeo(rooms: Rooms, tmp_path: Path, given: str) -> None:
    built = {text: own(text) for text in ("3.8", "3.9")}
    for text, image in built.items():
        write_layout(image, str(tmp_path / text))
        copy = ["skopeo", "--insecure-policy", "copy", "-q", f"oci:{tmp_path}/{text}", f"oci:{tmp_path}/layout:{text}"]
        await asyncio.to_thread(subprocess.run, copy, check=True)
    path = tmp_path / "alpine.tar"
    await asyncio.to_thread(subprocess.run, ["tar", "-C", f"{tmp_path}/layout", "-cf", str(path), "."], check=True)
    found, left_out = await imported(rooms, path, given=given)
    repository = given or "docker.io/library/alpine"
    assert found == {image.id: (f"{repository}:{text}",) for text, image in built.items()}
    assert left_out == []
    for text, image in built.items():
        kept = rooms.images.wanted(f"{repository}:{text}")
        assert kept.repo_digests == (f"{repository}@{image.digest}",)
        assert rooms.read(kept, "text") == text.encode()


async def test_all_images_of_a_layout(rooms: Rooms, tmp_path: Path) -> None:
    one, two, three = (own(text) for text in "123")
    members = layout(
        (one, named("example.com/a:1")), (one, named("example.com/a:one")), (two, {}), (three, tag("b/c:2")), (one, {})
    )
    write_tar(str(tmp_path / "a.tar"), members)
    found, left_out = await imported(rooms, tmp_path / "a.tar")
    assert found == {one.id: ("example.com/a:1", "example.com/a:one"), two.id: (), three.id: ("docker.io/b/c:2",)}
    assert left_out == []


async def test_entries_for_different_platforms_are_one_image(rooms: Rooms, tmp_path: Path) -> None:
    one, other = own("1"), own("2", platform=OTHER)
    for given in ({}, tag("1")):
        write_tar(str(tmp_path / "a.tar"), layout((other, given), (one, given)))
        found, left_out = await imported(rooms, tmp_path / "a.tar")
        assert (list(found), left_out) == ([one.id], [])


async def test_what_is_no_image_of_this_node_is_left_out_and_told(rooms: Rooms, tmp_path: Path) -> None:
    one, two, other = own("1"), own("2"), own("3", platform=OTHER)
    attestation = {"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": one.digest}
    unlabelled = own("5", platform=OTHER)
    described = {key: value for key, value in unlabelled.descriptor.items() if key != "platform"}
    write_tar(
        str(tmp_path / "app.tar"),
        layout(
            (artifact(), tag("chart")),
            (artifact(OCI_CONFIG), tag("sha256-1.sig")),
            (one, tag("1")),
            (other, named("example.com/other:1")),
            (replace(unlabelled, descriptor=described), named("example.com/unlabelled:1")),
            (build_index([other]), tag("index")),
            (own("4"), named("Example.com/Bad:1")),
            (artifact(OCI_CONFIG), attestation),
            (two, named("example.com/two:1")),
        ),
    )
    found, left_out = await imported(rooms, tmp_path / "app.tar")
    assert found == {one.id: ("docker.io/library/app:1",), two.id: ("example.com/two:1",)}
    told = {left.what: left.reason for left in left_out}
    assert len(told) == len(left_out) == 6
    assert "is an artifact" in told["image chart"]
    assert "no layer of files" in told["image sha256-1.sig"]
    for what in ("image example.com/other:1", "image example.com/unlabelled:1", "image index"):
        assert "linux/s390x" in told[what]
    assert "must be lowercase" in told["name 'Example.com/Bad:1'"]
    assert rooms.content.digests() == {*one.blobs, *two.blobs}
    assert len(rooms.snapshotter.layers()) == 2


@pytest.mark.parametrize(
    ("image", "name", "error", "message"),
    [
        (artifact(), "example.com/a:1", UnimplementedError, "is an artifact"),
        (own("1", platform=OTHER), "example.com/a:1", NotFoundError, "no image for linux/"),
        (own("1"), "Example.com/Bad:1", InvalidArgumentError, "name 'Example.com/Bad:1': .*must be lowercase"),
    ],
)
async def test_an_archive_with_nothing_to_import_is_refused(
    rooms: Rooms, tmp_path: Path, image: BuiltImage, name: str, error: type[CriError], message: str
) -> None:
    write_archive(image, str(tmp_path / "a.tar"), name)
    with pytest.raises(error, match=f"^archive {tmp_path}/a.tar.*{message}"):
        await rooms.images.import_archive(str(tmp_path / "a.tar"))
    write_tar(str(tmp_path / "a.tar"), layout((image, named(name)), (own("2", platform=OTHER), tag("2"))))
    with pytest.raises(CriError, match=f"has no image to add: .*{message}.*image 2: .*linux/s390x"):
        await rooms.images.import_archive(str(tmp_path / "a.tar"))
    assert rooms.leftovers() == []


async def test_a_damaged_image_fails_the_whole_archive(rooms: Rooms, tmp_path: Path) -> None:
    one, two = own("1"), own("2")
    members = layout((one, tag("1")), (two, tag("2")))
    del members[f"blobs/{two.manifest['layers'][0]['digest'].replace(':', '/')}"]
    write_tar(str(tmp_path / "a.tar"), members)
    with pytest.raises(NotFoundError, match="has no file blobs/sha256"):
        await rooms.images.import_archive(str(tmp_path / "a.tar"))
    assert rooms.leftovers() == []


@pytest.mark.parametrize("tags", [None, [], ["app:1"], ["app", "Bad:1", ""]])
async def test_tags_of_docker(rooms: Rooms, tmp_path: Path, tags: list[str] | None) -> None:
    one, empty = own("1"), build_image([], {"Labels": {"a": "b"}})
    entries = [
        {"Config": "1.json", "RepoTags": tags, "Layers": ["1.tar"]},
        {"Config": "2.json", "RepoTags": ["empty:1"], "Layers": None},
        {"Config": "3.json", "Layers": ["1.tar"]},
    ]
    other = json.dumps({**json.loads(one.blobs[one.id]), "architecture": "s390x"}).encode()
    members = {"1.json": one.blobs[one.id], "2.json": empty.blobs[empty.id], "3.json": other, "1.tar": one.layers[0]}
    write_tar(str(tmp_path / "a.tar"), {**members, "manifest.json": json.dumps(entries).encode()})
    found, left_out = await imported(rooms, tmp_path / "a.tar")
    expected = tuple(f"docker.io/library/{t}" if ":" in t else f"docker.io/library/{t}:latest" for t in tags or () if t)
    assert found == {
        one.id: tuple(name for name in expected if "Bad" not in name),
        empty.id: ("docker.io/library/empty:1",),
    }
    wrong = ["name 'Bad:1'"] if tags and "Bad:1" in tags else []
    assert [left.what for left in left_out[: len(wrong)]] == wrong
    assert [("s390x" in left.reason) for left in left_out[len(wrong) :]] == [True]


async def test_a_name_for_a_nameless_image(rooms: Rooms, tmp_path: Path) -> None:
    built = own("1")
    write_docker_archive(built, str(tmp_path / "a.tar"))
    assert (await imported(rooms, tmp_path / "a.tar"))[0] == {built.id: ()}
    assert (await imported(rooms, tmp_path / "a.tar", given="app:2"))[0] == {built.id: ("docker.io/library/app:2",)}
    write_tar(str(tmp_path / "a.tar"), layout((built, tag("latest"))))
    await rooms.images.remove(built.id)
    found, (left,) = await imported(rooms, tmp_path / "a.tar", file="")
    assert found == {built.id: ()}
    assert (left.what, "--name" in left.reason) == ("name 'latest'", True)


def compressed(data: bytes, by: str) -> bytes:
    match by:
        case "gzip":
            return gzip.compress(data)
        case "gzip members":
            return gzip.compress(data[:3000]) + gzip.compress(data[3000:]) + bytes(512)
        case "zstd":
            return zstandard.ZstdCompressor().compress(data)
        case _:
            return zstandard.ZstdCompressor().compress(data[:3000]) + zstandard.ZstdCompressor().compress(data[3000:])


@pytest.mark.parametrize("by", ["gzip", "gzip members", "zstd", "zstd frames"])
async def test_a_compressed_archive(rooms: Rooms, tmp_path: Path, by: str) -> None:
    built = build_image([{"big": os.urandom(9_000_000)}, {"b": b"2"}])
    write_archive(built, str(tmp_path / "a.tar"), "example.com/a:1")
    (tmp_path / "a.tar.x").write_bytes(compressed((tmp_path / "a.tar").read_bytes(), by))
    found, left_out = await imported(rooms, tmp_path / "a.tar.x")
    assert (found, left_out) == ({built.id: ("example.com/a:1",)}, [])
    assert os.listdir(f"{rooms.root}/content/ingest") == []


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (gzip.compress(b"no tar file" * 100), InvalidArgumentError, "is no tar file|neither index.json"),
        (gzip.compress(tar_of({"a": b"b"})), InvalidArgumentError, "neither index.json"),
        (gzip.compress(os.urandom(5000))[:2000], InvalidArgumentError, "is damaged: its compressed data"),
        (b"\x1f\x8b" + bytes(100), InvalidArgumentError, "is damaged: its compressed data"),
        (b"\x28\xb5\x2f\xfd" + b"\xff" * 100, InvalidArgumentError, "is damaged: its compressed data"),
        (gzip.compress(bytes(3 << 20)), ResourceExhaustedError, "max_bytes and max_ratio"),
    ],
    ids=["no archive", "no layout", "cut off", "zeros", "no zstd frame", "a bomb"],
)
async def test_a_compressed_archive_that_is_refused(
    rooms: Rooms, tmp_path: Path, data: bytes, error: type[CriError], message: str
) -> None:
    rooms.snapshotter.limits = LayerLimits(max_bytes=2 << 20)
    (tmp_path / "a.tar.gz").write_bytes(data)
    with pytest.raises(error, match=f"^archive {tmp_path}/a.tar.gz.*({message})"):
        await rooms.images.import_archive(str(tmp_path / "a.tar.gz"))
    assert rooms.leftovers() == []


async def test_a_bomb_ends_before_it_is_on_the_disk(rooms: Rooms, tmp_path: Path) -> None:
    rooms.snapshotter.limits = LayerLimits(ratio_floor=1 << 20)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(30 << 20)))
    with pytest.raises(ResourceExhaustedError, match=r"more than \d{7} bytes"):
        await rooms.images.import_archive(str(tmp_path / "a.tar.gz"))


def written(path: Path, *members: tarfile.TarInfo) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            tar.addfile(member)


def comment(text: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo("a")
    member.pax_headers = {"comment": text}
    return member


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([tarfile.TarInfo("a")] * 11, "has more than 10 members"),
        ([comment("x" * 1000)] * 9, "is damaged: headers of more than 10000 bytes"),
    ],
)
async def test_the_headers_of_an_archive_have_a_limit(
    rooms: Rooms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: list[tarfile.TarInfo], message: str
) -> None:
    monkeypatch.setattr(archive_members, "_MAX_MEMBERS", 10)
    monkeypatch.setattr(archive_members, "_MAX_HEADERS", 10_000)
    written(tmp_path / "a.tar", *members)
    with pytest.raises(InvalidArgumentError, match=message):
        await rooms.images.import_archive(str(tmp_path / "a.tar"))


async def test_what_a_docker_archive_lists_often_is_read_once(
    rooms: Rooms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[archive_members.Member] = []
    own_hash = Archive._hashed
    monkeypatch.setattr(Archive, "_hashed", lambda self, member: hashed.append(member) or own_hash(self, member))
    layer = gzip.compress(tar_of({"a": b"b"}))
    config = {"os": "linux", "rootfs": {"diff_ids": [f"sha256:{hashlib.sha256(tar_of({'a': b'b'})).hexdigest()}"]}}
    entry = {"Config": "c", "RepoTags": ["example.com/a:1"], "Layers": ["l"]}
    aliases = [{**entry, "Layers": [f"{'./' * n}l"]} for n in range(50)]
    write_tar(
        str(tmp_path / "a.tar"),
        {"c": json.dumps(config).encode(), "l": layer, "manifest.json": json.dumps(aliases).encode()},
    )
    assert len((await imported(rooms, tmp_path / "a.tar"))[0]) == 1
    assert len(hashed) == 1
    write_tar(str(tmp_path / "b.tar"), {"manifest.json": json.dumps([entry] * 1001).encode()})
    with pytest.raises(InvalidArgumentError, match="lists 1001 images; 1000 are the most"):
        await imported(rooms, tmp_path / "b.tar")
