"""How the results of the virtual machine are shown, and which packages it gets."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.vm import releases
from tests.vm.suites import Case, Result, cases, table

REPORT = b"""<testsuites><testsuite>
<testcase classname="tests.e2e.test_pods" name="test_one" time="2.5"/>
<testcase classname="tests.e2e.test_pods" name="test_two" time="1">
<failure message="short">assert 1 == 2</failure></testcase>
<testcase classname="tests.e2e.test_pods" name="test_three" time="0"><skipped message="no such device"/></testcase>
<testcase classname="tests.e2e.test_pods" name="test_four" time="1"/>
<testcase classname="tests.e2e.test_pods" name="test_four" time="0.5"><error>left behind: a mount</error></testcase>
</testsuite></testsuites>"""


def test_a_report_has_a_case_a_test_and_a_failing_teardown_counts() -> None:
    assert cases(REPORT) == [
        Case("test_pods::test_one", "passed", 2.5),
        Case("test_pods::test_two", "failed", 1.0, "assert 1 == 2"),
        Case("test_pods::test_three", "skipped", 0.0, "no such device"),
        Case("test_pods::test_four", "failed", 1.5, "left behind: a mount"),
    ]


def test_the_table_ends_with_the_counts_and_tells_failures_skips_and_what_took_longest() -> None:
    text = table([Result("pods", 7.2, cases(REPORT)), Result("a kubelet", 0, skipped="there is none")])
    lines = text.splitlines()
    assert lines[1] == "pods            1       2        1        7"
    assert lines[2] == "a kubelet       0       0        0        0  skipped: there is none"
    assert "    1 no such device" in lines
    assert "      2 s  pods: test_pods::test_one" in lines
    assert lines[lines.index("failed: pods: test_pods::test_two") + 1] == "  assert 1 == 2"
    assert lines[-1] == "1 passed, 2 failed, 1 skipped"


def test_a_suite_without_an_end_or_without_a_test_is_not_good() -> None:
    assert Result("pods", 1, [Case("a", "passed", 1)]).good
    assert Result("pods", 1, skipped="no kubelet").good
    assert not Result("pods", 1).good
    cut = Result("pods", 300, [Case("a", "passed", 1)], trouble="ended at its deadline of 300 s")
    assert not cut.good
    assert table([cut]).endswith("\n1 passed, 1 failed, 0 skipped")


def names_of_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a package be the files of the sources that it is built from, and its revision."""

    def build(source: str, python: str, revision: str) -> bytes:
        return " ".join([*sorted(set(os.listdir(source)) - {".git"}), python, revision]).encode()

    monkeypatch.setattr(releases, "build", build)


def test_the_package_of_the_last_release_is_built_from_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names_of_builds(monkeypatch)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "then").touch()
    for words in (["init", "-q"], ["add", "then"], ["commit", "-qm", "the release"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (tmp_path / "now").touch()
    monkeypatch.setitem(releases.RELEASES, releases.LAST, commit)
    found = releases.packages(str(tmp_path), "3.13")
    assert found == {releases.PRESENT_PACKAGE: b"now then 3.13 2", releases.RELEASED_PACKAGE: b"then 3.13 1"}


def test_a_clone_without_the_release_upgrades_another_build_of_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names_of_builds(monkeypatch)
    (tmp_path / "now").touch()
    wanted = {releases.PRESENT_PACKAGE: b"now 3.13 2", releases.EARLIER_PACKAGE: b"now 3.13 1"}
    assert releases.packages(str(tmp_path), "3.13") == wanted
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    assert releases.packages(str(tmp_path), "3.13") == wanted
