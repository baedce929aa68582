"""Image references."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criserver.errors import InvalidArgumentError
from criserver.images.references import Reference, parse

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("user/app", "docker.io/user/app:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
        ("docker.io/a/b/c:T_1.x-y", "docker.io/a/b/c:T_1.x-y"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("example.com/app:1", "example.com/app:1"),
        ("host:5000/app", "host:5000/app:latest"),
        ("Host/app", "Host/app:latest"),
        ("[::1]:5000/app", "[::1]:5000/app:latest"),
        ("[fd00::1]/app", "[fd00::1]/app:latest"),
        ("a--b__c.d_e", "docker.io/library/a--b__c.d_e:latest"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        (f"busybox:1@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
    ],
)
def test_canonical_forms(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical
    assert str(parse(canonical)) == canonical


def test_parts() -> None:
    assert parse(f"r.example:5000/a/b:1@{DIGEST}") == Reference("r.example:5000", "a/b", "1", DIGEST)
    assert parse(f"a@{DIGEST}").tag is None
    assert parse("a:1").digest is None
    assert parse("r.example/a/b:1").name == "r.example/a/b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a" * 64, "are an image ID"),
        ("Busybox", "must be lowercase"),
        ("example.com/App", "must be lowercase"),
        ("a b", "not a repository name"),
        ("a..b", "not a repository name"),
        ("a___b", "not a repository name"),
        ("-a", "not a repository name"),
        ("example.com/", "not a repository name"),
        ("example.com//a", "not a repository name"),
        ("a/../b", "not a repository name"),
        ("busybox:", "tag ''"),
        ("busybox:.1", "tag '.1'"),
        ("busybox:" + "x" * 129, "1 to 128"),
        ("busybox:ä", "tag 'ä'"),
        ("busybox:1\n", "tag"),
        ("busybox@", "digest ''"),
        ("busybox@sha256:abc", "digest 'sha256:abc'"),
        ("busybox@sha256:" + "A" * 64, "digest"),
        ("busybox@sha512:" + "a" * 64, "or 'sha512:' and 128"),
        ("busybox@sha256:" + "a" * 128, "digest"),
        ("busybox@sha384:" + "a" * 96, "digest"),
        (f"busybox@{DIGEST}\n", "digest"),
        ("ex_ample.com/a", "not a host name"),
        ("-h.example/a", "not a host name"),
        ("host:0/a", "port 0"),
        ("host:65536/a", "port 65536"),
        ("host:x/a", "not a host name"),
        ("[1:2]:5000/a", "'1:2' is not an IPv6 address"),
        ("[:::]/a", "':::' is not an IPv6 address"),
        ("[::1/a", "not a host name"),
        ("/a", "not a repository name"),
        ("a/" * 127 + "aa", "longer than 255"),
        ("a" * 2000, "longer than 1024"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


@given(st.text() | st.text("abAB019._-/:@[]#\n", max_size=40))
def test_any_text_is_refused_or_has_a_stable_canonical_form(text: str) -> None:
    try:
        reference = parse(text)
    except InvalidArgumentError:
        return
    assert parse(str(reference)).name == reference.name
    assert str(parse(str(reference))) == str(reference)


@given(
    st.from_regex(r"\A[a-z0-9]{1,9}\.[a-z]{2,5}(:[1-9][0-9]{1,3})?\Z"),
    st.lists(st.from_regex(r"\A[a-z0-9]{1,9}([._]|__|-{1,3})[a-z0-9]{1,5}\Z"), min_size=1, max_size=4),
    st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}\Z"),
)
def test_well_formed_references_are_taken_apart(domain: str, path: list[str], tag: str) -> None:
    assert parse(f"{domain}/{'/'.join(path)}:{tag}") == Reference(domain, "/".join(path), tag, None)
