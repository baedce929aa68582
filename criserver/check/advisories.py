"""Known faults of the node's programs, by version: a pod can use them to attack the node or other pods.

Only the version is compared. No check tries to escape from a container.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# "runc version 1.4.0-rc.3", "crun version 1.20.0.0.0.6-b7a4", "CNI portmap plugin v1.8.0". A program may print a text
# of any length. The pattern limits names and numbers, because int() takes long for many digits.
_TOLD = re.compile(
    r"(?:CNI )?([a-z][a-z0-9-]{0,31}) (?:version|plugin) v?([0-9]{1,6}(?:\.[0-9]{1,6}){1,7})(?!\.?[0-9])(.{0,16})"
)
# The suffix of a version before its release. A suffix after "+" comes after the release, as do the suffixes of
# distributions, such as "~ds1" and "-0ubuntu2".
_STAGE = re.compile(r"[-~.]?(alpha|beta|dev|rc)[.-]?([0-9]{0,6})")


@dataclass(frozen=True, slots=True, order=True)
class ProgramVersion:
    """A version that can be compared: eight numbers. A release candidate or other stage comes before its release."""

    numbers: tuple[int, ...]
    final: bool
    stage: str
    number: int


@dataclass(frozen=True, slots=True)
class Advisory:
    """A fault of ``program`` from the version ``since`` on: its CVE IDs, and in ``words`` what an attacker can do.

    ``fixed`` has the first version without the fault for each branch (MAJOR.MINOR) that was mended, in order. Versions
    after the last of them do not have the fault. Earlier versions of other branches do.
    """

    program: str
    ids: tuple[str, ...]
    words: str
    fixed: tuple[str, ...]
    since: str = "0.0"

    def of(self, found: ProgramVersion) -> bool:
        """Whether a version of the program has the fault."""
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
        "the working directory of a container or exec can be a directory of the node; the container can then use the "
        "node's files",
        ("1.1.12",),
        since="1.0.0-rc93",
    ),
    Advisory(
        "runc",
        ("CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881"),
        "a container that shares a volume with another container can write files of the node's /proc, and so run any "
        "program on the node",
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
        "with the handler krun, an image can write a file anywhere on the node",
        ("1.20",),
    ),
    Advisory(
        "crun",
        ("CVE-2026-47766",),
        "an image whose /dev is a symbolic link can make devices and links in directories of the node",
        ("1.28",),
    ),
    Advisory(
        "portmap",
        ("CVE-2025-67499",),
        "with nftables, a pod with a host port gets all packets to that port, also packets to other pods and machines",
        ("1.9.0",),
        since="1.6.0",
    ),
)
_CHANGELOGS = {
    "runc": "apt changelog runc",
    "crun": "apt changelog crun",
    "portmap": "apt changelog containernetworking-plugins",
}


def of(output: str) -> Iterator[Advisory]:
    """The known faults of a program that prints ``output`` for --version; none if that is not a version."""
    if (found := parse(output)) is not None:
        yield from (one for one in TABLE if one.program == found[0] and one.of(found[1]))


def parse(output: str) -> tuple[str, ProgramVersion] | None:
    """The name and version in the text ``output`` that a program prints for --version; None if they are not in it."""
    found = _TOLD.match(output)
    return (found[1], _version(found[2], found[3])) if found else None


def version(text: str) -> ProgramVersion:
    """The version that ``text`` from the tables of this module stands for."""
    numbers = re.match(r"[0-9.]+", text)
    assert numbers is not None
    return _version(numbers[0], text[numbers.end() :])


def _version(numbers: str, rest: str) -> ProgramVersion:
    found = [int(part) for part in numbers.split(".")]
    stage = _STAGE.match(rest)
    return ProgramVersion(
        numbers=(*found, *[0] * (8 - len(found))),
        final=stage is None,
        stage=stage[1] if stage else "",
        number=int(stage[2] or 0) if stage else 0,
    )
