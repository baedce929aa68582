"""The parts of a checkpoint's archive, with the names and formats that checkpointctl reads.

The functions block: call them in a thread. They call ``check`` now and then; it raises an error to end the work early.
The file trees belong to a container, so no link in them is followed.
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
# Each entry of an archive contains its whole path: a container could fill the disk with deeply nested directories.
_MAX_NAME = 16 << 10
# The kernel's overflow ID (proc(5), /proc/sys/fs/overflowuid): an owner that the user namespace does not map.
_NOBODY = 65534
# Extended attributes that files in an image's layer may have too.
_KEPT_XATTRS = ("user.", "security.capability")
# The kernel marks a file with these if its content or its original path is in a lower layer.
_REFERENCES = {"trusted.overlay.redirect", "trusted.overlay.metacopy"}


def config_dump(container: Container, image_name: str, runtime: str, now: int) -> dict[str, Any]:
    """The content of config.dump: the container's identity; ``now`` in Unix nanoseconds."""
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
    """The content of the file "status": the container's state; times in Unix nanoseconds."""
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
    """Write the upper directory of an overlay to ``path``, in the format of an image's layer (image spec, layer.md).

    The owners are written as a pod with the user namespace ``user`` sees them. Returns the files of lower layers that
    are deleted, as paths in the container. Raises OSError, and FailedPreconditionError if the diff would be incomplete.
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
                    f"/{name} refers to the image's layers, which a checkpoint cannot contain; set the "
                    "overlay module's redirect_dir and metacopy to off"
                )
            _add(tar, source, name, check, xattrs, user)
            # Only "y" means opaque. "x" means that the directory has whiteouts that are extended attributes.
            if xattrs.get("trusted.overlay.opaque") == b"y":
                tar.addfile(tarfile.TarInfo(os.path.join(name, ".wh..wh..opq")))
    return sorted(deleted)


def write_archive(directory: str, log_path: str, path: str, check: Callable[[], None]) -> None:
    """Write all of ``directory``, and the container's log if it has one, to the existing file ``path``.

    The archive is synced to the disk on return. Raises OSError.
    """
    with _new_tar(path) as tar:
        for name, source in _walk(directory):
            _add(tar, source, name, check)
        if log_path and os.path.isfile(log_path):
            # The log may grow meanwhile. Only the bytes that it had when its size was read are copied.
            _add(tar, log_path, "container.log", check)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _new_tar(path: str) -> tarfile.TarFile:
    # pax allows names of any bytes and length, extended attributes, and times in nanoseconds.
    return tarfile.TarFile(path, "w", format=tarfile.PAX_FORMAT, encoding="utf-8", copybufsize=_PIECE)


def _walk(directory: str) -> Iterator[tuple[str, str]]:
    """All entries of a directory tree: the path below ``directory``, and a path to open the entry by.

    The second path works at any depth, until the next entry is taken. A directory comes before its entries. Raises
    FailedPreconditionError for a path that is too long.
    """
    top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for place, entry in file_tree.walk(top):
            name = place.path_of(entry.name)
            if len(name) > _MAX_NAME:
                problem = f"has a path of more than {_MAX_NAME} characters, which a checkpoint cannot contain"
                raise FailedPreconditionError(f"{file_tree.shortened(name)!r} {problem}")
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
        # It is a socket: tar has no entry for it, and it has no content.
        if entry is None:
            return
        # The user and group names of the host mean nothing in the container.
        entry.uname = entry.gname = ""
        if user is not None:
            entry.uid, entry.gid = _container_id(entry.uid, user.uids), _container_id(entry.gid, user.gids)
        entry.pax_headers = {
            f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape")
            for key, value in (xattrs or {}).items()
            if key.startswith(_KEPT_XATTRS)
        }
        tar.addfile(entry, None if content is None else _Checked(content, check))


def _open(path: str) -> IO[bytes]:
    """Open a regular file. Raises OSError for any other kind: the container may have replaced the file."""
    return open(files.open_regular(path, follow=False), "rb")


def _container_id(host_id: int, ids: IdMapping) -> int:
    offset = host_id - ids.host_id
    return ids.container_id + offset if 0 <= offset < ids.length else _NOBODY


def _rfc3339(at: int) -> str:
    seconds, nanoseconds = divmod(at, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"


class _Checked:
    """A file that calls ``check`` before each read, so that copying it can be ended early."""

    def __init__(self, file: IO[bytes], check: Callable[[], None]) -> None:
        self._file = file
        self._check = check

    def read(self, size: int = -1) -> bytes:
        self._check()
        return self._file.read(size)
