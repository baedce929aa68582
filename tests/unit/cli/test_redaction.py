"""What is taken out of a bug report."""

from __future__ import annotations

import time

import pytest

from criserver.cli.redaction import REMOVED, text_without_secrets, without_secrets


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("pull from https://bob:s3cret@mirror.example/v2", f"pull from https://{REMOVED}@mirror.example/v2"),
        ("at https://bob:s3@cr:et@mirror.example/v2?a@b", f"at https://{REMOVED}@mirror.example/v2?a@b"),
        ("https://cdn.example/a?X-Amz-Signature=s3cret&b=1", f"https://cdn.example/a?X-Amz-Signature={REMOVED}&b=1"),
        ("run --password=s3cret -v", f"run --password={REMOVED} -v"),
        ('"token": "s3cret", "a": 1', f'"token": "{REMOVED}", "a": 1'),
        ("Authorization: Bearer s3cret", f"Authorization: Bearer {REMOVED}"),
        ("DB_PASSWORD=s3cret&x=1", f"DB_PASSWORD={REMOVED}&x=1"),
        ("https://mirror.example/a@sha256:0", "https://mirror.example/a@sha256:0"),
        ("nothing secret here", "nothing secret here"),
    ],
)
def test_texts(text: str, clean: str) -> None:
    assert text_without_secrets(text) == clean


@pytest.mark.parametrize("text", ["a.", "token", "token-", "password: ", "a://", "a://b"])
def test_a_text_of_any_form_is_read_in_time(text: str) -> None:
    # Seconds, where the search takes the square of the length.
    began = time.process_time()
    text_without_secrets(text * (20_000 // len(text)))
    assert time.process_time() - began < 5


def test_documents() -> None:
    document = {
        "env": ["A=s3cret", "B"],
        "envs": [{"key": "A", "value": "czNjcmV0"}],
        "labels": {"app": "web", "api-key": "s3cret"},
        "args": ["run", "--token=s3cret", "--password", "s3cret", "-v"],
        "pid": 5,
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "s3cret"},
        "k8s_auth_token": "s3cret",
        "password": "",
    }
    assert without_secrets(document) == {
        "env": [f"A={REMOVED}", f"B={REMOVED}"],
        "envs": [{"key": "A", "value": REMOVED}],
        "labels": {"app": "web", "api-key": REMOVED},
        "args": ["run", f"--token={REMOVED}", "--password", REMOVED, "-v"],
        "pid": 5,
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": REMOVED},
        "k8s_auth_token": REMOVED,
        "password": "",
    }
