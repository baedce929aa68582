"""Configurations, platforms and media types of images, as builders and registries write them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from criserver.images import Platform, host_platform
from criserver.images.manifests import (
    DOCKER_LAYER_GZIP,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
)
from tests.support.field import REFUSED, Field, FieldCase
from tests.support.imagebuilder import BuiltImage, add_blob, build_image, build_index, busybox_image

NOWHERE = ["http://127.0.0.1:1/"]
NONDISTRIBUTABLE = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
SBOM = "application/spdx+json"
FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
HERE = {"os": "linux", "architecture": host_platform().architecture}
OTHER = Platform("linux", "s390x")


def rebuilt(built: BuiltImage, config: dict[str, Any], manifest: dict[str, Any] | None = None) -> BuiltImage:
    """The image with other fields in its configuration and its manifest; None in ``config`` is null, ... no field."""
    blobs = {digest: blob for digest, blob in built.blobs.items() if digest not in (built.digest, built.id)}
    document = {**json.loads(built.blobs[built.id]), **config}
    document = {key: value for key, value in document.items() if value is not ...}
    described = add_blob(blobs, built.manifest["config"]["mediaType"], json.dumps(document).encode())
    body = {**built.manifest, "config": described, **(manifest or {})}
    body = {key: value for key, value in body.items() if value is not ...}
    top = add_blob(blobs, OCI_MANIFEST, json.dumps(body).encode())
    return replace(built, blobs=blobs, descriptor={**built.descriptor, **top})


def process(**config: Any) -> BuiltImage:
    """busybox with these fields in its process configuration."""
    return busybox_image(config=config)


def indexed(built: BuiltImage, platform: Any) -> BuiltImage:
    return build_index([replace(built, descriptor={**built.descriptor, "platform": platform})])


def in_configuration(**fields: Any) -> Any:
    return lambda field: field.runs(rebuilt(busybox_image(), fields))


def as_type(kind: str, *, index: bool = False) -> Any:
    """A pull of a manifest or index that the registry sends with another media type."""

    def pull(field: Field) -> str:
        built = build_image([{"a": b"1"}])
        field.registry.answers["1"] = lambda handler: handler.serve(kind=kind)
        field.pull(build_index([built]) if index else built)
        return "pulled"

    return pull


def retyped(kind: str, **more: Any) -> Any:
    """A container of an image whose lowest layer has another media type in the manifest."""

    def run(field: Field) -> str:
        built = busybox_image(layers=[{"a": b"1"}])
        base, *others = built.manifest["layers"]
        return field.runs(rebuilt(built, {}, {"layers": [{**base, "mediaType": kind, **more}, *others]}))

    return run


def plain_by_its_type(field: Field) -> str:
    """A layer that no other case has, compressed, and called a plain tar file."""
    built = build_image([{"plain": field.name.encode()}])
    (layer,) = built.manifest["layers"]
    field.pull(rebuilt(built, {}, {"layers": [{**layer, "mediaType": OCI_LAYER}]}))
    return "pulled"


def beside_the_layers(field: Field) -> str:
    """A manifest that has another blob among its layers."""
    built = busybox_image()
    blobs = dict(built.blobs)
    other = add_blob(blobs, "application/vnd.example", b"{}")
    image = rebuilt(replace(built, blobs=blobs), {}, {"layers": [*built.manifest["layers"], other]})
    return field.runs(image)


def with_an_sbom(field: Field) -> str:
    """An index that has an artifact for this platform before its image."""
    built = busybox_image()
    blobs = dict(built.blobs)
    config = add_blob(blobs, "application/vnd.oci.empty.v1+json", b"{}")
    body = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": SBOM, "config": config, "layers": []}
    artifact = {**add_blob(blobs, OCI_MANIFEST, json.dumps(body).encode()), "artifactType": SBOM, "platform": HERE}
    image = {**built.descriptor, "platform": HERE}
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [artifact, image]}
    top = add_blob(blobs, OCI_INDEX, json.dumps(document).encode())
    return field.runs(replace(built, blobs=blobs, descriptor=top))


def without_layers(field: Field) -> str:
    image = field.pull(build_image([], {"Labels": {"a": "b"}}))
    field.node.create(field.node.run_pod(field.name), "c", ["/none"], image=image)
    return "created"


def no_command(field: Field) -> str:
    printed = field.run(field.pull(process(Entrypoint=[""], Cmd=["echo", "ran"])))
    return "runs" if printed == "ran" else printed


def empty_variable(field: Field) -> str:
    return field.runs(process(Env=["PATH=/bin", ""]))


def nulls(field: Field) -> str:
    empty = {
        "User": None,
        "WorkingDir": None,
        "StopSignal": None,
        "Labels": {"a": None},
        "Volumes": None,
        "Env": ["PATH=/bin", None],
    }
    return field.runs(process(**empty))


def null_platform(field: Field) -> str:
    return field.runs(indexed(busybox_image(), None))


def untyped(field: Field) -> str:
    built = busybox_image()
    rootfs = {"diff_ids": json.loads(built.blobs[built.id])["rootfs"]["diff_ids"]}
    return field.runs(rebuilt(built, {"rootfs": rootfs}, {"schemaVersion": ...}))


def cross_built(field: Field) -> str:
    return field.runs(indexed(rebuilt(busybox_image(), {"architecture": "s390x"}), HERE))


def other_platform(field: Field) -> str:
    return field.runs(rebuilt(busybox_image(), {"architecture": OTHER.architecture}))


def other_names(field: Field) -> str:
    names = {"amd64": "x86_64", "arm64": "aarch64"}
    name = names.get(HERE["architecture"], HERE["architecture"])
    return field.runs(indexed(rebuilt(busybox_image(), {"architecture": name, "os": "Linux"}), HERE))


CASES = (
    FieldCase(
        1, 'An image with `Entrypoint: [""]` and a `Cmd`', no_command, "runs", "runs", "containerd/containerd#7229"
    ),
    FieldCase(1, "An empty line in the `Env` of an image", empty_variable, "runs", "runs"),
    FieldCase(
        1,
        "`null` for `User`, `WorkingDir`, `StopSignal`, `Volumes`, a label and a line of `Env`",
        nulls,
        "runs",
        "runs",
    ),
    FieldCase(1, "`null` for `variant`", in_configuration(variant=None), "runs", "runs"),
    FieldCase(1, "`null` for the platform in an index", null_platform, "runs", "runs"),
    FieldCase(1, "`rootfs` without `type`, manifest without `schemaVersion`", untyped, "runs", "runs"),
    FieldCase(
        2,
        "The index has the right platform and the configuration another",
        cross_built,
        "runs",
        "runs",
        "containerd/containerd#2312, Azure/AgentBaker#8815, docker/for-linux#1170",
    ),
    FieldCase(
        2, "Configuration without `os` and `architecture`", in_configuration(os=..., architecture=...), "runs", "runs"
    ),
    FieldCase(
        2, "Configuration with empty `os` and `architecture`", in_configuration(os="", architecture=""), "runs", "runs"
    ),
    FieldCase(2, "`x86_64` and `Linux` in the configuration", other_names, "runs", "runs"),
    FieldCase(2, "A variant that the architecture does not have", in_configuration(variant="sse4"), "runs", "runs"),
    FieldCase(
        2,
        "A single image of another platform",
        other_platform,
        REFUSED,
        "runs",
        "moby/moby#46765",
        differs="An image for another platform that no index names",
    ),
    FieldCase(
        3,
        "An OCI manifest sent with Docker's media type",
        as_type(DOCKER_MANIFEST),
        "pulled",
        "pulled",
        "goharbor/harbor#15837",
    ),
    FieldCase(
        3,
        "An OCI index sent with Docker's media type",
        as_type(DOCKER_LIST, index=True),
        "pulled",
        "pulled",
        "goharbor/harbor#15837, goharbor/harbor#18170",
    ),
    FieldCase(
        3,
        "A manifest sent as `application/json`",
        as_type("application/json"),
        "pulled",
        REFUSED,
        "containerd/cri#787",
    ),
    FieldCase(3, "A manifest sent as an index", as_type(OCI_INDEX), REFUSED, REFUSED),
    FieldCase(
        3,
        "A foreign layer whose blob the registry has",
        retyped(FOREIGN, urls=NOWHERE),
        "runs",
        "runs",
        "containerd/containerd#7676",
    ),
    FieldCase(3, "A nondistributable layer whose blob the registry has", retyped(NONDISTRIBUTABLE), "runs", "runs"),
    FieldCase(3, "A layer with Docker's media type in an OCI manifest", retyped(DOCKER_LAYER_GZIP), "runs", "runs"),
    FieldCase(
        3,
        "A compressed layer whose media type says that it is not compressed",
        plain_by_its_type,
        "pulled",
        REFUSED,
        "podman-container-tools/buildah#1589, containerd/containerd#3326, containerd/containerd#9981",
    ),
    FieldCase(3, "A blob that is no layer of files, beside the layers", beside_the_layers, "runs", "runs"),
    FieldCase(
        3,
        "An index with an SBOM for this platform before the image",
        with_an_sbom,
        "runs",
        REFUSED,
        "bazel-contrib/rules_img#742",
    ),
    FieldCase(3, "An image without layers: pull and create", without_layers, "created", "created"),
)
