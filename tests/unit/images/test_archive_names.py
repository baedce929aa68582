"""What the images of an archive are called."""

from __future__ import annotations

import pytest

from criserver.errors import InvalidArgumentError
from criserver.images.archive_names import Naming, repository_of


@pytest.mark.parametrize(
    ("file", "repository"),
    [
        ("alpine.tar", "alpine"),
        ("/tmp/images/Alpine.tar.gz", "alpine"),
        ("app-1.2.tgz", "app-1.2"),
        ("app.oci.tar.zst", "app"),
        ("app.tar.zstd", "app"),
        ("app", "app"),
        ("my app (2)!.tar", "my-app-2"),
        ("..tar", ""),
        (".tar", ""),
        ("a__b..c.tar", "a-b-c"),
        ("é.tar", ""),
        ("x" * 500, "x" * 128),
        ("", ""),
        ("dir/", ""),
    ],
)
def test_the_repository_that_a_file_is_called_after(file: str, repository: str) -> None:
    assert repository_of(file) == repository
    if repository:
        (name,), _ = Naming(file).names(("1",), alone=True)
        assert str(name) == f"docker.io/library/{repository}:1"


@pytest.mark.parametrize(
    ("file", "given", "texts", "alone", "expected"),
    [
        ("f.tar", "", (), True, []),
        ("f.tar", "", ("3.9",), False, ["docker.io/library/f:3.9"]),
        ("f.tar", "", ("3.9", "latest"), False, ["docker.io/library/f:3.9", "docker.io/library/f:latest"]),
        ("f.tar", "", ("a/b:1", "3.9"), False, ["docker.io/a/b:1", "docker.io/library/f:3.9"]),
        ("f.tar", "example.com/own", ("3.9",), False, ["example.com/own:3.9"]),
        ("f.tar", "example.com/own", ("3.9",), True, ["example.com/own:3.9"]),
        ("f.tar", "example.com/own:2", ("3.9",), True, ["example.com/own:2"]),
        ("f.tar", "example.com/own:2", ("3.9",), False, ["example.com/own:3.9"]),
        ("f.tar", "localhost:5000/own", ("3.9",), True, ["localhost:5000/own:3.9"]),
        ("f.tar", "example.com/own", (), True, ["example.com/own:latest"]),
        ("f.tar", "example.com/own:2", (), True, ["example.com/own:2"]),
        ("f.tar", "example.com/own:2", (), False, []),
        ("f.tar", "example.com/own:2", ("a/b:1",), True, ["docker.io/a/b:1"]),
        ("", "own", ("3.9",), False, ["docker.io/library/own:3.9"]),
    ],
)
def test_names(file: str, given: str, texts: tuple[str, ...], alone: bool, expected: list[str]) -> None:
    names, left_out = Naming(file, given).names(texts, alone=alone)
    assert [str(name) for name in names] == expected
    assert left_out == ()


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [("f.tar", "Bad/Name:1", "must be lowercase"), ("f.tar", "a tag", "tag 'a tag' is not"), ("", "3.9", "--name")],
)
def test_a_name_that_is_none_is_told(file: str, text: str, reason: str) -> None:
    names, (left,) = Naming(file).names((text, "example.com/good:1"), alone=False)
    assert [str(name) for name in names] == ["example.com/good:1"]
    assert left.what == f"name '{text}'"
    assert reason in left.reason


@pytest.mark.parametrize("given", ["Bad Name", f"a@sha256:{'0' * 64}"])
def test_a_given_name_that_is_refused(given: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"Bad Name|has a digest"):
        Naming("f.tar", given)
