"""Account files of an untrusted image, read as getpwnam(3) and getgrnam(3) read them (passwd(5), group(5)).

The files are bytes: only a newline ends a line, and only a colon ends a field. As in the C library, lines that are no
entries are skipped: comments, too few fields, an ID that is no number or too large, names that begin with "+" or "-".
Only one line is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import BinaryIO

from criserver.errors import FailedPreconditionError
from criserver.model import MAX_GROUPS, MAX_ID
from criserver.numbers import decimal

# Bytes. A longer line is skipped. The line of a group with 5,000 members is shorter.
_MAX_LINE = 64 << 10
# runc before 1.3 makes about 50 million a second. A real image has a hundred lines, a container ten groups.
_MAX_COMPARISONS = 50_000_000
# White space before an entry, as in isspace(3).
_BLANKS = b" \t\v\f\r"


@dataclass(frozen=True, slots=True)
class Account:
    """An entry of a passwd file."""

    name: bytes
    uid: int
    gid: int


def accounts(passwd: BinaryIO) -> Iterator[Account]:
    """The entries of a passwd file."""
    for line in _lines(passwd):
        fields = line.split(b":", 4)
        if len(fields) < 4:
            continue
        uid, gid = decimal(fields[2], MAX_ID), decimal(fields[3], MAX_ID)
        if uid is not None and gid is not None:
            yield Account(fields[0], uid, gid)


def group_id(group: BinaryIO, name: bytes) -> int | None:
    """The ID of the group with this name in a group file; None where there is none."""
    return next((gid for entry, gid, _ in _groups(group) if entry == name), None)


def memberships(group: BinaryIO, user: bytes) -> set[int]:
    """The IDs of the groups with this user in a group file.

    Raises FailedPreconditionError for more groups than the kernel allows for a process.
    """
    gids: set[int] = set()
    for _, gid, members in _groups(group):
        if user in members and any(member.lstrip(_BLANKS) == user for member in members.split(b",")):
            gids.add(gid)
            if len(gids) > MAX_GROUPS:
                raise FailedPreconditionError(
                    f"the image's /etc/group has its user in more than {MAX_GROUPS} groups; the kernel allows no more"
                )
    return gids


def claimed(group: BinaryIO, gids: Set[int]) -> set[int]:
    """Those of ``gids`` that are also the name of a group with another ID in a group file.

    runc before 1.3 looks up additional groups in the image's /etc/group, by name and by ID, and uses the first match.
    It accepts more lines as entries than the C library, so this function looks at every line. Raises
    FailedPreconditionError where runc would need too long.
    """
    names = {str(gid): gid for gid in gids}
    claimed_gids: set[int] = set()
    lines = 0
    while line := group.readline(_MAX_LINE):
        lines += 1
        name, *rest = line.split(b":", 3)
        gid = names.get(name.decode(errors="replace").strip())
        if gid is not None and (len(rest) < 2 or decimal(rest[1].strip(), MAX_ID) != gid):
            claimed_gids.add(gid)
    if lines * len(gids) > _MAX_COMPARISONS:
        raise FailedPreconditionError(
            f"the image's /etc/group has {lines} lines and the container {len(gids)} groups; the OCI runtime compares "
            "each line with each group, which would take too long"
        )
    return claimed_gids


def _groups(group: BinaryIO) -> Iterator[tuple[bytes, int, bytes]]:
    """Name, ID and members of each entry of a group file."""
    for line in _lines(group):
        fields = line.split(b":", 4)
        if len(fields) >= 3 and (gid := decimal(fields[2], MAX_ID)) is not None:
            yield fields[0], gid, fields[3] if len(fields) > 3 else b""


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines that may be entries, without their newlines."""
    whole = True
    while line := file.readline(_MAX_LINE):
        # The rest of a long line is no line of its own.
        begins, whole = whole, line.endswith(b"\n")
        if not begins or len(line) == _MAX_LINE:
            continue
        line = line.rstrip(b"\n").lstrip(_BLANKS)
        if line and line[:1] not in b"#+-:" and b"\0" not in line:
            yield line
