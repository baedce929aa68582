"""Known faults of a program by its version: releases, candidates, and versions of distributions."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criserver.check import advisories

ESCAPES_OF_2025 = ("CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881")


def ids(told: str) -> set[str]:
    return {identifier for advisory in advisories.of(told) for identifier in advisory.ids}


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("1.1.9", "1.1.12"),
        ("1.4.0-rc.2", "1.4.0-rc.3"),
        ("1.4.0-rc.9", "1.4.0-rc.10"),
        ("1.4.0-rc.3", "1.4.0"),
        ("1.0.0-rc92+dev", "1.0.0-rc93"),
        ("1.4.0-dev", "1.4.0-rc.1"),
        ("1.4.0~rc1", "1.4.0"),
        ("1.4.0-alpha.2", "1.4.0-beta.1"),
        ("1.9", "1.20"),
        ("1.20", "1.20.1"),
        ("1.99.99", "2.0"),
        ("1.14.3", "1.14.3.0.0.0.6-b7a4"),
        ("1.14.3.0.0.0.6-b7a4", "1.14.4"),
    ],
)
def test_versions_follow_on_each_other(older: str, newer: str) -> None:
    one, other = advisories.parse(f"runc version {older}"), advisories.parse(f"runc version {newer}")
    assert one is not None
    assert other is not None
    assert one[1] < other[1]


@pytest.mark.parametrize(
    ("told", "same"),
    [
        ("1.1.5+ds1", "1.1.5"),
        ("1.1.5~ds1", "1.1.5"),
        ("1.1.12-0ubuntu2~22.04.1", "1.1.12"),
        ("1.2.0+dev", "1.2.0"),
        ("1.4.0~rc.3+ds1", "1.4.0-rc.3"),
        ("1.20", "1.20.0"),
        ("v1.8.0", "1.8.0"),
    ],
)
def test_what_a_distribution_adds_is_no_other_version(told: str, same: str) -> None:
    assert advisories.parse(f"runc version {told}") == ("runc", advisories.version(same))


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("runc version 1.1.5+ds1", {"CVE-2024-21626", *ESCAPES_OF_2025, "CVE-2026-41579"}),
        ("runc version 1.1.11", {"CVE-2024-21626", *ESCAPES_OF_2025, "CVE-2026-41579"}),
        ("runc version 1.1.12", {*ESCAPES_OF_2025, "CVE-2026-41579"}),
        ("runc version 1.2.0-rc.1", {*ESCAPES_OF_2025, "CVE-2026-41579"}),
        ("runc version 1.2.7", {*ESCAPES_OF_2025, "CVE-2026-41579"}),
        ("runc version 1.2.8", {"CVE-2026-41579"}),
        ("runc version 1.3.2", {*ESCAPES_OF_2025, "CVE-2026-41579"}),
        ("runc version 1.3.3", {"CVE-2026-41579"}),
        ("runc version 1.3.6", set()),
        ("runc version 1.4.0-rc.2", {*ESCAPES_OF_2025, "CVE-2026-41579"}),
        ("runc version 1.4.0-rc.3", {"CVE-2026-41579"}),
        ("runc version 1.4.3", set()),
        ("runc version 1.5.0-rc.2", {"CVE-2026-41579"}),
        ("runc version 1.5.0-rc.3", set()),
        ("runc version 1.5.0", set()),
        ("runc version 2.0.0", set()),
        ("crun version 1.8.1", {"CVE-2025-24965", "CVE-2026-47766"}),
        ("crun version 1.19.1", {"CVE-2025-24965", "CVE-2026-47766"}),
        ("crun version 1.20", {"CVE-2026-47766"}),
        ("crun version 1.28", set()),
        ("CNI portmap plugin v1.5.1", set()),
        ("CNI portmap plugin v1.6.0", {"CVE-2025-67499"}),
        ("CNI portmap plugin v1.8.0", {"CVE-2025-67499"}),
        ("CNI portmap plugin v1.9.0", set()),
        # Nothing is known of what is no version, or a version of something else.
        ("CNI portmap plugin version unknown", set()),
        ("runsc version release-20240109.0", set()),
        ("youki version 0.3.0", set()),
        ("runc version unknown", set()),
        ("runc version 1", set()),
        ("my runc version 1.1.5", set()),
        ("", set()),
        ("runc version 9999999999999999999999.1", set()),
        ("runc version 1.9999999999999999999999", set()),
        (f"runc version 1.{'0' * 100_000}", set()),
        (f"runc version 1.{'1.' * 100_000}", set()),
        ("runc version \u0661.\u0661", set()),
    ],
)
def test_what_a_version_is_known_for(told: str, expected: set[str]) -> None:
    assert ids(told) == expected


@given(st.text() | st.from_regex(r"runc version [0-9.]*[-+~]?(rc|dev)?[0-9.]*"))
def test_any_text_is_a_version_or_none(told: str) -> None:
    list(advisories.of(told))


def test_the_table_is_in_order() -> None:
    for advisory in advisories.TABLE:
        assert all(re.fullmatch(r"CVE-20[0-9]{2}-[0-9]{4,}", identifier) for identifier in advisory.ids)
        versions = [advisories.version(text) for text in advisory.fixed]
        assert versions == sorted(versions)
        assert len({v.numbers[:2] for v in versions}) == len(versions), "one for each branch"
        assert advisories.version(advisory.since) < versions[0]
