"""The docker config file."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from criserver.errors import FailedPreconditionError
from criserver.images import Credentials
from criserver.images.auth import Keyring
from criserver.images.credentials import DockerConfig, canonical_server, load_docker_config
from criserver.images.hosts import RegistryHost
from criserver.images.references import parse


def auth(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


Load = Callable[[object], DockerConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(document: object) -> DockerConfig:
        (tmp_path / "config.json").write_text(document if isinstance(document, str) else json.dumps(document))
        return load_docker_config(str(tmp_path / "config.json"))

    return load


@pytest.mark.parametrize(
    ("entry", "credentials"),
    [
        ({"auth": auth("me:se:cret")}, Credentials("me", "se:cret")),
        ({"auth": auth("me:secret\0\0")}, Credentials("me", "secret")),
        # As base64(1) wraps its lines.
        ({"auth": "bWU6c2Vj\r\ncmV0\n"}, Credentials("me", "secret")),
        ({"username": "me", "password": "secret", "email": "x"}, Credentials("me", "secret")),
        ({"auth": auth("new:er"), "username": "me", "password": "secret"}, Credentials("new", "er")),
        ({"auth": auth("0000:"), "identitytoken": "i"}, Credentials("0000", "", identity_token="i")),
        ({"registrytoken": "r"}, Credentials(registry_token="r")),
        ({}, None),
        (None, None),
    ],
)
def test_entries(load: Load, entry: dict[str, str] | None, credentials: Credentials | None) -> None:
    assert load({"auths": {"r.example": entry}}).find("r.example", "app") == credentials


@pytest.mark.parametrize(
    ("server", "name"),
    [
        ("https://index.docker.io/v1/", "docker.io"),
        ("registry-1.docker.io", "docker.io"),
        ("docker.io/library", "docker.io/library"),
        ("R.example:5000", "r.example:5000"),
        ("http://r.example:5000/v2/", "r.example:5000"),
        ("https://r.example/Team/app/", "r.example/Team/app"),
        ("", ""),
    ],
)
def test_names_of_servers(server: str, name: str) -> None:
    assert canonical_server(server) == name


@pytest.mark.parametrize("document", [{}, {"auths": None}, {"auths": {}}, {"HttpHeaders": {}, "detachKeys": "x"}])
def test_a_file_without_credentials(load: Load, document: dict[str, Any]) -> None:
    assert load(document).find("r.example", "app") is None


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("{", "no JSON object"),
        ("[]", "no JSON object"),
        ("[" * 100_000, "no JSON object"),
        ({"auths": []}, "auths is no JSON object"),
        ({"credHelpers": "x"}, "credHelpers is no JSON object"),
        ({"auths": {"r.example": "x"}}, "auths.'r.example' is no JSON object"),
        ({"auths": {"r.example": {"auth": 1}}}, "auths.'r.example'.auth is not a string"),
        ({"auths": {"r.example": {"auth": "sec*ret"}}}, "auths.'r.example'.auth is not base64"),
        ({"auths": {"r.example": {"auth": auth("no-colon")}}}, "auths.'r.example'.auth is not base64"),
        ("#" * (2 << 20), "larger than"),
    ],
)
def test_a_malformed_file_is_named_with_its_entry_and_no_secret(
    load: Load, tmp_path: Path, document: object, words: str
) -> None:
    with pytest.raises(FailedPreconditionError) as caught:
        load(document)
    assert f"registry.auth_file {tmp_path}/config.json" in str(caught.value)
    assert words in str(caught.value)
    assert "sec*ret" not in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FailedPreconditionError, match="/no/such/file: No such file"):
        load_docker_config("/no/such/file")


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"credHelpers": {"r.example": "cloud"}}, True),
        ({"credsStore": "desktop", "auths": {"r.example": {}}}, True),
        ({"credHelpers": {"other.example": "cloud"}}, False),
        ({"credsStore": "desktop", "auths": {"r.example": {"auth": auth("me:x")}}}, False),
        ({"auths": {"r.example": {}}}, False),
    ],
)
def test_a_credential_helper_that_would_be_asked_is_logged(
    load: Load, capsys: pytest.CaptureFixture[str], document: dict[str, Any], told: bool
) -> None:
    host = RegistryHost("https://r.example", origin=True)
    Keyring(parse("r.example/app:1"), None, load(document)).find(host)
    output = capsys.readouterr().out
    assert ("credential helper" in output) is told
    assert ("r.example" in output) is told
