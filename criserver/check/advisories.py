"""What programs of a node are known for: faults through which a pod gets at the node or at other pods, by version.

Versions alone are what can be looked at here: nobody tries to escape from a container to see whether it works.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# "runc version 1.4.0-rc.3", "crun version 1.20.0.0.0.6-b7a4", "CNI portmap plugin v1.8.0". The text is a
# program's, of any length: names and numbers are bounded here, as the time that int() takes is not.
_TOLD = re.compile(
    r"(?:CNI )?([a-z][a-z0-9-]{0,31}) (?:version|plugin) v?([0-9]{1,6}(?:\.[0-9]{1,6}){1,7})(?!\.?[0-9])(.{0,16})"
)
# What makes a version one before the release. A "+" adds to it instead, as distributions' "~ds1" and "-0ubuntu2" do.
_STAGE = re.compile(r"[-~.]?(alpha|beta|dev|rc)[.-]?([0-9]{0,6})")


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """A version in its order: eight numbers, and before a final one its stages, in the order of their names."""

    numbers: tuple[int, ...]
    final: bool
    stage: str
    number: int


@dataclass(frozen=True, slots=True)
class Advisory:
    """A fault of ``program`` from the version ``since`` on: its CVE ids, and in ``words`` what it lets happen.

    ``fixed`` are the first versions without it, one for each branch (MAJOR.MINOR) that got one, in order. Versions
    after the last do not have it either; those of other branches before it do.
    """

    program: str
    ids: tuple[str, ...]
    words: str
    fixed: tuple[str, ...]
    since: str = "0.0"

    def of(self, found: Version) -> bool:
        """Whether a version of the program has it."""
        if found < version(self.since):
            return False
        fixed = [version(text) for text in self.fixed]
        return found < fixed[-1] and not any(
            found.numbers[:2] == sound.numbers[:2] and found >= sound for sound in fixed
        )

    @property
    def advice(self) -> str:
        """What to do about it."""
        return (
            f"install {self.program} {', '.join(self.fixed)} or newer; a distribution may have patched its own: see "
            f"its changelog ({_CHANGELOGS[self.program]})"
        )


TABLE = (
    Advisory(
        "runc",
        ("CVE-2024-21626",),
        "the working directory of a container or of an exec can be one of the node, whose files are then open to it",
        ("1.1.12",),
        since="1.0.0-rc93",
    ),
    Advisory(
        "runc",
        ("CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881"),
        "a container that shares a volume with another can have files of the node's /proc written, and so run what it "
        "likes on the node",
        ("1.2.8", "1.3.3", "1.4.0-rc.3"),
    ),
    Advisory(
        "runc",
        ("CVE-2026-41579",),
        "an image whose /dev is a symbolic link can remove files named ptmx and make links in directories of the node",
        ("1.3.6", "1.4.3", "1.5.0-rc.3"),
    ),
    Advisory(
        "crun",
        ("CVE-2025-24965",),
        "with the handler krun, an image can have a file written anywhere on the node",
        ("1.20",),
    ),
    Advisory(
        "crun",
        ("CVE-2026-47766",),
        "an image whose /dev is a symbolic link can have devices and links made in directories of the node",
        ("1.28",),
    ),
    Advisory(
        "portmap",
        ("CVE-2025-67499",),
        "with nftables, a pod's host port takes the packets to that port of everybody else, other pods too",
        ("1.9.0",),
        since="1.6.0",
    ),
)
_CHANGELOGS = {
    "runc": "apt changelog runc",
    "crun": "apt changelog crun",
    "portmap": "apt changelog containernetworking-plugins",
}


def of(told: str) -> Iterator[Advisory]:
    """What the program is known for that says ``told`` of itself; nothing where that is no version."""
    if (found := parse(told)) is not None:
        yield from (one for one in TABLE if one.program == found[0] and one.of(found[1]))


def parse(told: str) -> tuple[str, Version] | None:
    """The name and the version of the program that says ``told`` of itself, None where it does not say them."""
    found = _TOLD.match(told)
    return (found[1], _version(found[2], found[3])) if found else None


def version(text: str) -> Version:
    """The version that ``text`` is, of this module's own tables."""
    numbers = re.match(r"[0-9.]+", text)
    assert numbers is not None
    return _version(numbers[0], text[numbers.end() :])


def _version(numbers: str, rest: str) -> Version:
    found = [int(part) for part in numbers.split(".")]
    stage = _STAGE.match(rest)
    return Version(
        numbers=(*found, *[0] * (8 - len(found))),
        final=stage is None,
        stage=stage[1] if stage else "",
        number=int(stage[2] or 0) if stage else 0,
    )
