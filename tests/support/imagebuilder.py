"""Images for the tests, built in memory: OCI layouts, Docker schema 2, indexes, archives.

>>> image = build_image([{"bin/sh": File(b"...", 0o755), "bin/ls": Link("sh"), "tmp": Dir(0o1777)}], {"Cmd": ["sh"]})
>>> write_archive(image, "image.tar", "localhost/image:1")
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import zstandard

from criserver.images.manifests import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_LAYER_GZIP,
    DOCKER_LAYER_ZSTD,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
)
from criserver.images.platforms import Platform, host_platform

_COMPRESSIONS: dict[str, tuple[Callable[[bytes], bytes], str, str]] = {
    # Many images of a test have the same layer of busybox.
    "gzip": (lru_cache(4)(lambda tar: gzip.compress(tar, 1, mtime=0)), OCI_LAYER_GZIP, DOCKER_LAYER_GZIP),
    "zstd": (lambda tar: zstandard.ZstdCompressor().compress(tar), OCI_LAYER_ZSTD, DOCKER_LAYER_ZSTD),
    "none": (lambda tar: tar, OCI_LAYER, DOCKER_LAYER),
}
_BUSYBOX = "/bin/busybox"
_PASSWD = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
_GROUP = b"root:x:0:\nnogroup:x:65534:\n"


@dataclass(frozen=True)
class File:
    """A regular file that needs more than its content."""

    content: bytes
    mode: int = 0o644
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True)
class Dir:
    """A directory."""

    mode: int = 0o755


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


Layer = Mapping[str, bytes | File | Dir | Link]


@dataclass(frozen=True)
class BuiltImage:
    """Blobs by digest, and the descriptor of the manifest or index that stands for them."""

    blobs: Mapping[str, bytes]
    descriptor: Mapping[str, Any]
    layers: Sequence[bytes] = field(default=())  # uncompressed

    @property
    def digest(self) -> str:
        """The digest of the manifest or index."""
        return str(self.descriptor["digest"])

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest or index as a document."""
        document: dict[str, Any] = json.loads(self.blobs[self.digest])
        return document

    @property
    def id(self) -> str:
        """The image ID."""
        return str(self.manifest["config"]["digest"])


def build_image(
    layers: Iterable[Layer | bytes],
    config: Mapping[str, Any] | None = None,
    *,
    platform: Platform | None = None,
    docker: bool = False,
    compression: str = "gzip",
) -> BuiltImage:
    """An image, for this host's architecture where nothing else is said; ``docker`` makes it schema 2.

    A layer of bytes is a tar archive as it is. ``compression`` is gzip, zstd or none.
    """
    platform = platform or Platform("linux", host_platform().architecture)  # builders give no variant for a host
    tars = [layer if isinstance(layer, bytes) else tar_of(layer) for layer in layers]
    blobs: dict[str, bytes] = {}
    configuration = {
        "architecture": platform.architecture,
        "os": platform.os,
        **({"variant": platform.variant} if platform.variant else {}),
        "config": dict(config or {}),
        "rootfs": {"type": "layers", "diff_ids": [digest(tar) for tar in tars]},
    }
    described = add_blob(blobs, DOCKER_CONFIG if docker else OCI_CONFIG, json.dumps(configuration).encode())
    pack, *types = _COMPRESSIONS[compression]
    packed = [add_blob(blobs, types[docker], pack(tar)) for tar in tars]
    kind = DOCKER_MANIFEST if docker else OCI_MANIFEST
    manifest = {"schemaVersion": 2, "mediaType": kind, "config": described, "layers": packed}
    top = add_blob(blobs, kind, json.dumps(manifest).encode())
    top["platform"] = {k: v for k, v in vars_of(platform).items() if v}
    return BuiltImage(blobs, top, tars)


def build_index(images: Iterable[BuiltImage], *, docker: bool = False) -> BuiltImage:
    """An index of images for several platforms."""
    images = list(images)
    blobs = {d: b for image in images for d, b in image.blobs.items()}
    kind = DOCKER_LIST if docker else OCI_INDEX
    document = {"schemaVersion": 2, "mediaType": kind, "manifests": [dict(image.descriptor) for image in images]}
    return BuiltImage(blobs, add_blob(blobs, kind, json.dumps(document).encode()))


def busybox_image(*, config: Mapping[str, Any] | None = None, layers: Iterable[Layer | bytes] = ()) -> BuiltImage:
    """The host's static busybox with its applets, root and nobody; ``layers`` go on top of it."""
    with open(_BUSYBOX, "rb") as f:
        base: dict[str, bytes | File | Dir | Link] = {"bin/busybox": File(f.read(), 0o755)}
    applets = subprocess.run([_BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split()
    base |= {f"bin/{applet}": Link("busybox") for applet in applets if applet != "busybox"}
    base |= {"etc/passwd": _PASSWD, "etc/group": _GROUP, "tmp": Dir(0o1777), "root": Dir(0o700)}
    return build_image([base, *layers], {"Cmd": ["sh"], "Env": ["PATH=/bin"], **(config or {})})


def by_sha512(image: BuiltImage) -> BuiltImage:
    """The same image of one manifest, with all of its blobs named by sha512."""
    blobs: dict[str, bytes] = {}

    def renamed(descriptor: Mapping[str, Any]) -> dict[str, Any]:
        return {**descriptor, **add_blob(blobs, descriptor["mediaType"], image.blobs[descriptor["digest"]], "sha512")}

    manifest = image.manifest
    manifest |= {"config": renamed(manifest["config"]), "layers": [renamed(layer) for layer in manifest["layers"]]}
    top = add_blob(blobs, manifest["mediaType"], json.dumps(manifest).encode(), "sha512")
    return BuiltImage(blobs, {**image.descriptor, **top}, image.layers)


def write_layout(image: BuiltImage, directory: str, name: str = "latest") -> None:
    """The image as an OCI layout; ``name`` is its org.opencontainers.image.ref.name."""
    for path, content in _layout(image, {"org.opencontainers.image.ref.name": name}).items():
        os.makedirs(os.path.dirname(os.path.join(directory, path)), exist_ok=True)
        with open(os.path.join(directory, path), "wb") as f:
            f.write(content)


def write_directory(image: BuiltImage, directory: str) -> None:
    """The image as skopeo's dir: transport reads it, of any manifest type and with every platform's manifest."""
    members = {"version": b"Directory Transport Version: 1.1\n", "manifest.json": image.blobs[image.digest]}
    for digest_, blob in image.blobs.items():
        members[digest_.removeprefix("sha256:")] = blob
    for entry in image.manifest.get("manifests", ()):
        members[f"{entry['digest'].removeprefix('sha256:')}.manifest.json"] = image.blobs[entry["digest"]]
    for name, content in members.items():
        with open(os.path.join(directory, name), "wb") as f:
            f.write(content)


def write_archive(image: BuiltImage, path: str, name: str = "") -> None:
    """The image as a tar file that holds an OCI layout, named as containerd names images."""
    write_tar(path, _layout(image, {"io.containerd.image.name": name} if name else {}))


def write_docker_archive(image: BuiltImage, path: str, names: Sequence[str] = (), *, packed: str = "none") -> None:
    """The image as ``docker save`` wrote it: manifest.json, and layers compressed as ``packed`` says."""
    layers: list[str] = []
    entry = {"Config": f"{image.id.removeprefix('sha256:')}.json", "RepoTags": list(names), "Layers": layers}
    members = {f"{image.id.removeprefix('sha256:')}.json": image.blobs[image.id]}
    for number, layer in enumerate(image.layers):
        layers.append(f"{number}/layer.tar")
        members[f"{number}/layer.tar"] = _COMPRESSIONS[packed][0](layer)
    write_tar(path, {**members, "manifest.json": json.dumps([entry]).encode()})


def write_tar(path: str, members: Layer) -> None:
    """A tar file with these members."""
    with open(path, "wb") as f:
        f.write(tar_of(members))


def tar_of(members: Layer) -> bytes:
    """A tar stream with these members, and the same bytes for the same members."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, member in members.items():
            info = tarfile.TarInfo(name)
            content = b""
            match member:
                case Dir():
                    info.type, info.mode = tarfile.DIRTYPE, member.mode
                case Link():
                    info.type, info.linkname, info.mode = tarfile.SYMTYPE, member.target, 0o777
                case File():
                    content, info.mode, info.uid, info.gid = member.content, member.mode, member.uid, member.gid
                case _:
                    content = member
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def digest(data: bytes, algorithm: str = "sha256") -> str:
    """The digest of a blob."""
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def add_blob(blobs: dict[str, bytes], media_type: str, data: bytes, algorithm: str = "sha256") -> dict[str, Any]:
    """Put ``data`` among the blobs and describe it."""
    name = digest(data, algorithm)
    blobs[name] = data
    return {"mediaType": media_type, "digest": name, "size": len(data)}


def vars_of(platform: Platform) -> dict[str, str]:
    """A platform as descriptors write it."""
    return {"os": platform.os, "architecture": platform.architecture, "variant": platform.variant}


def _layout(image: BuiltImage, annotations: Mapping[str, str]) -> dict[str, bytes]:
    entry = {**image.descriptor, "annotations": dict(annotations)}
    return {
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
        "index.json": json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode(),
        **{f"blobs/{d.replace(':', '/')}": blob for d, blob in image.blobs.items()},
    }
