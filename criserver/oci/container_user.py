"""The user and groups of a container's process. Names are looked up in the image's own account files.

The sources are the image's USER ("user" or "user:group", each a name or a number; OCI image-spec config "User") and the
CRI fields run_as_user, run_as_username and run_as_group, which override it (CRI LinuxContainerSecurityContext). A
number is never looked up as a name: an image could give a root account the name "1000".
"""

from __future__ import annotations

from typing import BinaryIO

from criserver.errors import FailedPreconditionError
from criserver.model import MAX_GROUPS, User, UserNamespace
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

    ``user`` and ``group`` are numbers or names. With "" the user is root, and the group is that of the user's account,
    or 0 without a user. ``passwd`` and ``groups`` are the image's files, empty where it has none. A name must be in
    them, a number need not be. With ``strict`` the process has the groups ``supplemental`` alone. Without it the
    process also has all groups of the user in the image.

    Raises FailedPreconditionError for a user or group that is missing, and for more groups than the kernel allows.
    """
    # A group without a user: root with this group, and without those of root's account.
    account = Account(b"", 0, 0) if user == "" and group != "" else _account(user or 0, passwd)
    if group == "":
        gid = 0 if user == "" else account.gid
    else:
        gid = _gid(group, groups)
    gids = {gid, *supplemental}
    if account.name and not strict:
        groups.seek(0)
        gids |= memberships(groups, account.name)
    if len(gids) > MAX_GROUPS:
        raise FailedPreconditionError(f"the container has {len(gids)} groups; the kernel allows {MAX_GROUPS}")
    groups.seek(0)
    if others := claimed(groups, gids):
        # The process keeps its primary group in any case.
        gids.discard(gid)
        if others & gids:
            raise FailedPreconditionError(
                f"the image's /etc/group has a group of another ID that is named '{min(others & gids)}', which the "
                "OCI runtime may take for the number; build the image without that name"
            )
    return User(account.uid, gid, tuple(sorted(gids)))


def _account(user: int | str, passwd: BinaryIO) -> Account:
    if isinstance(user, int):
        return next((a for a in accounts(passwd) if a.uid == user), Account(b"", user, 0))
    name = _name(user)
    for account in accounts(passwd):
        if account.name == name:
            return account
    raise FailedPreconditionError(
        f"user {quoted(user, _SHOWN)} is not in the image's /etc/passwd; use one that is, or a number"
    )


def _name(text: str) -> bytes:
    """The bytes of a name in a file. Raises FailedPreconditionError for a number, which is no valid name."""
    if text.isascii() and text.isdigit():
        raise FailedPreconditionError(
            f"{quoted(text, _SHOWN)} is given as a name, but it is a number; give it as a number"
        )
    return text.encode()


def _gid(group: int | str, groups: BinaryIO) -> int:
    if isinstance(group, int):
        return group
    gid = group_id(groups, _name(group))
    if gid is None:
        raise FailedPreconditionError(
            f"group {quoted(group, _SHOWN)} is not in the image's /etc/group; use one that is, or a number"
        )
    return gid


def check_mapped(user: User, namespace: UserNamespace | None, container: str) -> None:
    """Raises FailedPreconditionError for a user or group that the pod's user namespace does not have."""
    if namespace is None:
        return
    used = (("user", [user.uid], namespace.uids), ("group", [user.gid, *user.groups], namespace.gids))
    for kind, numbers, mapping in used:
        for number in numbers:
            if mapping.host_id_of(number) is None:
                raise FailedPreconditionError(
                    f"container {container}: {kind} ID {number} is not in the pod's user namespace, which has the IDs "
                    f"0 to {mapping.length - 1}; use a lower one, or run the pod with hostUsers: true"
                )
