"""The pages of docs/ have every CRI field and every key, and name only tests and links that exist."""

from __future__ import annotations

import json
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from criserver.config import default_text, load
from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.pages import ROOT, functions_in, rows

MESSAGES = (
    "PodSandboxConfig",
    "LinuxPodSandboxConfig",
    "LinuxSandboxSecurityContext",
    "NamespaceOption",
    "DNSConfig",
    "PortMapping",
    "ContainerConfig",
    "LinuxContainerConfig",
    "LinuxContainerResources",
    "LinuxContainerSecurityContext",
    "Capability",
    "Mount",
    "Device",
)
PAGES = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "bench/**/*.md", "contrib/**/*.md") for path in ROOT.glob(pattern)
)

# A link to a heading of a page of ours: the path, which may be empty, and the anchor.
ANCHORED = re.compile(r"\]\((?![a-z]+:)([^)\s#]*)#([^)\s]+)\)")


@cache
def sections() -> dict[str, dict[str, list[str]]]:
    """The rows of docs/cri-fields.md by message."""
    first, *others = (ROOT / "docs/cri-fields.md").read_text().split("\n## ")
    assert rows(first) == {}
    return {title: rows(body) for title, _, body in (other.partition("\n") for other in others)}


def test_the_page_has_the_messages_and_no_others() -> None:
    assert sorted(sections()) == sorted(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_every_field_of_cri_has_a_row_and_every_row_is_a_field(message: str) -> None:
    fields = {field.name for field in cri.DESCRIPTOR.message_types_by_name[message].fields}
    assert set(sections()[message]) == fields


@pytest.mark.parametrize("message", MESSAGES)
def test_every_row_says_what_happens_and_names_tests_that_there_are(message: str) -> None:
    for field, (happens, shown) in sections()[message].items():
        assert happens, field
        named = re.findall(r"`([^`]*)`", shown)
        assert named, f"{field}: no test shows it"
        assert re.sub(r"`[^`]*`", "", shown).strip() == "", f"{field}: {shown}"
        for test in named:
            path, _, function = test.partition("::")
            assert function.startswith("test_"), f"{field}: {test}"
            assert function in functions_in(path), f"{field}: there is no {test}"


@pytest.mark.parametrize("page", ["what-a-node-lacks.md"])
def test_a_page_names_only_tests_that_there_are(page: str) -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs" / page).read_text())
    assert named
    assert [f"{path}::{function}" for path, function in named if function not in functions_in(path)] == []


def keys(table: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """The dotted names of a TOML document's keys, with their values; a handler's name is NAME."""
    found: dict[str, object] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= keys(value, f"{prefix}{'NAME' if prefix == 'runtimes.' else key}.")
        else:
            found[prefix + key] = value
    return found


def test_every_key_of_the_configuration_is_described_with_its_default() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    described = {key: default for key, (default, what) in rows(page).items() if what}
    assert described == {key: f"`{json.dumps(value)}`" for key, value in keys(tomllib.loads(default_text())).items()}


def test_the_example_of_the_configuration_is_valid(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/configuration.md").read_text(), re.DOTALL)
    (tmp_path / "config.toml").write_text(example)
    assert sorted(load(str(tmp_path / "config.toml")).runtimes) == ["crun", "runc"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_that_there_is(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    ours = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in ours if not (page.parent / link).exists()] == []


def anchors(page: Path) -> set[str]:
    """The anchors that a reader of Markdown makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_anchor_of_a_link_is_a_heading(page: Path) -> None:
    links = [(page.parent / path if path else page, anchor) for path, anchor in ANCHORED.findall(page.read_text())]
    assert [anchor for target, anchor in links if anchor not in anchors(target)] == []


def test_the_readme_lists_all_pages() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in sorted((ROOT / "docs").glob("*.md")) if f"](docs/{page.name})" not in readme] == []


def test_every_decision_is_in_the_index_and_on_the_page_of_the_architecture() -> None:
    titles = {}
    for number, page in enumerate(sorted((ROOT / "docs/decisions").glob("[0-9]*.md")), start=1):
        title, date, *headings = re.findall(r"^(?:#+ |Date: ).+$", page.read_text(), re.MULTILINE)
        assert title.startswith(f"# {number}. ") and page.name.startswith(f"{number:04}-"), page.name
        assert re.fullmatch(r"Date: \d{4}-\d\d-\d\d", date), page.name
        assert headings == ["## Context", "## Decision", "## Consequences"], page.name
        titles[page.name] = title.partition(". ")[2]
    index = re.findall(r"^\d+\. \[(.+)\]\((.+)\)$", (ROOT / "docs/decisions/README.md").read_text(), re.MULTILINE)
    assert [(name, title) for title, name in index] == list(titles.items())
    architecture = (ROOT / "docs/architecture.md").read_text()
    listed = re.findall(r"^- \[(.+)\]\(decisions/(.+)\)$", architecture, re.MULTILINE)
    assert sorted((name, title) for title, name in listed) == sorted(titles.items())
