"""Image manifests, indexes and configurations: from untrusted bytes to checked values.

Pure functions after the OCI image-spec and Docker's schema 2. Known formats that are not supported (schema 1,
artifacts, foreign layers) are refused by name, with advice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

import jsonschema
import referencing

from criserver.errors import InvalidArgumentError, NotFoundError, UnimplementedError
from criserver.images import image_user
from criserver.images.platforms import Platform, rank
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

Compression = Literal["gzip", "none", "zstd"]

_COMPRESSIONS: dict[str, Compression] = {
    OCI_LAYER: "none",
    OCI_LAYER_GZIP: "gzip",
    OCI_LAYER_ZSTD: "zstd",
    DOCKER_LAYER: "gzip",  # or none: this type says nothing about it, and the unpacker looks at the first bytes
    DOCKER_LAYER_GZIP: "gzip",
    DOCKER_LAYER_ZSTD: "zstd",
}
# After the two proper types come those that old registries and builders gave to configurations of images.
_CONFIGS = (OCI_CONFIG, DOCKER_CONFIG, "application/octet-stream", "application/json", "text/html", "")
_FOREIGN = (
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
)
_SCHEMA_1 = (
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
)
_ATTESTATION = "vnd.docker.reference.type"


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A blob by type, digest and size in bytes; ``platform`` is only in the entries of an index."""

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Index:
    """Manifests to choose from."""

    manifests: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The configuration and the layers of one image, the lowest layer first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The process that an image describes; fields that the image leaves out are empty."""

    user: str = ""
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    volumes: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    stop_signal: str = ""
    exposed_ports: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Configuration:
    """An image configuration: the platform, the digests of the uncompressed layers, and the process."""

    platform: Platform
    diff_ids: tuple[str, ...]
    process: ImageConfig


def parse_manifest(body: bytes, media_type: str, what: str) -> Index | Manifest:
    """The index or manifest in ``body``, which was sent with the type ``media_type``, "" for none.

    ``what`` names it in errors. Raises InvalidArgumentError, and UnimplementedError for schema 1 and for types that are
    not an image's.
    """
    document = _document(body, what)
    own_type = document.get("mediaType")
    types = [t for t in (own_type, media_type) if t in MANIFEST_TYPES + INDEX_TYPES]
    if document.get("schemaVersion") == 1 or own_type in _SCHEMA_1 or media_type in _SCHEMA_1:
        raise UnimplementedError(
            f"{what} has Docker's schema 1, which is obsolete; build or push the image again with a current tool"
        )
    if own_type and own_type not in types:
        raise UnimplementedError(f"{what} has the type {shown(own_type)}, which is no container image")
    if len(set(types)) > 1:
        raise InvalidArgumentError(f"{what} came as {media_type} and says that it is {shown(own_type)}")
    if "manifests" in document and ("layers" in document or "config" in document):
        # Two clients could take such a document for two different images (OCI distribution-spec, CVE-2021-41190).
        raise InvalidArgumentError(f"{what} is an index and a manifest at once")
    if types[0] in INDEX_TYPES if types else "manifests" in document:
        _validate(document, "index.json", what)
        return Index(tuple(_descriptor(d) for d in document["manifests"]))
    _validate(document, "manifest.json", what)
    manifest = Manifest(_descriptor(document["config"]), tuple(_descriptor(layer) for layer in document["layers"]))
    if manifest.config.media_type not in _CONFIGS:
        raise UnimplementedError(
            f"{what} is an artifact with a configuration of type {shown(manifest.config.media_type)}, not a "
            "container image"
        )
    return manifest


def parse_config(body: bytes, what: str) -> Configuration:
    """The image configuration in ``body``; ``what`` names it in errors. Raises InvalidArgumentError."""
    document = _document(body, what)
    _validate(document, "config.json", what)
    found = document.get("config") or {}
    process = ImageConfig(
        user=found.get("User", ""),
        env=tuple(found.get("Env") or ()),
        entrypoint=tuple(found.get("Entrypoint") or ()),
        cmd=tuple(found.get("Cmd") or ()),
        working_dir=found.get("WorkingDir", ""),
        volumes=tuple(sorted(found.get("Volumes") or ())),
        labels=found.get("Labels") or {},
        stop_signal=found.get("StopSignal", ""),
        exposed_ports=tuple(sorted(found.get("ExposedPorts") or ())),
    )
    try:
        image_user.parse(process.user)
    except InvalidArgumentError as e:
        raise InvalidArgumentError(f"{what} is invalid: {e}") from e
    platform = Platform(document["os"], document["architecture"], document.get("variant", ""))
    return Configuration(platform, tuple(document["rootfs"]["diff_ids"]), process)


def check_layers(manifest: Manifest, configuration: Configuration, what: str) -> None:
    """Raise an error if manifest and configuration disagree, or if a layer has an unsupported type."""
    if len(manifest.layers) != len(configuration.diff_ids):
        raise InvalidArgumentError(
            f"{what} has {len(manifest.layers)} layers, and its configuration {len(configuration.diff_ids)}"
        )
    for layer in manifest.layers:
        compression(layer, what)


def compression(layer: Descriptor, what: str) -> Compression:
    """The compression of a layer by its media type. Raises UnimplementedError."""
    found = _COMPRESSIONS.get(layer.media_type)
    if found is not None:
        return found
    if layer.media_type.startswith(_FOREIGN):
        reason = "is foreign: it is not distributed with the image; build the image again on a base without one"
    else:
        reason = f"has the type {shown(layer.media_type)}, which is no layer of files"
    raise UnimplementedError(f"{what}: layer {layer.digest} {reason}")


def chain_ids(diff_ids: Sequence[str]) -> tuple[str, ...]:
    """The chain IDs: each names a layer together with those below it (OCI image-spec, config, "Layer ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        text = f"{chain[-1]} {diff_id}" if chain else ""
        chain.append(f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" if text else diff_id)
    return tuple(chain)


def choose(index: Index, platform: Platform, what: str) -> Descriptor:
    """The manifest for ``platform``: the newest variant that it can run, and the first of equals.

    An entry without a platform comes after those with one; its caller checks the configuration's platform. Raises
    NotFoundError with the platforms that there are.
    """
    best: Descriptor | None = None
    best_rank = -1
    for entry in index.manifests:
        if entry.media_type not in MANIFEST_TYPES + INDEX_TYPES or _ATTESTATION in entry.annotations:
            continue
        found = 0 if entry.platform is None else rank(entry.platform, platform)
        if found > best_rank:
            best, best_rank = entry, found
    if best is None:
        others = sorted({str(e.platform) for e in index.manifests if e.platform and e.platform.os != "unknown"})
        raise NotFoundError(
            f"{what} has no image for {platform}; it has {shown(', '.join(others)) if others else 'none at all'}"
        )
    return best


def _document(body: bytes, what: str) -> dict[str, Any]:
    try:
        document = json.loads(body)
        if b"\\u" in body:
            # An escaped lone surrogate is valid JSON, but no valid text for gRPC.
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:  # JSONDecodeError and UnicodeError are ValueErrors
        raise InvalidArgumentError(f"{what} is not valid JSON: {shown(e)}") from e
    if not isinstance(document, dict):
        raise InvalidArgumentError(f"{what} is not a JSON object")
    return document


def _descriptor(found: Mapping[str, Any]) -> Descriptor:
    platform = found.get("platform")
    return Descriptor(
        found["mediaType"],
        found["digest"],
        int(found["size"]),
        Platform(platform["os"], platform["architecture"], platform.get("variant", "")) if platform else None,
        found.get("annotations") or {},
    )


def _load_validators() -> dict[str, jsonschema.Draft202012Validator]:
    schemas = {}
    for name in ("descriptor.json", "index.json", "manifest.json", "config.json"):
        text = resources.files(__package__).joinpath("schema", name).read_text()
        schemas[name] = json.loads(text)
    registry: referencing.Registry[Any] = referencing.Registry().with_resources(
        [(name, referencing.Resource.from_contents(schema)) for name, schema in schemas.items()]
    )
    return {name: jsonschema.Draft202012Validator(schema, registry=registry) for name, schema in schemas.items()}


_VALIDATORS = _load_validators()


def _validate(document: Mapping[str, Any], schema: str, what: str) -> None:
    # Validation ends at the first error, and every schema bounds the number of items before it looks at them. So a
    # document with millions of items takes no time.
    error = next(_VALIDATORS[schema].iter_errors(document), None)
    if error is not None:
        raise InvalidArgumentError(f"{what} is invalid: {error.json_path}: {shown(error.message)}")
