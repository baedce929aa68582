"""Which names of images a pattern matches."""

from __future__ import annotations

import pytest

from criserver.images.name_patterns import NamePatterns

NAMES = ("docker.io/acme/app:1", "docker.io/acme/app@sha256:" + "a" * 64)


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        ([], ""),
        (["docker.io/acme/app:1"], NAMES[0]),
        (["docker.io/acme/app"], ""),
        (["acme/app:1"], ""),
        (["docker.io/acme/*"], NAMES[0]),
        (["*/app@*"], NAMES[1]),
        (["*acme*"], NAMES[0]),
        (["docker?io/acme/app:1", "docker.io/acme/app:[0-9]", "docker.io/acme/app:1*2"], ""),
        (["other/*", "docker.io/*:1"], NAMES[0]),
    ],
)
def test_a_pattern_matches_the_whole_name(patterns: list[str], found: str) -> None:
    assert NamePatterns(patterns).match(NAMES) == found
