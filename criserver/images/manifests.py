"""Image manifests, indexes and configurations: from untrusted bytes to checked values.

Pure functions after the OCI image-spec and Docker's schema 2. Known formats that are not supported (schema 1,
artifacts) are refused by name, with advice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from criserver.errors import InvalidArgumentError, NotFoundError, UnimplementedError
from criserver.images import go_json, image_user
from criserver.images.digests import is_digest
from criserver.images.platforms import Platform, normalized, rank
from criserver.text import shown

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
DOCKER_LAYER_ZSTD = "application/vnd.docker.image.rootfs.diff.tar.zstd"

MANIFEST_TYPES = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEX_TYPES = (OCI_INDEX, DOCKER_LIST)
MAX_MANIFEST = 4 << 20
MAX_CONFIG = 8 << 20
# Bytes of all texts of an image's process. They are in memory as long as the image is here. Those of real images have a
# few thousand, and the kernel takes no argument or variable of more than 128 KiB (execve(2)).
MAX_PROCESS = 256 << 10

Compression = Literal["gzip", "none", "zstd"]

_COMPRESSIONS: dict[str, Compression] = {
    OCI_LAYER: "gzip",  # or none, as for DOCKER_LAYER: there are builders that give it to compressed layers
    OCI_LAYER_GZIP: "gzip",
    OCI_LAYER_ZSTD: "zstd",
    DOCKER_LAYER: "gzip",  # or none: this type says nothing about it, and the unpacker looks at the first bytes
    DOCKER_LAYER_GZIP: "gzip",
    DOCKER_LAYER_ZSTD: "zstd",
}
# Layers that a registry need not have. Many do have them, and then they are layers as all others.
_FOREIGN: dict[str, str] = {
    "application/vnd.docker.image.rootfs.foreign.diff.tar": DOCKER_LAYER,
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": DOCKER_LAYER_GZIP,
    "application/vnd.docker.image.rootfs.foreign.diff.tar.zstd": DOCKER_LAYER_ZSTD,
    "application/vnd.oci.image.layer.nondistributable.v1.tar": OCI_LAYER,
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": OCI_LAYER_GZIP,
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": OCI_LAYER_ZSTD,
}
# After the two proper types come those that old registries and builders gave to configurations of images.
_CONFIGS = (OCI_CONFIG, DOCKER_CONFIG, "application/octet-stream", "application/json", "text/html", "")
_SCHEMA_1 = frozenset(
    (
        "application/vnd.docker.distribution.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
    )
)
_ATTESTATION = "vnd.docker.reference.type"

# The layer of an image that has none: a tar stream without files. Snapshots and mounts take at least one layer.
EMPTY_TAR = bytes(1024)


class OtherPlatformError(NotFoundError):
    """The image is not for this node's platform."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A blob by type, digest and size in bytes. The types are in lower case.

    ``platform``, ``artifact_type`` and ``os_features`` are only in the entries of an index.
    """

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str = ""
    os_features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Index:
    """Manifests to choose from."""

    manifests: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The configuration and the layers of one image, the lowest layer first.

    ``layers`` are all entries of that field. Some builders put other blobs there too, beside the layers of files.
    """

    config: Descriptor
    layers: tuple[Descriptor, ...]

    @property
    def files(self) -> tuple[Descriptor, ...]:
        """The layers of files."""
        return tuple(layer for layer in self.layers if _compression(layer) is not None)

    @property
    def others(self) -> tuple[Descriptor, ...]:
        """The blobs that are no layers of files. They are kept for exports, and nothing else is done with them."""
        return tuple(layer for layer in self.layers if _compression(layer) is None)


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The process that an image describes; fields that the image leaves out are empty.

    It has what a container takes from its image, and nothing else: it is in memory as long as the image is here.
    """

    user: str = ""
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    volumes: tuple[str, ...] = ()
    stop_signal: str = ""

    @property
    def size(self) -> int:
        """The bytes of all texts."""
        texts = (self.user, self.working_dir, self.stop_signal, *self.env, *self.entrypoint, *self.cmd, *self.volumes)
        return sum(len(text.encode()) for text in texts)


@dataclass(frozen=True, slots=True)
class Configuration:
    """An image configuration: the platform, the digests of the uncompressed layers, and the process."""

    platform: Platform
    diff_ids: tuple[str, ...]
    process: ImageConfig


def parse_manifest(body: bytes, media_type: str, what: str) -> Index | Manifest:
    """The index or manifest in ``body``, which was sent with the type ``media_type``, "" for none.

    A type counts by its kind, manifest or index: OCI's and Docker's differ in their names alone. ``what`` names it in
    errors. Raises InvalidArgumentError, and UnimplementedError for schema 1 and for types that are not an image's.
    """
    document = go_json.parse(body, what)
    fields = {go_json.folded(name): value for name, value in document.items() if value is not None}
    own_type, sent_type = _media_type(fields.get("mediatype")), _media_type(media_type)
    if fields.get("schemaversion") == 1 or "fslayers" in fields or not _SCHEMA_1.isdisjoint((own_type, sent_type)):
        raise UnimplementedError(
            f"{what} has Docker's schema 1, which is obsolete; build or push the image again with a current tool"
        )
    if own_type and own_type not in MANIFEST_TYPES + INDEX_TYPES:
        raise UnimplementedError(f"{what} has the type {shown(own_type)}, which is no container image")
    kinds = {t in INDEX_TYPES for t in (own_type, sent_type) if t in MANIFEST_TYPES + INDEX_TYPES}
    if len(kinds) > 1:
        raise InvalidArgumentError(f"{what} came as {sent_type} and says that it is {own_type}")
    if "manifests" in fields and ("layers" in fields or "config" in fields):
        # Two clients could take such a document for two different images (OCI distribution-spec, CVE-2021-41190).
        raise InvalidArgumentError(f"{what} is an index and a manifest at once")
    if kinds.pop() if kinds else "manifests" in fields:
        return Index(tuple(_descriptor(d) for d in go_json.checked(document, "index.json", what)["manifests"]))
    found = go_json.checked(document, "manifest.json", what)
    manifest = Manifest(_descriptor(found["config"]), tuple(_descriptor(layer) for layer in found.get("layers", ())))
    if manifest.config.media_type not in _CONFIGS:
        raise UnimplementedError(
            f"{what} is an artifact with a configuration of type {shown(manifest.config.media_type)}, not a "
            "container image"
        )
    return manifest


def parse_config(body: bytes, what: str) -> Configuration:
    """The image configuration in ``body``; ``what`` names it in errors. Raises InvalidArgumentError."""
    document = go_json.checked(go_json.parse(body, what), "config.json", what)
    found = document.get("config", {})
    entrypoint = tuple(found.get("Entrypoint", ()))
    process = ImageConfig(
        user=found.get("User", ""),
        env=tuple(found.get("Env", ())),
        # Docker's way to take away the entrypoint of a base image: ENTRYPOINT [""] (moby/moby, daemon/commit.go).
        entrypoint=() if entrypoint == ("",) else entrypoint,
        cmd=tuple(found.get("Cmd", ())),
        working_dir=found.get("WorkingDir", ""),
        volumes=tuple(sorted(filter(None, found.get("Volumes", ())))),
        stop_signal=found.get("StopSignal", ""),
    )
    try:
        image_user.parse(process.user)
    except InvalidArgumentError as e:
        raise InvalidArgumentError(f"{what} is invalid: {e}") from e
    return Configuration(_platform(document), tuple(document.get("rootfs", {}).get("diff_ids", ())), process)


def check_process(configuration: Configuration, what: str) -> None:
    """Raises InvalidArgumentError if the process has longer texts than a new image may have.

    :func:`parse_config` reads longer ones, as images of earlier releases may have them.
    """
    if (size := configuration.process.size) > MAX_PROCESS:
        raise InvalidArgumentError(
            f"{what}: the user, variables, command, directory, volumes and stop signal of the configuration have "
            f"{size} bytes; {MAX_PROCESS} are the most allowed"
        )


def check_layers(manifest: Manifest, configuration: Configuration, what: str) -> None:
    """Raise an error if manifest and configuration disagree, or if a layer has an unsupported type.

    Blobs that are no layers of files are allowed if the configuration has the layers of files alone. An artifact has
    no such layer.
    """
    wanted = len(configuration.diff_ids)
    if wanted and len(manifest.files) == wanted:
        return
    if len(manifest.layers) != wanted:
        raise InvalidArgumentError(f"{what} has {len(manifest.layers)} layers, and its configuration {wanted}")
    for layer in manifest.layers:
        compression(layer, what)


def compression(layer: Descriptor, what: str) -> Compression:
    """The compression of a layer by its media type. Raises UnimplementedError."""
    found = _compression(layer)
    if found is None:
        kind = shown(layer.media_type) or "no type"
        raise UnimplementedError(f"{what}: layer {layer.digest} has the type {kind}, which is no layer of files")
    return found


def _compression(layer: Descriptor) -> Compression | None:
    return _COMPRESSIONS.get(_FOREIGN.get(layer.media_type, layer.media_type))


def is_foreign(layer: Descriptor) -> bool:
    """Whether registries need not have the blob of this layer."""
    return layer.media_type in _FOREIGN


def layers_with_diff_ids(manifest: Manifest, configuration: Configuration) -> tuple[tuple[Descriptor, str], ...]:
    """What is unpacked for an image, the lowest layer first: :data:`EMPTY_LAYER` for an image without layers."""
    found = tuple(zip(manifest.files, configuration.diff_ids, strict=True))
    return found or ((EMPTY_LAYER, EMPTY_LAYER.digest),)


def chain_ids(diff_ids: Sequence[str]) -> tuple[str, ...]:
    """The chain IDs: each names a layer together with those below it (OCI image-spec, config, "Layer ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        text = f"{chain[-1]} {diff_id}" if chain else ""
        chain.append(f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" if text else diff_id)
    return tuple(chain)


def choose(index: Index, platform: Platform, what: str) -> Descriptor:
    """The manifest for ``platform``: the newest variant that it can run, and the first of equals.

    1. An entry without a platform comes after those with one. The caller checks the configuration's platform.
    2. An entry that needs features of the operating system, such as erofs, comes after all that need none.
    3. An artifact comes after all images, as it may be for a platform too.

    Raises OtherPlatformError with the platforms that there are, InvalidArgumentError if the digest of the chosen one
    is none.
    """
    best: Descriptor | None = None
    best_rank = (False, False, -1)
    for entry in index.manifests:
        if entry.media_type not in MANIFEST_TYPES + INDEX_TYPES or is_attestation(entry):
            continue
        suits = 0 if entry.platform is None else rank(entry.platform, platform)
        found = (entry.artifact_type in _CONFIGS, not entry.os_features, suits)
        if suits >= 0 and found > best_rank:
            best, best_rank = entry, found
    if best is None:
        others = sorted({str(e.platform) for e in index.manifests if e.platform and e.platform.os != "unknown"})
        raise OtherPlatformError(
            f"{what} has no image for {platform}; it has {shown(', '.join(others)) if others else 'none at all'}"
        )
    if not is_digest(best.digest):
        raise InvalidArgumentError(
            f"{what}: the manifest for {platform} has digest {shown(best.digest)!r}, which is neither sha256 nor sha512"
        )
    return best


def is_attestation(entry: Descriptor) -> bool:
    """Whether an entry of an index is a statement about another one (BuildKit), and no image."""
    return _ATTESTATION in entry.annotations


def is_for(descriptor: Descriptor, platform: Platform) -> bool:
    """Whether the index that has this entry says that it runs on ``platform``.

    What an index says comes before what the configuration says: tools that build for another architecture often leave
    their own in the configuration.
    """
    said = descriptor.platform
    return said is not None and bool(said.architecture) and rank(said, platform) >= 0


def _media_type(text: object) -> str:
    """A media type without its parameters, in lower case (RFC 9110, section 8.3.1)."""
    return str(text or "").partition(";")[0].strip().lower()


def _descriptor(entry: Mapping[str, Any]) -> Descriptor:
    return Descriptor(
        _media_type(entry.get("mediaType")),
        entry.get("digest", ""),
        int(entry.get("size", 0)),
        _platform(entry["platform"]) if "platform" in entry else None,
        entry.get("annotations", {}),
        _media_type(entry.get("artifactType")),
        tuple(entry.get("platform", {}).get("os.features", ())),
    )


def _platform(entry: Mapping[str, Any]) -> Platform:
    return normalized(entry.get("os", ""), entry.get("architecture", ""), entry.get("variant", ""))


EMPTY_LAYER = Descriptor(OCI_LAYER, f"sha256:{hashlib.sha256(EMPTY_TAR).hexdigest()}", len(EMPTY_TAR))
