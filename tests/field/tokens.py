"""Tokens and secrets: what authorisation servers and redirects ask for, and who gets a pull secret."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.field.registries import IMAGE
from tests.support.field import REFUSED, Field, FieldCase, FieldHandler

TOKEN = b'{"token": "anonymous"}'
SECRET = cri.AuthConfig(username="me", password="secret")


def behind_a_redirect(field: Field) -> str:
    """A facade redirects to another registry, which wants an anonymous token of its own."""
    name, other = field.name, field.other
    other.images[name] = IMAGE

    def facade(handler: FieldHandler) -> None:
        handler.answer(307, b"", [("Location", f"http://{other.address}{handler.path}")])

    def gate(handler: FieldHandler) -> None:
        if handler.headers.get("Authorization") == "Bearer anonymous":
            handler.serve()
            return
        challenge = f'Bearer realm="http://{other.address}/token",service="other",scope="repository:{name}:pull"'
        handler.answer(401, b"", [("WWW-Authenticate", challenge)])

    for part in ("1", *IMAGE.blobs):
        field.registry.answers[part] = facade
        other.answers[part] = gate
    other.answers["token"] = lambda handler: handler.answer(200, b'{"token": "anonymous"}', [])
    field.pull_name(f"{field.registry.address}/{name}:1", auth=SECRET)
    secrets = [given for _, given in other.asked if "Basic" in given or SECRET.password in given]
    return "pulled, and the other registry got the secret" if secrets else "pulled without the secret"


def guarded(field: Field, issue: Callable[[FieldHandler], None]) -> str:
    """The name of an image whose registry wants a token that ``issue`` answers with."""
    address, name = field.registry.address, field.name
    field.registry.images[name] = IMAGE

    def gate(handler: FieldHandler) -> None:
        if handler.headers.get("Authorization") == "Bearer anonymous":
            handler.serve()
        else:
            handler.answer(401, b"", [("WWW-Authenticate", f'Bearer realm="http://{address}/token",service="here"')])

    for part in ("1", *IMAGE.blobs):
        field.registry.answers[part] = gate
    field.registry.answers["token"] = issue
    return f"{address}/{name}:1"


def answered(status: int, key: str = "token") -> Callable[[Field], str]:
    """A pull with a token that is answered with this status, in the field ``key``."""
    body = json.dumps({key: "anonymous"}).encode()

    def pull(field: Field) -> str:
        field.pull_name(guarded(field, lambda handler: handler.answer(status, body, [])))
        return "pulled"

    return pull


def below_a_path(field: Field) -> str:
    """A registry's project has the image, and its authorisation server refuses the scope of another repository."""
    address, name = field.registry.address, field.name
    field.registry.images[f"cache/{name}"] = IMAGE
    own = f"repository:cache/{name}:pull"

    def gate(handler: FieldHandler) -> None:
        if handler.headers.get("Authorization") == "Bearer anonymous":
            handler.serve()
        else:
            challenge = f'Bearer realm="http://{address}/token",service="here",scope="{own}"'
            handler.answer(401, b"", [("WWW-Authenticate", challenge)])

    def issue(handler: FieldHandler) -> None:
        asked = parse_qs(urlsplit(handler.path).query)["scope"]
        handler.answer(200 if asked == [own] else 403, TOKEN, [])

    for part in ("1", *IMAGE.blobs):
        field.registry.answers[part] = gate
    field.registry.answers["token"] = issue
    field.hosts(f"{name}.example", f'server = "http://{address}/v2/cache"\noverride_path = true\n')
    field.pull_name(f"{name}.example/{name}:1")
    return "pulled"


def moved(field: Field) -> str:
    """The authorisation server redirects to another path, with a pull secret."""
    wanted = f"Basic {base64.b64encode(b'me:secret').decode()}"

    def new(handler: FieldHandler) -> None:
        status = 200 if handler.headers.get("Authorization") == wanted else 401
        handler.answer(status, TOKEN, [])

    field.registry.answers["new"] = new
    field.pull_name(guarded(field, lambda handler: handler.answer(301, b"", [("Location", "/new")])), auth=SECRET)
    return "pulled"


def away(field: Field) -> str:
    """The authorisation server redirects to another one, with a pull secret."""
    there = ("Location", f"http://{field.other.address}/token")
    field.other.answers["token"] = lambda handler: handler.answer(200, TOKEN, [])
    field.pull_name(guarded(field, lambda handler: handler.answer(307, b"", [there])), auth=SECRET)
    secrets = [given for _, given in field.other.asked if "Basic" in given]
    return "pulled, and the other server got the secret" if secrets else "pulled without the secret"


def wrapped_secret(field: Field) -> str:
    """A pull secret as ``base64`` writes it to a file."""
    wanted = base64.b64encode(b"me:secret").decode()

    def gate(handler: FieldHandler) -> None:
        if handler.headers.get("Authorization") == f"Basic {wanted}":
            handler.serve()
        else:
            handler.answer(401, b"", [("WWW-Authenticate", 'Basic realm="x"')])

    field.registry.answers["1"] = gate
    field.pull(IMAGE, auth=cri.AuthConfig(auth=f"{wanted[:8]}\n{wanted[8:]}\n"))
    return "pulled"


CASES = (
    FieldCase(
        4,
        "401 behind a redirect, with a pull secret",
        behind_a_redirect,
        "pulled without the secret",
        "pulled, and the other registry got the secret",
        "containerd/containerd#5503",
    ),
    FieldCase(
        6,
        "A `hosts.toml` with a path, and an authorisation server that refuses foreign scopes",
        below_a_path,
        "pulled",
        REFUSED,
        "containerd/containerd#9648, containerd/containerd#8415, containerd/containerd#4358",
    ),
    FieldCase(6, "A token answered with 201", answered(201), "pulled", "pulled"),
    FieldCase(6, "A token in a field `Token`", answered(200, "Token"), "pulled", "pulled"),
    FieldCase(
        6, "An authorisation server that redirects to another path, with a pull secret", moved, "pulled", "pulled"
    ),
    FieldCase(
        6,
        "An authorisation server that redirects to another server, with a pull secret",
        away,
        "pulled without the secret",
        "pulled, and the other server got the secret",
    ),
    FieldCase(6, "A pull secret with line breaks in its base64", wrapped_secret, "pulled", "pulled"),
)
