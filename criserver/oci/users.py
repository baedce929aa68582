"""Who a container runs as: names and numbers looked up in the image's own /etc/passwd and /etc/group.

The rules are the field's for USER of an image ("user", "user:group", each a name or a number) with the CRI
fields run_as_user, run_as_username and run_as_group over it (OCI image-spec config "User"; CRI
LinuxContainerSecurityContext).
"""

from __future__ import annotations

from dataclasses import dataclass

from criserver.errors import FailedPreconditionError
from criserver.model import User

_MAX_ID = 2**32 - 2


@dataclass(frozen=True, slots=True)
class _Account:
    name: str
    uid: int
    gid: int


def resolve(
    *,
    image_user: str,
    run_as_user: int | None,
    run_as_username: str,
    run_as_group: int | None,
    supplemental: tuple[int, ...],
    strict: bool,
    passwd: str,
    group: str,
) -> User:
    """The numbers for one container.

    ``passwd`` and ``group`` are the texts of the image's files, "" where it has none. A number need not be in
    them; a name must be. With ``strict`` only ``supplemental`` is added; without, also every group that the
    image puts the user in. Raises FailedPreconditionError that names the missing user or group.
    """
    accounts = _accounts(passwd)
    wanted_group = ""
    if run_as_user is not None:
        wanted = str(run_as_user)
    elif run_as_username:
        wanted = run_as_username
    else:
        wanted, _, wanted_group = image_user.partition(":")
    account = _account(wanted or "0", accounts, named=bool(run_as_username) and run_as_user is None)
    gid = run_as_group if run_as_group is not None else account.gid
    if run_as_group is None and wanted_group:
        gid = _group_id(wanted_group, group)
    memberships = () if strict else _memberships(account.name, group)
    return User(account.uid, gid, tuple(sorted({gid, *supplemental, *memberships})))


def _accounts(passwd: str) -> list[_Account]:
    """The well-formed lines of a passwd file; images hold all kinds of others, which are passed over."""
    found = []
    for line in passwd.splitlines():
        fields = line.split(":")
        if len(fields) >= 4 and fields[2].isdecimal() and fields[3].isdecimal():
            found.append(_Account(fields[0], int(fields[2]), int(fields[3])))
    return found


def _account(wanted: str, accounts: list[_Account], *, named: bool) -> _Account:
    for account in accounts:
        if account.name == wanted:
            return account
    if wanted.isdecimal() and int(wanted) <= _MAX_ID and not named:
        uid = int(wanted)
        return next((a for a in accounts if a.uid == uid), _Account("", uid, 0))
    raise FailedPreconditionError(
        f"user {wanted!r} is not in the image's /etc/passwd; name one that is, or give a number"
    )


def _group_id(wanted: str, group: str) -> int:
    for line in group.splitlines():
        fields = line.split(":")
        if len(fields) >= 3 and fields[0] == wanted and fields[2].isdecimal():
            return int(fields[2])
    if wanted.isdecimal() and int(wanted) <= _MAX_ID:
        return int(wanted)
    raise FailedPreconditionError(
        f"group {wanted!r} is not in the image's /etc/group; name one that is, or give a number"
    )


def _memberships(user: str, group: str) -> tuple[int, ...]:
    if not user:
        return ()
    found = []
    for line in group.splitlines():
        fields = line.split(":")
        if len(fields) >= 4 and fields[2].isdecimal() and user in fields[3].split(","):
            found.append(int(fields[2]))
    return tuple(found)
