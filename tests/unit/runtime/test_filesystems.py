"""Volumes of an image that are in each other."""

from __future__ import annotations

import random
from typing import Any

from criserver.runtime.filesystems import hidden_places


class Watched(list[str]):
    """A list that counts how often it is looked at."""

    looks = 0

    def __getitem__(self, index: Any) -> Any:
        self.looks += 1
        return super().__getitem__(index)


def test_the_volumes_below_a_volume_are_hidden_in_it() -> None:
    volumes = sorted(["/a", "/a/b", "/a/b/c", "/a/b-c", "/a-b", "/a0", "/a0/b", "/ab", "/a/\u00e9", "/a/\udcff", "/b"])
    assert hidden_places("/a", volumes) == {"b", "b/c", "b-c", "\u00e9", "\udcff"}
    assert hidden_places("/a/b", volumes) == {"c"}
    assert hidden_places("/b", volumes) == frozenset()


def test_they_are_the_same_as_by_comparing_all() -> None:
    chosen = random.Random(8)
    for _ in range(50):
        names = {
            "/" + "/".join(chosen.choices(["a", "b", "a-", "a0", "a.", "\uffff"], k=chosen.randint(1, 4)))
            for _ in range(chosen.randint(1, 60))
        }
        volumes = sorted(names)
        for volume in volumes:
            plain = {other.removeprefix(f"{volume}/") for other in volumes if other.startswith(f"{volume}/")}
            assert hidden_places(volume, volumes) == plain


def test_of_many_volumes_few_are_looked_at() -> None:
    volumes = Watched(sorted(f"/volumes/{number}/data" for number in range(50_000)))
    assert hidden_places("/volumes/7/data", volumes) == frozenset()
    assert 0 < volumes.looks < 100
