"""What a checkpoint's archive is made of, in the names and forms that checkpointctl reads.

Blocking functions on files, for a thread; ``check`` is called now and then, and raises what is to end them early. What
is in the trees is a container's own: no link in them is followed.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import IO, Any

from criserver.errors import FailedPreconditionError
from criserver.model import IdMapping, UserNamespace
from criserver.runtime.records import Container
from snapshotter import file_tree, files

_PIECE = 1 << 20
# Each entry has its path in it: a container could fill the disk with a few directories in each other.
_MAX_NAME = 16 << 10
# The kernel's overflow ID (proc(5), /proc/sys/fs/overflowuid): an owner that a user namespace has no name for.
_NOBODY = 65534
# Extended attributes that an image's layer may have as well.
_KEPT_XATTRS = ("user.", "security.capability")
# With these the kernel keeps renamed or changed files by reference to the layers below.
_REFERENCES = {"trusted.overlay.redirect", "trusted.overlay.metacopy"}


def config_dump(container: Container, image_name: str, runtime: str, now: int) -> dict[str, Any]:
    """config.dump: which container it was; ``now`` in Unix nanoseconds."""
    return {
        "id": container.id,
        "name": container.config.name,
        "rootfsImage": image_name,
        "rootfsImageRef": container.image_ref,
        "rootfsImageName": image_name,
        "runtime": runtime,
        "createdTime": _rfc3339(container.created_at),
        "checkpointedTime": _rfc3339(now),
        "restoredTime": "0001-01-01T00:00:00Z",
        "restored": False,
    }


def status_dump(container: Container) -> dict[str, Any]:
    """status: what had become of the container; times in Unix nanoseconds."""
    return {
        "CreatedAt": container.created_at,
        "StartedAt": container.started_at,
        "FinishedAt": container.finished_at,
        "ExitCode": container.exit_code,
        "Pid": container.pid,
        "Reason": container.reason,
        "Message": container.message,
    }


def write_diff(upper: str, path: str, user: UserNamespace | None, check: Callable[[], None]) -> list[str]:
    """Write the upper directory of an overlay to ``path`` as an image's layer (image specification, layer.md).

    The owners are those that a pod with the user namespace ``user`` sees. Returns what is deleted of the layers below,
    as paths in the container. Raises OSError, FailedPreconditionError where the diff cannot be whole.
    """
    deleted = []
    with _new_tar(path) as tar:
        for name, source in _walk(upper):
            status = os.lstat(source)
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                directory, base = os.path.split(name)
                tar.addfile(tarfile.TarInfo(os.path.join(directory, ".wh." + base)))
                deleted.append("/" + name)
                continue
            keys = os.listxattr(source, follow_symlinks=False)
            xattrs = {key: os.getxattr(source, key, follow_symlinks=False) for key in keys}
            if xattrs.keys() & _REFERENCES:
                raise FailedPreconditionError(
                    f"/{name} is kept by reference to the image's layers, which no checkpoint can hold; set the "
                    "overlay module's redirect_dir and metacopy to off"
                )
            _add(tar, source, name, check, xattrs, user)
            # The value "x" says that the directory has whiteouts made of attributes, and not that it is opaque.
            if xattrs.get("trusted.overlay.opaque") == b"y":
                tar.addfile(tarfile.TarInfo(os.path.join(name, ".wh..wh..opq")))
    return sorted(deleted)


def write_archive(directory: str, log_path: str, path: str, check: Callable[[], None]) -> None:
    """Write all that is in ``directory``, and the container's log where there is one, to the existing ``path``.

    It is on disk afterwards. Raises OSError.
    """
    with _new_tar(path) as tar:
        for name, source in _walk(directory):
            _add(tar, source, name, check)
        if log_path and os.path.isfile(log_path):
            # It may grow meanwhile: as much as it holds when its size is taken is copied.
            _add(tar, log_path, "container.log", check)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _new_tar(path: str) -> tarfile.TarFile:
    # pax, for names of any bytes and length, extended attributes, and times of nanoseconds.
    return tarfile.TarFile(path, "w", format=tarfile.PAX_FORMAT, encoding="utf-8", copybufsize=_PIECE)


def _walk(directory: str) -> Iterator[tuple[str, str]]:
    """Everything in a directory, by its name below it and a path that is good until the next, however deep it is.

    Directories come before what is in them. Raises FailedPreconditionError for a name that is too long.
    """
    top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for place, entry in file_tree.walk(top):
            name = place.path_of(entry.name)
            if len(name) > _MAX_NAME:
                words = f"has a path of more than {_MAX_NAME} characters, which no checkpoint can hold"
                raise FailedPreconditionError(f"{file_tree.shortened(name)!r} {words}")
            yield name, f"/proc/self/fd/{place.fd}/{entry.name}"
    finally:
        os.close(top)


def _add(
    tar: tarfile.TarFile,
    source: str,
    name: str,
    check: Callable[[], None],
    xattrs: Mapping[str, bytes] | None = None,
    user: UserNamespace | None = None,
) -> None:
    check()
    with ExitStack() as stack:
        content = stack.enter_context(_open(source)) if stat.S_ISREG(os.lstat(source).st_mode) else None
        entry = tar.gettarinfo(source, name, content)
        # There is no way to write a socket, and nothing in it.
        if entry is None:
            return
        # The host's names mean nothing in the container.
        entry.uname = entry.gname = ""
        if user is not None:
            entry.uid, entry.gid = _seen(entry.uid, user.uids), _seen(entry.gid, user.gids)
        entry.pax_headers = {
            f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape")
            for key, value in (xattrs or {}).items()
            if key.startswith(_KEPT_XATTRS)
        }
        tar.addfile(entry, None if content is None else _Checked(content, check))


def _open(path: str) -> IO[bytes]:
    """A regular file. Raises OSError for anything else, which a container may have put in its place."""
    return open(files.open_regular(path, follow=False), "rb")


def _seen(host_id: int, ids: IdMapping) -> int:
    offset = host_id - ids.host_id
    return ids.container_id + offset if 0 <= offset < ids.length else _NOBODY


def _rfc3339(at: int) -> str:
    seconds, nanoseconds = divmod(at, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"


class _Checked:
    """A file; each reading of it may be the last."""

    def __init__(self, file: IO[bytes], check: Callable[[], None]) -> None:
        self._file = file
        self._check = check

    def read(self, size: int = -1) -> bytes:
        self._check()
        return self._file.read(size)
