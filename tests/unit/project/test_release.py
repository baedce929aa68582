"""A release: its version stands in one place, its changelog has a form, and its records are kept for later tests."""

from __future__ import annotations

import datetime
import importlib.util
import re
import shutil
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from setuptools.config.pyprojecttoml import read_configuration

from criserver import __version__
from criserver.api.runtime_service import KUBELET_API_VERSION
from tests.support import records
from tests.vm.releases import LAST, RELEASES

ROOT = Path(__file__).parents[3]
HEADINGS = ["### Added", "### Changed", "### Fixed", "### Removed", "### Security"]
LONGEST = 400  # characters of an entry
TODAY = datetime.date(2030, 1, 31)


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / "contrib/release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections(text: str) -> dict[str, str]:
    """The sections of a changelog by their titles."""
    _, *found = re.split(r"^## ", text, flags=re.MULTILINE)
    return {title: body for title, _, body in (section.partition("\n") for section in found)}


CHANGELOG = sections((ROOT / "CHANGELOG.md").read_text())
# What was released before there was this form.
FORMED = {title: body for title, body in CHANGELOG.items() if not title.startswith("0.1.0 ")}


def key(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def test_the_version_stands_in_the_package_alone() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in document["project"]
    assert read_configuration(ROOT / "pyproject.toml")["project"]["version"] == __version__
    literal = re.compile(rf"['\"]{re.escape(__version__)}['\"]")
    sources = [path for top in ("criserver", "shims", "snapshotter", "contrib") for path in (ROOT / top).rglob("*.*")]
    text = [path for path in (*sources, ROOT / "setup.py", ROOT / "Makefile") if path.suffix not in (".pyc", ".so")]
    found = {str(path.relative_to(ROOT)) for path in text if path.is_file() and literal.search(path.read_text())}
    # CRI has a version of its own, which has nothing to do with this one.
    allowed = {"criserver/api/runtime_service.py"} if __version__ == KUBELET_API_VERSION else set()
    assert found == {"criserver/__init__.py"} | allowed


def test_the_changelog_has_each_release_newest_first_below_what_is_unreleased() -> None:
    first, *releases = CHANGELOG
    assert first == "Unreleased"
    matched = [re.fullmatch(r"(\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)", title) for title in releases]
    assert None not in matched, releases
    versions = [found[1] for found in matched if found is not None]
    assert versions == sorted(versions, key=key, reverse=True)
    dates = [found[2] for found in matched if found is not None]
    assert dates == sorted(dates, reverse=True)
    assert versions[0] == __version__
    # A release is entered there after its commit: RELEASE.md.
    assert set(versions) - set(RELEASES) <= {__version__}
    assert set(RELEASES) <= set(versions)


@pytest.mark.parametrize("title", FORMED)
def test_entries_are_below_headings_and_are_short_sentences(title: str) -> None:
    blocks = [block for block in FORMED[title].strip().split("\n\n") if block]
    assert blocks[::2] == [heading for heading in HEADINGS if heading in blocks]
    for block in blocks[1::2]:
        entries = [" ".join(entry.split()) for entry in re.split(r"^- ", block, flags=re.MULTILINE)[1:]]
        assert block.startswith("- "), block
        for entry in entries:
            assert entry.endswith("."), entry
            assert len(entry) <= LONGEST, entry


def test_the_records_of_each_release_are_kept() -> None:
    kept = {path.stem for path in records.DATA.glob("*.sql")}
    assert set(RELEASES) <= kept <= set(RELEASES) | {__version__}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files that a release changes."""
    (tmp_path / "criserver").mkdir()
    for name in ("criserver/__init__.py", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    text = (tmp_path / "CHANGELOG.md").read_text()
    (tmp_path / "CHANGELOG.md").write_text(
        text.replace("## Unreleased\n", "## Unreleased\n\n### Fixed\n\n- It is.\n", 1)
    )
    return tmp_path


def test_a_release_dates_what_was_unreleased(release: ModuleType, tree: Path) -> None:
    before = sections((tree / "CHANGELOG.md").read_text())
    release.prepare("99.0.0", tree, TODAY)
    assert (tree / "criserver/__init__.py").read_text().splitlines()[-1] == '__version__ = "99.0.0"'
    after = sections((tree / "CHANGELOG.md").read_text())
    assert list(after)[:2] == ["Unreleased", "99.0.0 (2030-01-31)"]
    assert after["Unreleased"].strip() == ""
    assert after["99.0.0 (2030-01-31)"] == before["Unreleased"]
    assert list(after)[2:] == list(before)[1:]


@pytest.mark.parametrize(("version", "words"), [("0.2", "three numbers"), (__version__, "newer"), (LAST, "newer")])
def test_a_release_of_an_impossible_version_is_refused(
    release: ModuleType, tree: Path, version: str, words: str
) -> None:
    with pytest.raises(SystemExit, match=words):
        release.prepare(version, tree, TODAY)


def test_a_release_without_changes_is_refused(release: ModuleType, tree: Path) -> None:
    release.prepare("99.0.0", tree, TODAY)
    with pytest.raises(SystemExit, match="nothing to release"):
        release.prepare("99.0.1", tree, TODAY)
