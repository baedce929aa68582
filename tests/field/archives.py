"""Archives of images, and what is in layers."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import zstandard

from criserver.images import Platform
from criserver.images.manifests import OCI_MANIFEST
from tests.support.field import REFUSED, Field, FieldCase
from tests.support.imagebuilder import BuiltImage, Link, add_blob, build_image, busybox_image, tar_of, write_tar
from tests.support.layers import archive, directory, hardlink, item

REF = "org.opencontainers.image.ref.name"


def own(text: str) -> BuiltImage:
    return build_image([{"text": text.encode()}])


def layout(*entries: tuple[BuiltImage, Mapping[str, str]]) -> dict[str, bytes]:
    """The members of an OCI layout of these images, each with its annotations."""
    described = [{**image.descriptor, "annotations": dict(annotations)} for image, annotations in entries]
    return {
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
        "index.json": json.dumps({"schemaVersion": 2, "manifests": described}).encode(),
        **{f"blobs/{d.replace(':', '/')}": blob for image, _ in entries for d, blob in image.blobs.items()},
    }


def imported(field: Field, members: Mapping[str, bytes], pack: Callable[[bytes], bytes] = bytes) -> str:
    """The outcome of an import, without the number of the case's file and the date."""
    path = f"{field.file}.tar"
    Path(path).write_bytes(pack(tar_of(members)))
    return re.sub(r"import-[\d-]+", "import-DATE", re.sub(r"field-\d+", "FILE", field.imported(path)))


def tags_alone(field: Field) -> str:
    return imported(field, layout((own("3.8"), {REF: "3.8"}), (own("3.9"), {REF: "3.9"})))


def with_an_artifact(field: Field) -> str:
    blobs: dict[str, bytes] = {}
    config = add_blob(blobs, "application/vnd.cncf.helm.config.v1+json", b"{}")
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": []}
    chart = BuiltImage(blobs, add_blob(blobs, OCI_MANIFEST, json.dumps(document).encode()))
    name = {"io.containerd.image.name": "example.com/beside-a-chart:1"}
    return imported(field, layout((own("a"), name), (chart, {"io.containerd.image.name": "example.com/chart:1"})))


def with_a_signature(field: Field) -> str:
    """As cosign writes it: the manifest is that of an image, and its only layer is the text that was signed."""
    blobs: dict[str, bytes] = {}
    layer = add_blob(blobs, "application/vnd.dev.cosign.simplesigning.v1+json", b"{}")
    rootfs = {"type": "layers", "diff_ids": [layer["digest"]]}
    body = json.dumps({"architecture": "", "os": "", "config": {}, "rootfs": rootfs}).encode()
    config = add_blob(blobs, "application/vnd.oci.image.config.v1+json", body)
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": [layer]}
    signature = BuiltImage(blobs, add_blob(blobs, OCI_MANIFEST, json.dumps(document).encode()))
    names = [{"io.containerd.image.name": f"example.com/{name}:1"} for name in ("beside-a-signature", "signature")]
    return imported(field, layout((own("b"), names[0]), (signature, names[1])))


def with_another_platform(field: Field) -> str:
    other = build_image([{"text": b"other"}], platform=Platform("linux", "s390x"))
    names = [{"io.containerd.image.name": f"example.com/{name}:1"} for name in ("beside-s390x", "s390x")]
    return imported(field, layout((own("this"), names[0]), (other, names[1])))


def with_a_bad_name(field: Field) -> str:
    names = ["example.com/beside-a-bad-name:1", "example.com/Not A Reference:1"]
    return imported(field, layout(*((own(name), {"io.containerd.image.name": name}) for name in names)))


def without_tags(field: Field) -> str:
    """As skopeo writes it by ``docker-archive:FILE``."""
    image = own("docker")
    layer = image.layers[0]
    entry = {"Config": "config.json", "RepoTags": [], "Layers": ["0/layer.tar"]}
    members = {
        "config.json": image.blobs[image.id],
        "0/layer.tar": layer,
        "manifest.json": json.dumps([entry]).encode(),
    }
    path = f"{field.file}.tar"
    write_tar(path, members)
    outcome = field.imported(path)
    known = any(image.id == found.id for found in field.node.client.ListImages().images)
    return outcome if known else f"no image; {outcome.partition('; ')[2]}"


def compressed(pack: Callable[[bytes], bytes], name: str) -> Callable[[Field], str]:
    return lambda field: imported(field, layout((own(name), {"io.containerd.image.name": name})), pack)


def layer(tar: bytes, command: str, *below: Any) -> Callable[[Field], str]:
    """What a command in a container prints whose image has this layer on busybox and the layers ``below``."""
    return lambda field: field.run(field.pull(busybox_image(layers=[*below, tar])), ["sh", "-c", command])


def lowest(field: Field) -> str:
    """A whiteout in the lowest layer."""
    busybox = busybox_image()
    image = build_image(
        [{".wh.gone": b"", "d/.wh.too": b"", "d/kept": b""}, *busybox.layers], {"Cmd": ["sh"], "Env": ["PATH=/bin"]}
    )
    return field.run(
        field.pull(image), ["sh", "-c", "ls -A / d | grep -e gone -e too; tar -cf /dev/null d && echo clean"]
    )


def patched(data: bytes, at: int, text: bytes) -> bytes:
    """A header with another field, and its checksum."""
    header = bytearray(data[:512])
    header[at : at + len(text)] = text
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


ONE = archive(item("file", b"content"))
CAT = "cat file"
PSEUDO = ".wh..wh.plnk/1.2"

CASES = (
    FieldCase(
        7,
        "An OCI layout of two images that have tags alone",
        tags_alone,
        "docker.io/library/FILE:3.8, docker.io/library/FILE:3.9; exit code 0",
        "import-DATE:3.8, import-DATE:3.9; exit code 0",
        "podman-container-tools/skopeo#1442",
    ),
    FieldCase(
        7,
        "An archive with an artifact beside an image",
        with_an_artifact,
        "example.com/beside-a-chart:1; exit code 1",
        "example.com/beside-a-chart:1, example.com/chart:1; exit code 0",
    ),
    FieldCase(
        7,
        "An archive with a signature beside an image",
        with_a_signature,
        "example.com/beside-a-signature:1; exit code 1",
        "example.com/beside-a-signature:1, example.com/signature:1; exit code 0",
    ),
    FieldCase(
        7,
        "An archive with an image for another platform beside one for this node",
        with_another_platform,
        "example.com/beside-s390x:1; exit code 1",
        "example.com/beside-s390x:1, example.com/s390x:1; exit code 0",
    ),
    FieldCase(
        7,
        "An archive with a name that is no reference",
        with_a_bad_name,
        "example.com/beside-a-bad-name:1; exit code 1",
        "example.com/Not A Reference:1, example.com/beside-a-bad-name:1; exit code 0",
    ),
    FieldCase(
        7,
        "An archive of Docker's kind without a name",
        without_tags,
        "no name; exit code 0",
        "no image; exit code 0",
        "podman-container-tools/skopeo#2568",
    ),
    FieldCase(
        7,
        "An archive compressed by gzip",
        compressed(gzip.compress, "example.com/gzip:1"),
        "example.com/gzip:1; exit code 0",
        "example.com/gzip:1; exit code 0",
    ),
    FieldCase(
        7,
        "An archive compressed by zstd",
        compressed(lambda data: zstandard.ZstdCompressor().compress(data), "example.com/zstd:1"),
        "example.com/zstd:1; exit code 0",
        "example.com/zstd:1; exit code 0",
    ),
    FieldCase(8, "Whiteouts in the lowest layer", lowest, "clean", "clean", "apptainer/singularity#884"),
    FieldCase(
        8,
        "A whiteout of what no lower layer has",
        layer(
            archive(item(".wh.none"), item("d/.wh.none"), item("d/kept")),
            "ls -A / d 2>/dev/null | grep none; cp -a d e 2>/dev/null && echo clean || echo damaged",
        ),
        "clean",
        "damaged",
    ),
    FieldCase(
        8,
        "The root as a hard link to itself",
        layer(archive(hardlink("/", "."), item("file", b"content")), CAT),
        "content",
        "content",
    ),
    FieldCase(
        8, "An archive that ends after one block of zeros", layer(ONE[:1024] + bytes(512), CAT), "content", "content"
    ),
    FieldCase(8, "An archive that ends in its last padding", layer(ONE[:600], CAT), "content", "content"),
    FieldCase(
        8,
        "A number with rubbish behind the zero byte",
        layer(patched(ONE, 108, b"0001750\0"[:5] + b"\0x1"), CAT),
        "content",
        "content",
        "moby/moby#15561",
    ),
    FieldCase(
        8,
        "A negative owner",
        layer(archive(item("file", b"1", pax_headers={"uid": "-2"})), "stat -c %u file"),
        "4294967294",
        "4294967294",
    ),
    FieldCase(
        8,
        "`+17` as a time",
        layer(archive(item("file", b"1", pax_headers={"mtime": "+17"})), "stat -c %Y file"),
        "17",
        "17",
    ),
    FieldCase(
        8,
        "Entries below a name that begins with `.wh.`",
        layer(archive(directory(".wh.dir"), item(".wh.dir/file", b"content")), "cat .wh.dir/file"),
        "content",
        "content",
    ),
    FieldCase(
        8,
        "An extended attribute that the file system has no place for",
        layer(archive(item("file", b"content", pax_headers={"SCHILY.xattr.user.large": "x" * 70_000})), CAT),
        "content",
        REFUSED,
        "moby/moby#47962",
    ),
    FieldCase(
        8,
        "A header of ustar without a version, with a directory in its prefix",
        layer(patched(patched(ONE, 263, b"\0\0"), 345, b"d"), "cat d/file"),
        "content",
        "content",
    ),
    FieldCase(
        8,
        "Hard links to the pseudo-links of AUFS",
        layer(
            archive(item(PSEUDO, b"content"), hardlink("a", PSEUDO), hardlink("b", PSEUDO)),
            "cat b; ls -A / | grep wh; true",
        ),
        "content",
        "content.wh..wh.plnk",
        "moby/moby#3884",
    ),
    FieldCase(
        8,
        "A time that no kernel can keep",
        layer(archive(item("file", b"1", pax_headers={"mtime": "9223372036854775807"})), "stat -c %Y file"),
        "0",
        "0",
    ),
    FieldCase(
        8,
        "A time before 1970",
        layer(archive(item("file", b"1", pax_headers={"mtime": "-17"})), "stat -c %Y file"),
        "-17",
        "0",
    ),
    FieldCase(
        8,
        "Whiteouts below a whiteout, and below a file",
        layer(
            archive(item(".wh.d"), item("d/.wh.x"), item("f", b"content"), item("f/.wh.x")),
            "ls -d d 2>/dev/null; cat f",
            {"d/x": b"old", "f/x": b"old"},
        ),
        "content",
        REFUSED,
        "GoogleContainerTools/kaniko#2398",
    ),
    FieldCase(
        8,
        "A whiteout of what the same layer has",
        layer(archive(item("d/file", b"content"), item("d/.wh.file")), "cat d/file", {"d/file": b"old"}),
        "content",
        REFUSED,
    ),
    FieldCase(
        14,
        "The mode of the root in a layer",
        layer(archive(directory("./", 0o700)), "stat -c %a /"),
        "700",
        "755",
        "moby/moby#41261, containers/storage#743",
        differs="The owner, mode and time of `/` in a layer",
    ),
    FieldCase(
        14,
        "`trusted.overlay.*` in a layer",
        layer(archive(directory("d", pax_headers={"SCHILY.xattr.trusted.overlay.opaque": "y"})), "echo ran"),
        REFUSED,
        "ran",
        differs="Attributes `trusted.overlay.*` in a layer",
    ),
    FieldCase(
        14,
        "An image whose `/dev` is a link",
        lambda field: field.runs(busybox_image(layers=[{"dev": Link("/tmp")}])),
        REFUSED,
        "runs",
        differs="An image whose `/dev` is a symbolic link",
    ),
)
