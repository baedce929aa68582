"""docs/how-to-add.md names only files, and names in them, that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs/how-to-add.md"
# A link, and the names in parentheses behind it.
LINK = re.compile(r"\[[^\]]+\]\(([^)]+)\)(?:\s+\(((?:`[^`]+`(?:,\s+)?)+)\))?")
NAMED = [(path, re.findall(r"`([^`]+)`", names)) for path, names in LINK.findall(PAGE.read_text())]


def test_the_page_names_files_of_every_room() -> None:
    assert len({path for path, _ in NAMED}) > 30


@pytest.mark.parametrize(("path", "names"), NAMED, ids=[f"{number}-{path}" for number, (path, _) in enumerate(NAMED)])
def test_the_file_is_there_with_what_is_named_in_it(path: str, names: list[str]) -> None:
    text = (PAGE.parent / path).read_text()
    for name in names:
        assert re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text), f"there is no {name} in {path}"


@pytest.mark.parametrize("directory", sorted(set(re.findall(r"`((?:criserver|tests)/[a-z0-9/]+/)`", PAGE.read_text()))))
def test_the_directory_is_there(directory: str) -> None:
    assert (PAGE.parents[1] / directory).is_dir()
