"""Registries, mirrors and the HTTP that they speak."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from criserver.images import Platform
from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.field import REFUSED, Field, FieldCase, FieldHandler
from tests.support.imagebuilder import build_image

IMAGE = build_image([{"a": b"1" * 5000}])


def mirror(answer: Callable[[FieldHandler], None]) -> Callable[[Field], str]:
    """A pull from a registry whose mirror answers a tag with this."""

    def pull(field: Field) -> str:
        name, domain = field.name, f"{field.name}.example"
        field.registry.images[name] = IMAGE
        text = f'server = "http://{field.registry.address}"\n[host."http://{field.other.address}"]\n'
        field.hosts(domain, text + 'capabilities = ["pull", "resolve"]\n')
        field.other.answers["1"] = answer
        image = field.pull_name(f"{domain}/{name}:1")
        found = field.node.client.ImageStatus(image=cri.ImageSpec(image=image)).image
        return "pulled from the next host" if found.id == IMAGE.id else "took the mirror's image"

    return pull


def mirror_alone(field: Field) -> str:
    """No host has a manifest: the error must name the mirror."""
    name, domain = field.name, f"{field.name}.example"
    text = f'server = "http://{field.registry.address}"\n[host."http://{field.other.address}"]\n'
    field.hosts(domain, text)
    field.other.answers["1"] = PAGE
    try:
        field.pull_name(f"{domain}/{name}:1")
    except grpc.RpcError as error:
        named = field.other.address in (error.details() or "")
        return "refused, and the mirror is named" if named else "refused, and the mirror is not named"
    return "pulled"


def no_http(field: Field) -> str:
    """An answer that is no HTTP: the error must not say that the registry has refused."""

    def garbage(handler: FieldHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nno header\r\n\r\n")

    field.registry.answers["1"] = garbage
    try:
        field.pull(IMAGE)
    except grpc.RpcError as error:
        field.said = error.details() or ""
        blamed = any(word in field.said for word in ("cannot read the HTTP response", "malformed"))
        return "refused, and the answer is blamed" if blamed else "refused, for another reason"
    return "pulled"


def reasoned(body: bytes, kind: str) -> Callable[[Field], str]:
    """A pull that the registry refuses with this reason."""

    def pull(field: Field) -> str:
        field.registry.answers["1"] = lambda handler: handler.answer(429, body, [("Content-Type", kind), LATER])
        try:
            field.pull(IMAGE)
        except grpc.RpcError as error:
            field.said = error.details() or ""
            return "refused, with the reason" if "100 pulls a day" in field.said else "refused, without the reason"
        return "pulled"

    return pull


def foreign_platform(handler: FieldHandler) -> None:
    other = build_image([{"a": b"2"}], platform=Platform("linux", "s390x"))
    handler.server.images[handler.path.split("/")[2]] = other
    handler.serve()


def text(body: bytes, kind: str) -> Callable[[FieldHandler], None]:
    return lambda handler: handler.answer(200, body, [("Content-Type", kind)])


def answers(status: int = 200, *headers: tuple[str, str]) -> Callable[[Field], str]:
    """A pull of a manifest that is answered with this status and these headers."""

    def pull(field: Field) -> str:
        field.registry.answers["1"] = lambda handler: handler.serve(status, more=headers)
        field.pull(IMAGE)
        return "pulled"

    return pull


def of_layer(answer: Callable[[FieldHandler, bytes], None]) -> Callable[[Field], str]:
    """A pull of a layer that is answered like this. No other case has this layer, so it is downloaded."""

    def pull(field: Field) -> str:
        image = build_image([{"a": field.name.encode() * 500}])
        layer = image.manifest["layers"][0]["digest"]
        field.registry.answers[layer] = lambda handler: answer(handler, image.blobs[layer])
        field.pull(image)
        return "pulled"

    return pull


def partial(handler: FieldHandler, layer: bytes) -> None:
    handler.serve(206, more=[("Content-Range", f"bytes 0-{len(layer) - 1}/{len(layer)}")])


def repeated_length(handler: FieldHandler, layer: bytes) -> None:
    handler.serve(more=[("Content-Length", str(len(layer)))] * 2)


def length_and_chunks(handler: FieldHandler, layer: bytes) -> None:
    handler.serve(more=[("Content-Length", str(len(layer))), ("Transfer-Encoding", "chunked")])


def redirects(handler: FieldHandler, _: bytes) -> None:
    """A blob behind ten redirects."""
    number = int(handler.path.partition("?hop=")[2] or 0)
    if number == 10:
        handler.serve()
    else:
        path = handler.path.partition("?")[0]
        handler.answer(307, b"", [("Location", f"{path}?hop={number + 1}")])


def with_a_space(handler: FieldHandler, layer: bytes) -> None:
    """A redirect to a place that is no URL."""
    handler.server.answers["data"] = lambda handler: handler.answer(200, layer, [])
    handler.answer(307, b"", [("Location", "/a b/data")])


def written(head: bytes, end: bytes = b"") -> Callable[[FieldHandler, bytes], None]:
    """A response with these headers, and ``end`` after its body."""

    def answer(handler: FieldHandler, layer: bytes) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + head % len(layer) + b"\r\n\r\n" + layer + end)

    return answer


def encoded(field: Field) -> str:
    """A layer, compressed once more on its way."""
    image = build_image([{"encoded": b"1" * 5000}], compression="none")
    layer = image.manifest["layers"][0]["digest"]
    body = gzip.compress(image.blobs[layer])
    headers = [("Content-Encoding", "gzip"), ("Content-Type", "application/octet-stream")]
    field.registry.answers[layer] = lambda handler: handler.answer(200, body, headers)
    field.pull(image)
    return "pulled"


def schema_1(field: Field) -> str:
    body = json.dumps({"schemaVersion": 1, "name": "a", "tag": "1", "fsLayers": [], "history": []}).encode()
    kind = "application/vnd.docker.distribution.manifest.v1+prettyjws"
    field.registry.answers["1"] = text(body, kind)
    field.pull(IMAGE)
    return "pulled"


def unreadable_hosts(field: Field) -> str:
    name, address = field.name, field.registry.address
    domain = address.replace("127.0.0.1", "localhost")
    field.registry.images[name] = IMAGE
    field.hosts(domain, f'server = "http://{address}"\n[host."http://{address}"]\ncapabilities = "pull"\n')
    try:
        field.pull_name(f"{domain}/{name}:1")
    except grpc.RpcError as error:
        return "refused, and the file is named" if "hosts.toml" in (error.details() or "") else "the file is left out"
    return "pulled"


LATER = ("Retry-After", "3600")
REASON = b'{"errors": [{"code": "TOOMANYREQUESTS", "message": "100 pulls a day"}]}'
MANY: Sequence[tuple[str, str]] = [(f"X-{number}", "x") for number in range(300)]
NEXT: dict[str, Any] = {"here": "pulled from the next host", "containerd": REFUSED}
PAGE = text(b"<html>Log in</html>", "text/html")
ERROR = text(b'{"errors": [{"code": "DENIED"}]}', "application/json")

CASES = (
    FieldCase(5, "A mirror answers a tag with a login page", mirror(PAGE), report="containerd/containerd#4531", **NEXT),
    FieldCase(5, "A mirror answers a tag with 200 and an error in JSON", mirror(ERROR), **NEXT),
    FieldCase(5, "A mirror answers a tag with an empty body", mirror(text(b"", "application/json")), **NEXT),
    FieldCase(
        5,
        "A mirror answers a tag with another platform's image",
        mirror(foreign_platform),
        "pulled from the next host",
        "took the mirror's image",
    ),
    FieldCase(
        5,
        "A mirror answers a tag with a login page, and the registry has no such image",
        mirror_alone,
        "refused, and the mirror is named",
        "refused, and the mirror is not named",
    ),
    FieldCase(
        6,
        "An answer with a line that is no header",
        no_http,
        "refused, and the answer is blamed",
        "refused, and the answer is blamed",
    ),
    FieldCase(6, "A blob with the status 203", of_layer(lambda handler, _: handler.serve(203)), "pulled", "pulled"),
    FieldCase(
        6,
        "A blob with the status 206 that was asked for without `Range`",
        of_layer(partial),
        "pulled",
        "pulled",
    ),
    FieldCase(6, "The same `Content-Length` twice", of_layer(repeated_length), "pulled", "pulled"),
    FieldCase(6, "`Content-Length` beside chunks", of_layer(length_and_chunks), "pulled", "pulled"),
    FieldCase(6, "A header of 100 KB", answers(200, ("X-Long", "x" * 100_000)), "pulled", "pulled"),
    FieldCase(6, "300 headers", answers(200, *MANY), "pulled", "pulled"),
    FieldCase(6, "10 redirects", of_layer(redirects), "pulled", REFUSED),
    FieldCase(6, "A blob sent as `Content-Encoding: gzip`", encoded, "pulled", "pulled"),
    FieldCase(6, "A redirect to a place with a space in its path", of_layer(with_a_space), "pulled", "pulled"),
    FieldCase(
        6,
        "A header with a space before its colon",
        of_layer(written(b"X : y\r\nContent-Length: %d")),
        "pulled",
        "pulled",
    ),
    FieldCase(
        6, "More bytes than Content-Length", of_layer(written(b"Content-Length: %d", b"\r\n<html>")), "pulled", "pulled"
    ),
    FieldCase(
        6,
        "A refusal with a reason",
        reasoned(REASON, "application/json"),
        "refused, with the reason",
        "refused, without the reason",
        "containerd/containerd#3076, containerd/containerd#8969",
    ),
    FieldCase(
        6,
        "A refusal with a reason as plain text",
        reasoned(b"100 pulls a day", "text/plain"),
        "refused, with the reason",
        "refused, without the reason",
        "containerd/containerd#4672",
    ),
    FieldCase(
        14, "A manifest of Docker's schema 1", schema_1, REFUSED, REFUSED, differs="Manifests of Docker's schema 1"
    ),
    FieldCase(
        14,
        "A `hosts.toml` with a mistake",
        unreadable_hosts,
        "refused, and the file is named",
        "the file is left out",
        differs="A `hosts.toml` that cannot be read; a certificate that is not valid at an `http://` address; "
        "credentials for mirrors",
    ),
)
