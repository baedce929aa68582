"""Manifests, indexes, configurations, platforms."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from criserver.errors import InvalidArgumentError, NotFoundError, UnimplementedError
from criserver.images import platforms
from criserver.images.manifests import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_LAYER_GZIP,
    DOCKER_LAYER_ZSTD,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    EMPTY_LAYER,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    chain_ids,
    check_layers,
    check_process,
    choose,
    compression,
    is_for,
    layers_with_diff_ids,
    parse_config,
    parse_manifest,
)
from criserver.images.platforms import Platform, amd64_variant, host_platform, rank, runs_on

A, B, C = ("sha256:" + c * 64 for c in "abc")
VOLUME = ImageConfig(volumes=("/v",))
AMD64 = Platform("linux", "amd64")


def described(media_type: str, digest: str | None = A, size: object = 10, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": size, **more}


def manifest(**changes: Any) -> dict[str, Any]:
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": described(OCI_CONFIG),
        "layers": [described(OCI_LAYER_GZIP, B)],
        **changes,
    }
    return {k: v for k, v in document.items() if v is not None}


def index(*entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(entries), **changes}


def config(**changes: Any) -> dict[str, Any]:
    document = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [A]}, **changes}
    return {k: v for k, v in document.items() if v is not None}


def parse(document: Any, media_type: str = "") -> Index | Manifest:
    return parse_manifest(json.dumps(document).encode(), media_type, "manifest m")


def test_an_oci_manifest() -> None:
    expected = Manifest(Descriptor(OCI_CONFIG, A, 10), (Descriptor(OCI_LAYER_GZIP, B, 10),))
    assert parse(manifest(), OCI_MANIFEST) == expected
    assert parse(manifest(mediaType=None), OCI_MANIFEST) == expected
    assert parse(manifest(mediaType=None), "application/json") == expected


def test_a_docker_manifest() -> None:
    document = manifest(
        mediaType=DOCKER_MANIFEST, config=described(DOCKER_CONFIG), layers=[described(DOCKER_LAYER_GZIP)]
    )
    assert parse(document, DOCKER_MANIFEST) == Manifest(
        Descriptor(DOCKER_CONFIG, A, 10), (Descriptor(DOCKER_LAYER_GZIP, A, 10),)
    )


@pytest.mark.parametrize("kind", [OCI_INDEX, DOCKER_LIST])
def test_an_index(kind: str) -> None:
    platform = {"os": "linux", "architecture": "arm", "variant": "v7"}
    found = parse(index(described(OCI_MANIFEST, platform=platform), described(OCI_MANIFEST, B), mediaType=kind), kind)
    assert found == Index(
        (Descriptor(OCI_MANIFEST, A, 10, Platform("linux", "arm", "v7")), Descriptor(OCI_MANIFEST, B, 10))
    )


@pytest.mark.parametrize(
    ("document", "where"),
    [
        ([], "not a JSON object"),
        (manifest(schemaVersion=3), "$.schemaVersion"),
        (manifest(config=None), "'config' is a required property"),
        (manifest(layers=[described(OCI_LAYER)] * 501), "$.layers"),
        (manifest(layers=[{"digest": A, "size": 1}]), "$.layers[0]"),
        (manifest(layers=[described(OCI_LAYER, "sha256:abc")]), "$.layers[0].digest"),
        (manifest(layers=[described(OCI_LAYER, A + "\n")]), "$.layers[0].digest"),
        (manifest(layers=[described(OCI_LAYER, "sha512:" + "a" * 64)]), "$.layers[0].digest"),
        (manifest(layers=[described(OCI_LAYER, "sha256:" + "a" * 128)]), "$.layers[0].digest"),
        (manifest(layers=[described(OCI_LAYER, "sha384:" + "a" * 96)]), "$.layers[0].digest"),
        (manifest(layers=[described(OCI_LAYER, size=-1)]), "$.layers[0].size"),
        (manifest(layers=[described(OCI_LAYER, size="1")]), "$.layers[0].size"),
        (manifest(layers=[described(OCI_LAYER, size=2**63)]), "$.layers[0].size"),
        (manifest(manifests=[]), "at once"),
        (index(config={}), "at once"),
        (index(layers=[]), "at once"),
        (index(described(OCI_MANIFEST, platform={"os": 1})), "$.manifests[0].platform"),
        (manifest(layers=[described(OCI_LAYER), None]), "$.layers[1]"),
        (manifest(layers=[described("")], Layers=[described(OCI_LAYER)]), "both layers and Layers"),
        (manifest(MANIFESTS=[]), "at once"),
        ({**manifest(), "manife\u017ft\u017f": []}, "at once"),
        ({**manifest(config=None, layers=None), "Config": {}, "mediaType": OCI_INDEX}, "'manifests' is a required"),
        (index(*[described(OCI_MANIFEST)] * 1001), "$.manifests"),
    ],
)
def test_invalid_manifests(document: dict[str, object] | list[object], where: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse(document)
    assert str(caught.value).startswith("manifest m is ")
    assert where in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff{}", b"[" * 100_000, b'{"a": "\\ud800"}', b'{"a": ' + b"1" * 5000 + b"}", b'{"a": NaN}']
)
def test_what_is_no_json(body: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="manifest m is not valid JSON"):
        parse_manifest(body, OCI_MANIFEST, "manifest m")


@pytest.mark.parametrize("sent", [OCI_INDEX, DOCKER_LIST, f"{OCI_INDEX.upper()}; charset=utf-8"])
@pytest.mark.parametrize("own", [OCI_MANIFEST, DOCKER_MANIFEST])
def test_a_manifest_that_came_as_an_index(own: str, sent: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"came as application/vnd\."):
        parse(manifest(mediaType=own), sent)


def test_an_index_that_came_as_a_manifest() -> None:
    for own in (OCI_INDEX, DOCKER_LIST):
        with pytest.raises(InvalidArgumentError, match="came as"):
            parse(index(described(OCI_MANIFEST), mediaType=own), DOCKER_MANIFEST)
    with pytest.raises(InvalidArgumentError, match="'config' is a required property"):
        parse({"schemaVersion": 2, "manifests": []}, OCI_MANIFEST)


@pytest.mark.parametrize("sent", [OCI_MANIFEST, DOCKER_MANIFEST, "", "text/plain", f"{DOCKER_MANIFEST.upper()};a=b"])
@pytest.mark.parametrize("own", [OCI_MANIFEST, DOCKER_MANIFEST, "", OCI_MANIFEST.upper()])
def test_a_manifest_in_the_other_dialect(own: str, sent: str) -> None:
    assert isinstance(parse(manifest(mediaType=own), sent), Manifest)


@pytest.mark.parametrize("sent", [OCI_INDEX, DOCKER_LIST, "", "application/octet-stream"])
@pytest.mark.parametrize("own", [OCI_INDEX, DOCKER_LIST, "", None])
def test_an_index_in_the_other_dialect(own: str | None, sent: str) -> None:
    assert isinstance(parse(index(described(OCI_MANIFEST), mediaType=own), sent), Index)


LAYER = described(OCI_LAYER, B)


@pytest.mark.parametrize(
    "document",
    [
        {"config": described(OCI_CONFIG), "layers": [LAYER]},
        {"schemaVersion": None, "mediaType": None, "config": described(OCI_CONFIG), "layers": [LAYER]},
        {"schemaVersion": 0, "config": described(OCI_CONFIG), "layers": [LAYER], "annotations": None},
        {"SchemaVersion": 2, "CONFIG": {k.title(): v for k, v in described(OCI_CONFIG).items()}, "Layers": [LAYER]},
        {"config": described(OCI_CONFIG, platform=None, annotations=None), "layers": [{**LAYER, "annotations": None}]},
        {"config": described(OCI_CONFIG, annotations={"a": None}), "layers": [LAYER], "manifests": None},
        {"config": described(OCI_CONFIG, platform={}), "layers": [LAYER]},
    ],
)
def test_what_go_reads_as_a_manifest(document: dict[str, Any]) -> None:
    found = parse(document)
    assert isinstance(found, Manifest)
    assert (found.config.digest, found.config.media_type) == (A, OCI_CONFIG)
    assert found.layers == (Descriptor(OCI_LAYER, B, 10),)


@pytest.mark.parametrize("kind", [None, ""])
def test_a_configuration_without_a_type(kind: str | None) -> None:
    assert isinstance(parse(manifest(config={"mediaType": kind, "digest": A, "size": 1})), Manifest)
    assert isinstance(parse(manifest(config={"digest": A, "size": 1})), Manifest)


@pytest.mark.parametrize("layers", [{}, {"layers": None}, {"layers": []}])
def test_an_image_without_layers(layers: dict[str, Any]) -> None:
    found = parse({"schemaVersion": 2, "config": described(OCI_CONFIG), **layers})
    assert isinstance(found, Manifest)
    assert found.layers == ()
    for rootfs in ({}, {"rootfs": None}, {"rootfs": {"type": "layers"}}, {"rootfs": {"type": None, "diff_ids": None}}):
        configuration = parse_config(json.dumps({"os": "linux", **rootfs}).encode(), "c")
        check_layers(found, configuration, "m")
        assert layers_with_diff_ids(found, configuration) == ((EMPTY_LAYER, EMPTY_LAYER.digest),)
    with pytest.raises(InvalidArgumentError, match="m has 0 layers, and its configuration 1"):
        check_layers(found, parse_config(json.dumps(config()).encode(), "c"), "m")


def test_entries_of_an_index_as_go_reads_them() -> None:
    entries: list[Any] = [
        None,
        {},
        described(OCI_MANIFEST, "sha384:" + "a" * 96, platform={"os": "linux", "architecture": "s390x"}),
        described(OCI_MANIFEST, None, None, platform={"os": None, "architecture": "arm64"}),
        described(OCI_MANIFEST.upper(), B, platform={"os": None, "architecture": "x86_64", "variant": None}),
        described(OCI_MANIFEST, C, platform=None, annotations=None),
    ]
    found = parse({"manifests": entries, "mediaType": None}, DOCKER_LIST)
    assert isinstance(found, Index)
    assert choose(found, AMD64, "i") == Descriptor(OCI_MANIFEST, B, 10, AMD64)
    assert choose(found, Platform("linux", "riscv64"), "i").digest == C
    for other, digest in (("s390x", "sha384:a"), ("arm64", "''")):
        with pytest.raises(InvalidArgumentError, match=f"i: the manifest for linux/{other} has digest .?{digest}"):
            choose(found, Platform("linux", other), "i")


@pytest.mark.parametrize(
    ("document", "media_type", "message"),
    [
        ({"schemaVersion": 1, "fsLayers": []}, "", "build or push the image again"),
        (manifest(), "application/vnd.docker.distribution.manifest.v1+prettyjws", "schema 1"),
        (manifest(mediaType="application/vnd.example\x1b"), OCI_MANIFEST, "application/vnd.example\\x1b, which is no"),
        (manifest(config=described("application/vnd.cncf.helm.config.v1+json")), OCI_MANIFEST, "is an artifact"),
    ],
)
def test_what_is_no_image_is_refused_by_name(document: dict[str, Any], media_type: str, message: str) -> None:
    with pytest.raises(UnimplementedError) as caught:
        parse(document, media_type)
    assert message in str(caught.value)


def test_a_configuration() -> None:
    found = parse_config(
        json.dumps(
            config(
                variant="v3",
                config={
                    "User": "1000:1000",
                    "Env": ["PATH=/bin"],
                    "Entrypoint": ["/a"],
                    "Cmd": None,
                    "WorkingDir": "/w",
                    "Volumes": {"/b": {}, "/a": {}},
                    "Labels": {"x": "y"},
                    "StopSignal": "SIGINT",
                    "ExposedPorts": {"80/tcp": {}},
                },
            )
        ).encode(),
        "c",
    )
    assert found.platform == Platform("linux", "amd64", "v3")
    assert found.diff_ids == (A,)
    assert found.process == ImageConfig("1000:1000", ("PATH=/bin",), ("/a",), (), "/w", ("/a", "/b"), "SIGINT")


@pytest.mark.parametrize("process", [None, {}, {"Entrypoint": None, "Labels": None, "Volumes": None}])
def test_a_configuration_without_a_process(process: dict[str, None] | dict[str, object] | None) -> None:
    assert parse_config(json.dumps(config(config=process)).encode(), "c").process == ImageConfig()


@pytest.mark.parametrize(
    ("process", "expected"),
    [
        (dict.fromkeys(("User", "WorkingDir", "StopSignal", "Env", "Cmd", "Volumes", "ExposedPorts")), ImageConfig()),
        ({"Entrypoint": [""], "Cmd": ["/a"]}, ImageConfig(cmd=("/a",))),
        ({"Entrypoint": [None], "Cmd": ["/a"]}, ImageConfig(cmd=("/a",))),
        ({"Entrypoint": ["", "b"]}, ImageConfig(entrypoint=("", "b"))),
        ({"Entrypoint": ["/a"], "Cmd": [""]}, ImageConfig(entrypoint=("/a",), cmd=("",))),
        ({"Env": ["", None, "A=b"]}, ImageConfig(env=("", "", "A=b"))),
        ({"Labels": {"a": None, "": "b"}}, ImageConfig()),
        ({"Volumes": {"": {}, "/v": None}, "ExposedPorts": {"": {}, "80/tcp": None}}, VOLUME),
        ({"user": "1", "ENV": ["A=b"], "workingdir": "/w"}, ImageConfig("1", ("A=b",), working_dir="/w")),
        ({"Healthcheck": 1, "OnBuild": "x", "ArgsEscaped": None}, ImageConfig()),
    ],
)
def test_a_process_as_go_reads_it(process: dict[str, Any], expected: ImageConfig) -> None:
    for key in ("config", "Config"):
        body = json.dumps({**config(), key: process}).encode()
        assert parse_config(body, "c").process == expected


def test_bytes_that_are_no_utf8_are_replaced() -> None:
    body = json.dumps(config(config={"Env": ["A=XX"]})).encode().replace(b"XX", b"na\xefve")
    assert parse_config(body, "c").process.env == ("A=na\ufffdve",)


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        ({}, "linux"),
        ({"os": None, "architecture": None, "variant": None}, "linux"),
        ({"os": "", "architecture": "", "variant": ""}, "linux"),
        ({"os": "Linux", "architecture": "AMD64"}, "linux/amd64"),
        ({"architecture": "x86_64", "variant": "v2"}, "linux/amd64/v2"),
        ({"architecture": "x86-64"}, "linux/amd64"),
        ({"architecture": "aarch64", "variant": "V8"}, "linux/arm64/v8"),
        ({"architecture": "armhf"}, "linux/arm/v7"),
        ({"architecture": "armel", "variant": "v7"}, "linux/arm/v6"),
        ({"architecture": "armv6l"}, "linux/arm/v6"),
        ({"architecture": "i386"}, "linux/386"),
        ({"architecture": "i686"}, "linux/386"),
        ({"architecture": "ppc64el"}, "linux/ppc64le"),
        ({"os": "macOS", "architecture": "arm64"}, "darwin/arm64"),
        ({"OS": "linux", "Architecture": "s390x"}, "linux/s390x"),
    ],
)
def test_platforms_as_go_names_them(platform: dict[str, Any], expected: str) -> None:
    body = json.dumps({"rootfs": {"diff_ids": [A]}, **platform}).encode()
    assert str(parse_config(body, "c").platform) == expected


@pytest.mark.parametrize(
    ("document", "where"),
    [
        (config(os=1), "$.os"),
        (config(rootfs={"type": "tree", "diff_ids": [A]}), "$.rootfs.type"),
        (config(rootfs={"type": "layers", "diff_ids": [None]}), "$.rootfs.diff_ids[0]"),
        (config(config={"User": "a", "user": "b"}), "both User and user"),
        (config(config={"User": "a", "u\u017fer": "0"}), "both User and"),
        (config(config={"User": "4294967296"}), "is no ID"),
        (config(rootfs={"type": "layers", "diff_ids": ["x"]}), "$.rootfs.diff_ids[0]"),
        (config(config={"Cmd": "sh"}), "$.config.Cmd"),
        (config(config={"Cmd": [1]}), "$.config.Cmd[0]"),
        (config(config={"Env": ["A=\0"]}), "$.config.Env[0]"),
        (config(config={"User": "a\0"}), "$.config.User"),
        (config(config={"Labels": {"a": 1}}), "$.config.Labels.a"),
        (config(config={"Volumes": {"/a\0": {}}}), "$.config.Volumes"),
        (config(config=[]), "$.config"),
        (config(config={"Env": ["A=b"] * 4097}), "$.config.Env"),
        (config(config={"Labels": {str(n): "" for n in range(4097)}}), "$.config.Labels"),
    ],
)
def test_invalid_configurations(document: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_config(json.dumps(document).encode(), "configuration c")
    assert str(caught.value).startswith("configuration c is invalid: ")
    assert where in str(caught.value)


@pytest.mark.parametrize(
    "process", [{"Env": ["a"] * 1_500_000}, {"Labels": {str(n): "" for n in range(500_000)}}], ids=["env", "labels"]
)
def test_millions_of_items_do_not_hold_up_the_daemon(process: dict[str, dict[str, str] | list[str]]) -> None:
    body = json.dumps(config(config=process)).encode()
    start = time.process_time()
    with pytest.raises(InvalidArgumentError):
        parse_config(body, "c")
    assert time.process_time() - start < 10  # 27 s where each item is validated


@pytest.mark.parametrize(
    "process",
    [
        {"Env": ["A=" + "x" * (64 << 10)] * 4},
        {"Entrypoint": ["x" * (128 << 10)], "Cmd": ["ж" * (64 << 10), "y"]},
        {"Volumes": {f"/{n}/{'v' * 100}": {} for n in range(3000)}},
        {"User": "u" * 200, "WorkingDir": "/" * (200 << 10), "StopSignal": "S" * (60 << 10)},
    ],
    ids=["variables", "command", "volumes", "texts"],
)
def test_the_texts_of_a_process_have_a_limit(process: dict[str, Any]) -> None:
    found = parse_config(json.dumps(config(config=process)).encode(), "c")  # of an image that is here already
    with pytest.raises(InvalidArgumentError, match=rf"^m: .* have {found.process.size} bytes; 262144 are the most"):
        check_process(found, "m")


def test_labels_and_ports_do_not_count_as_texts_of_a_process() -> None:
    process = {"Labels": {"a": "x" * (1 << 20)}, "ExposedPorts": {"y" * (1 << 20): {}}, "Env": ["x" * (256 << 10)]}
    found = parse_config(json.dumps(config(config=process)).encode(), "c")
    assert found.process.size == 256 << 10
    check_process(found, "m")


@pytest.mark.parametrize(
    "body",
    [
        b'{"rootfs": {"diff_ids": []}, "config": {"User": "1000"}, "config": {"Env": []}}',
        b'{"rootfs": {"diff_ids": []}, "config": {"User": "1000", "User": null}}',
    ],
)
def test_a_name_that_go_and_python_read_differently(body: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match=r"an object has .* twice"):
        parse_config(body, "c")


def test_manifest_and_configuration_must_agree() -> None:
    found = parse_config(json.dumps(config()).encode(), "c")
    layer = Descriptor(OCI_LAYER, A, 1)
    check_layers(Manifest(layer, (layer,)), found, "m")
    with pytest.raises(InvalidArgumentError, match="m has 2 layers, and its configuration 1"):
        check_layers(Manifest(layer, (layer, layer)), found, "m")


@pytest.mark.parametrize(
    ("media_type", "expected"),
    [
        (OCI_LAYER, "gzip"),
        (OCI_LAYER_GZIP, "gzip"),
        (OCI_LAYER_ZSTD, "zstd"),
        (DOCKER_LAYER, "gzip"),  # or none: the unpacker looks
        (DOCKER_LAYER_GZIP, "gzip"),
        (DOCKER_LAYER_ZSTD, "zstd"),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar", "gzip"),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "gzip"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar", "gzip"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "gzip"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", "zstd"),
    ],
)
def test_compressions(media_type: str, expected: str) -> None:
    assert compression(Descriptor(media_type, A, 1), "m") == expected


@pytest.mark.parametrize(
    ("media_type", "message"),
    [
        ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "no layer of files"),
        ("application/vnd.in-toto+json", "no layer of files"),
        ("", "has the type no type, which"),
    ],
)
def test_layers_that_are_refused(media_type: str, message: str) -> None:
    with pytest.raises(UnimplementedError, match=message):
        compression(Descriptor(media_type, A, 1), "m")


def test_blobs_beside_the_layers_of_files() -> None:
    """The configuration says how many layers there are. An artifact has no layer of files."""
    layers = [described("application/vnd.example", A), described(OCI_LAYER, B), described("", C)]
    found = parse(manifest(layers=layers))
    assert isinstance(found, Manifest)
    one = parse_config(json.dumps(config()).encode(), "c")
    check_layers(found, one, "m")
    assert [(layer.digest, diff_id) for layer, diff_id in layers_with_diff_ids(found, one)] == [(B, A)]
    assert [blob.digest for blob in found.others] == [A, C]
    artifact = parse(manifest(layers=layers[:1]))
    assert isinstance(artifact, Manifest)
    for diff_ids, words in (([], "has 1 layers, and its configuration 0"), ([A], "no layer of files")):
        configuration = parse_config(json.dumps(config(rootfs={"diff_ids": diff_ids})).encode(), "c")
        with pytest.raises((InvalidArgumentError, UnimplementedError), match=words):
            check_layers(artifact, configuration, "m")


def test_chain_ids() -> None:
    # By hand: printf '%s' "$A $B" | sha256sum, and the same with that and $C.
    ab = "sha256:ccd722928bd92476ba1745586fed6e45a102504185ad88cd89e01ff116fd146c"
    abc = "sha256:c1377126441fb2f5ec2c21ae2a60255331d639e830f0ee1b40a36e52d4c40588"
    assert chain_ids((A, B, C)) == (A, ab, abc)
    assert chain_ids((A,)) == (A,)
    assert chain_ids(()) == ()


def entry(platform: str, digest: str = A, media_type: str = OCI_MANIFEST, **annotations: str) -> Descriptor:
    parts = [*platform.split("/"), "", ""][:3]
    return Descriptor(media_type, digest, 1, Platform(*parts) if platform else None, annotations)


@pytest.mark.parametrize(
    ("offered", "host", "chosen"),
    [
        (["linux/arm64", "linux/amd64"], "linux/amd64", 1),
        (["linux/amd64", "linux/amd64"], "linux/amd64", 0),
        (["linux/amd64/v3", "linux/amd64"], "linux/amd64", 1),
        (["linux/amd64", "linux/amd64/v2", "linux/amd64/v3"], "linux/amd64/v2", 1),
        (["linux/arm/v5", "linux/arm/v6", "linux/arm/v7"], "linux/arm/v7", 2),
        (["linux/arm/v5", "linux/arm/v6", "linux/arm/v7"], "linux/arm/v6", 1),
        (["linux/arm64"], "linux/arm64/v8", 0),
        (["linux/arm64/v8"], "linux/arm64", 0),
        (["windows/amd64", "linux/amd64"], "linux/amd64", 1),
        (["", "linux/amd64"], "linux/amd64", 1),
        (["linux/arm64", ""], "linux/amd64", 1),
        (["linux/arm64/strange", "linux/arm64"], "linux/arm64", 1),
        (["linux/amd64", "linux/amd64/v4", "linux/amd64/v3", "linux/amd64/v2"], "linux/amd64/v3", 2),
        (["linux/amd64/v4", "linux/amd64/v3"], "linux/amd64/v4", 0),
        (["linux/arm/v8", "linux/arm/v7"], "linux/arm/v8", 0),
        (["linux/386", "linux/amd64"], "linux/amd64/v2", 1),
        (["linux/s390x", "linux/386"], "linux/amd64", 1),
        (["linux/arm/v6", "linux/arm/v7"], "linux/arm64", 1),
        (["linux/arm", "linux/arm/v6"], "linux/arm/v7", 0),
        (["linux/amd64/v9", "linux/386"], "linux/amd64", 0),
        (["linux/amd64/v8", "linux/amd64/v1"], "linux/amd64/v3", 1),
        (["linux/amd64/sse4", "linux"], "linux/amd64", 0),
        (["linux", "windows/amd64"], "linux/amd64", 0),
        (["linux/arm64/v9", "linux/arm64/v8.1", "linux/arm64/8"], "linux/arm64", 2),
        (["linux/arm64/v8", "linux/arm64/v8.5", "linux/arm64/v8.6"], "linux/arm64/v9", 1),
        (["linux/arm64/v8", "linux/arm64/v9", "linux/arm64/v9.1"], "linux/arm64/v9.0", 1),
        (["linux/ppc64le/power8", "linux/ppc64le"], "linux/ppc64le", 1),
        (["linux/s390x", "linux/ppc64le/power9"], "linux/ppc64le", 1),
    ],
)
def test_choosing_by_platform(offered: list[str], host: str, chosen: int) -> None:
    index = Index(tuple(entry(platform, f"sha256:{number:064}") for number, platform in enumerate(offered)))
    assert choose(index, Platform(*host.split("/")), "i") == index.manifests[chosen]


def test_choosing_passes_over_attestations_and_other_types() -> None:
    index = Index(
        (
            Descriptor(OCI_MANIFEST, A, 1, None, {"vnd.docker.reference.type": "attestation-manifest"}),
            entry("linux/amd64", B, "application/vnd.example"),
            entry("linux/amd64", C),
        )
    )
    assert choose(index, AMD64, "i").digest == C


def test_choosing_takes_an_image_before_an_artifact() -> None:
    """As of an index that a client of artifacts has added an SBOM to, with a platform or without."""
    platform = {"os": "linux", "architecture": "amd64"}
    sbom = described(OCI_MANIFEST, platform=platform, artifactType="application/spdx+json")
    for image in (described(OCI_MANIFEST, B), described(OCI_MANIFEST, B, artifactType=OCI_CONFIG)):
        found = parse(index(sbom, image))
        assert isinstance(found, Index)
        assert choose(found, AMD64, "i").digest == B
    alone = parse(index(sbom, described(OCI_MANIFEST, B, platform={"os": "linux", "architecture": "s390x"})))
    assert isinstance(alone, Index)
    assert choose(alone, AMD64, "i").digest == A, "its manifest says what it is"


@pytest.mark.parametrize("variant", ["", "v1"])
def test_choosing_takes_an_image_that_needs_no_features_of_the_system(variant: str) -> None:
    """As of an index with a second image for the same platform, whose layers are EROFS file systems."""
    platform = {"os": "linux", "architecture": "amd64", "variant": variant}
    erofs = described(OCI_MANIFEST, platform={**platform, "os.features": ["erofs"]})
    for plain in (platform, {"os": "linux", "architecture": "amd64", "os.features": []}):
        found = parse(index(erofs, described(OCI_MANIFEST, B, platform=plain)))
        assert isinstance(found, Index)
        assert choose(found, AMD64, "i").digest == B
    alone = parse(index(erofs))
    assert isinstance(alone, Index)
    assert choose(alone, AMD64, "i").digest == A


def test_choosing_where_nothing_fits() -> None:
    index = Index((entry("linux/arm64/v8"), entry("linux/s390x"), entry("unknown/unknown")))
    with pytest.raises(NotFoundError, match=r"i has no image for linux/amd64; it has linux/arm64/v8, linux/s390x$"):
        choose(index, AMD64, "i")
    with pytest.raises(NotFoundError, match="it has none at all"):
        choose(Index(()), AMD64, "i")


def test_what_an_index_says_comes_before_the_configuration() -> None:
    assert is_for(entry("linux/amd64"), AMD64)
    assert not is_for(entry("linux/arm64"), AMD64)
    assert not is_for(entry("linux"), AMD64), "it says nothing of the architecture"
    assert not is_for(entry(""), AMD64)


def test_what_runs_where() -> None:
    assert runs_on(host_platform(), host_platform())
    assert runs_on(Platform("linux", "arm", "v6"), Platform("linux", "arm"))
    assert not runs_on(Platform("linux", "arm", "v8"), Platform("linux", "arm"))
    assert not runs_on(Platform("windows", "amd64"), AMD64)
    assert not runs_on(Platform("linux", "amd64", "v2"), AMD64)
    assert not runs_on(Platform("linux", "arm64"), Platform("linux", "arm", "v8"))
    assert runs_on(Platform("linux", "386"), AMD64)
    assert rank(Platform("linux", "386"), AMD64) < rank(AMD64, AMD64)


V2 = "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3"
V3 = f"{V2} abm avx avx2 bmi1 bmi2 f16c fma movbe xsave"
V4 = f"{V3} avx512bw avx512cd avx512dq avx512f avx512vl"


@pytest.mark.parametrize(
    ("flags", "variant"),
    [
        ("", ""),
        ("sse2", ""),
        (V2, "v2"),
        (V2.replace("popcnt", ""), ""),
        (V3, "v3"),
        (V3.replace("movbe", "") + " avx512f", "v2"),
        (V4, "v4"),
        (V4.replace("ssse3", ""), ""),
    ],
)
def test_levels_of_amd64(flags: str, variant: str) -> None:
    cpuinfo = f"processor\t: 0\nflags\t\t: fpu {flags} sse2\nvmx flags\t: ept\n\nprocessor\t: 1\nflags\t\t: {V4}\n"
    assert amd64_variant(cpuinfo) == variant


def test_the_name_of_a_processor_may_be_in_any_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_bytes(b"model name\t: \xe9\nflags\t\t: fpu sse2\n")
    monkeypatch.setattr(platforms, "_CPU_INFO", str(tmp_path / "cpuinfo"))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert host_platform() == Platform("linux", "amd64", "")


@pytest.mark.parametrize("config_type", ["application/octet-stream", "application/json", "text/html", ""])
def test_configurations_that_old_tools_gave_another_type(config_type: str) -> None:
    assert isinstance(parse(manifest(config=described(config_type))), Manifest)


@pytest.mark.parametrize(
    "config_type",
    ["application/vnd.oci.empty.v1+json", "application/vnd.cncf.helm.config.v1+json", "application/vnd.unknown"],
)
def test_artifacts_are_refused_by_their_type(config_type: str) -> None:
    with pytest.raises(UnimplementedError, match=f"is an artifact with a .* of type {re.escape(config_type)}"):
        parse(manifest(config=described(config_type)))
