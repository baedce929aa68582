"""Digests, and the beginnings of them that operators type."""

from __future__ import annotations

import hashlib

import pytest

from criserver.images.digests import begins_with, digest_of, is_digest

SHA256 = f"sha256:{hashlib.sha256(b'x').hexdigest()}"
SHA512 = f"sha512:{hashlib.sha512(b'x').hexdigest()}"


def test_a_digest_is_of_an_algorithm_that_was_registered() -> None:
    assert is_digest(SHA256)
    assert is_digest(SHA512)
    for text in (
        "",
        SHA256 + "\n",
        SHA256[7:],
        SHA256.upper(),
        "sha256:",
        "sha512:" + SHA256[7:],
        "sha256:" + SHA512[7:],
    ):
        assert not is_digest(text), text
    assert not is_digest(f"sha384:{hashlib.sha384(b'x').hexdigest()}")


@pytest.mark.parametrize(
    ("like", "expected"), [("", SHA256), (SHA256, SHA256), (SHA512, SHA512), ("sha512:", SHA512), ("md5:1", SHA256)]
)
def test_content_gets_its_digest_by_the_algorithm_of_another(like: str, expected: str) -> None:
    assert digest_of(b"x", like) == expected


@pytest.mark.parametrize("digest", [SHA256, SHA512])
def test_an_id_may_be_shortened_with_its_algorithm_or_without(digest: str) -> None:
    for start in (digest, digest[:20], digest[7:], digest[7:19]):
        assert begins_with(digest, start)
    other = "0" if digest[7] != "0" else "1"
    for start in (other, digest[:7] + other, f"sha1:{digest[7:]}", digest + "0"):
        assert not begins_with(digest, start)
