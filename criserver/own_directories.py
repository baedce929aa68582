"""The directories ``root`` and ``state``: the marker that says that one is ours, and the names that we make in it.

A daemon takes a directory for its own only if it is empty or has the marker, so that nothing of other programs is mixed
with its own. `criserver reset` deletes only these names, so that it deletes nothing of other programs either.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
from contextlib import suppress

from criserver.errors import FailedPreconditionError, told_in_words
from snapshotter.files import close_to_others, make_private

LOCK = "criserver.lock"
DATABASE = "criserver.db"


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """What a directory is for: the key of the configuration, and the names that the daemon makes in it."""

    key: str
    names: tuple[str, ...]

    @property
    def marker(self) -> str:
        """The name of the file that says that a directory is ours."""
        return f"criserver.{self.key}"


# The package's removal (contrib/deb/postrm.in) deletes the same names.
ROOT = Kind(
    "root",
    (
        *(DATABASE, f"{DATABASE}-journal", f"{DATABASE}-shm", f"{DATABASE}-wal"),
        *("checkpoints", "content", "sandboxes", "snapshots", "spool", "synced.json", "synced.json.new", "volumes"),
        LOCK,
    ),
)
STATE = Kind("state", ("containers", "ns", "records", "runtimes", "sandboxes", "shims", LOCK))

# mkfs makes it, so a disk of our own has it.
OF_THE_DISK = "lost+found"
_SHOWN = 3


def hold(
    directory: str, kind: Kind, socket: str, advice: str = "stop it, or give this one another root and state"
) -> int:
    """Make a directory that only root can enter, mark it as ours, and lock it. The kernel unlocks it with our end.

    ``socket`` is the path of the daemon's socket, which may be in the directory. Returns a descriptor, which the caller
    closes. Raises FailedPreconditionError for a directory that is not empty and not ours, for one that cannot be made
    or written to, and with ``advice`` if another process has locked it.
    """
    with told_in_words(f"{kind.key} = {directory} cannot be used"):
        if words := foreign(directory, kind, socket):
            raise FailedPreconditionError(words)
        make_private(directory)
        _mark(directory, kind)
        fd = _lock(directory, advice)
        # Releases before 0.2 let other users pass.
        close_to_others(directory)
    return fd


def _lock(directory: str, advice: str) -> int:
    fd = os.open(os.path.join(directory, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
        os.close(fd)
        raise FailedPreconditionError(f"another criserver (PID {holder}) uses {directory}; {advice}") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_ours(directory: str, kind: Kind) -> bool:
    """Whether a daemon has used the directory. Releases up to 0.2.0 made no marker, but the lock file."""
    return any(os.path.lexists(os.path.join(directory, name)) for name in (kind.marker, LOCK))


def foreign(directory: str, kind: Kind, socket: str = "") -> str:
    """Why a directory cannot become ours, "" if it can. Raises OSError."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return ""
    except NotADirectoryError:
        if not os.path.exists(directory):
            raise  # the path leads through something that is not a directory
        return f"{kind.key} = {directory}: it is not a directory; move it away, or give {kind.key} a directory"
    if is_ours(directory, kind):
        return ""
    harmless = {OF_THE_DISK}
    if os.path.realpath(os.path.dirname(socket)) == os.path.realpath(directory):
        harmless.add(os.path.basename(socket))
    found = sorted(set(names) - harmless)
    if not found:
        return ""
    shown = ", ".join(found[:_SHOWN]) + (" and more" if len(found) > _SHOWN else "")
    return (
        f"{kind.key} = {directory}: it has files that criserver did not make ({shown}), and no marker "
        f"({kind.marker}); give {kind.key} an empty directory or one that does not exist. If it is criserver's own, "
        f"`touch {os.path.join(directory, kind.marker)}`"
    )


def _mark(directory: str, kind: Kind) -> None:
    try:
        # The name alone counts: a daemon that is killed here leaves an empty file.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(os.path.join(directory, kind.marker), flags, 0o600)
    except FileExistsError:
        return
    try:
        text = f"This is the {kind.key} directory of criserver. `criserver reset` deletes what criserver made in it.\n"
        with suppress(OSError):  # a full disk
            os.write(fd, text.encode())
    finally:
        os.close(fd)
