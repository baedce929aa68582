"""Who a container runs as: numbers as they are given, names looked up in the image's own account files.

The rules are the field's for USER of an image ("user", "user:group", each a name or a number) with the CRI
fields run_as_user, run_as_username and run_as_group over it (OCI image-spec config "User"; CRI
LinuxContainerSecurityContext). A number is never looked up as a name: an image could name a root account "1000".
"""

from __future__ import annotations

from typing import BinaryIO

from criserver.errors import FailedPreconditionError
from criserver.model import MAX_GROUPS, User
from criserver.oci.accounts import Account, accounts, claimed, group_id, memberships
from criserver.text import quoted

_SHOWN = 64


def resolve(
    *,
    user: int | str,
    group: int | str,
    supplemental: tuple[int, ...],
    strict: bool,
    passwd: BinaryIO,
    groups: BinaryIO,
) -> User:
    """The numbers for one container.

    ``user`` and ``group`` are numbers or names. With "" the user is root, and the group that of the user's account.
    ``passwd`` and ``groups`` are the image's files, empty where it has none; a number need not be in them, a name must
    be. With ``strict`` only ``supplemental`` is added; without, also every group that the image puts the user in.
    Raises FailedPreconditionError that names the missing user or group, and for more groups than the kernel takes.
    """
    account = _account(user or 0, passwd)
    gid = account.gid if group == "" else _gid(group, groups)
    found = {gid, *supplemental}
    if account.name and not strict:
        groups.seek(0)
        found |= memberships(groups, account.name)
    if len(found) > MAX_GROUPS:
        raise FailedPreconditionError(f"the container has {len(found)} groups; the kernel takes {MAX_GROUPS}")
    groups.seek(0)
    if others := claimed(groups, found):
        # The process has its primary group all the same.
        found.discard(gid)
        if others & found:
            raise FailedPreconditionError(
                f"the image's /etc/group has a group of another ID that is named '{min(others & found)}', which the "
                "OCI runtime may take for the number; build the image without that name"
            )
    return User(account.uid, gid, tuple(sorted(found)))


def _account(user: int | str, passwd: BinaryIO) -> Account:
    if isinstance(user, int):
        return next((a for a in accounts(passwd) if a.uid == user), Account(b"", user, 0))
    name = _name(user)
    for account in accounts(passwd):
        if account.name == name:
            return account
    raise FailedPreconditionError(
        f"user {quoted(user, _SHOWN)} is not in the image's /etc/passwd; name one that is, or give a number"
    )


def _name(text: str) -> bytes:
    """A name as it stands in a file. Raises FailedPreconditionError for a number, which is nobody's name."""
    if text.isascii() and text.isdigit():
        raise FailedPreconditionError(f"{quoted(text, _SHOWN)} is given as a name and is a number; give it as a number")
    return text.encode()


def _gid(group: int | str, groups: BinaryIO) -> int:
    if isinstance(group, int):
        return group
    found = group_id(groups, _name(group))
    if found is None:
        raise FailedPreconditionError(
            f"group {quoted(group, _SHOWN)} is not in the image's /etc/group; name one that is, or give a number"
        )
    return found
