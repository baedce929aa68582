"""What a checkpoint's archive is made of, in the names and forms that checkpointctl reads.

Blocking functions on files, for a thread: each takes an event that cuts it short, with InterruptedError. The trees
that they read do not change meanwhile; what is in them is a container's own, and no link of it is followed.
"""

from __future__ import annotations

import os
import stat
import tarfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import IO, Any

from criserver.errors import FailedPreconditionError
from criserver.runtime.records import Container

_WHITEOUT = ".wh."
_OPAQUE_MARK = ".wh..wh..opq"
_PIECE = 1 << 20
_NEVER = "0001-01-01T00:00:00Z"
# Extended attributes that an image's layer may have as well.
_KEPT_XATTRS = ("user.", "security.capability")


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
        "restoredTime": _NEVER,
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


def write_diff(upper: str, path: str, cut: threading.Event) -> list[str]:
    """Write the upper directory of an overlay to ``path`` as an image's layer (image specification, layer.md).

    Returns what it deletes of the layers below, as paths in the container. Raises OSError, FailedPreconditionError
    where the kernel has kept renamed or changed files by reference to the layers below.
    """
    deleted = []
    with _create(path) as tar:
        for name in _walk(upper):
            source = os.path.join(upper, name)
            status = os.lstat(source)
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                directory, base = os.path.split(name)
                tar.addfile(tarfile.TarInfo(os.path.join(directory, _WHITEOUT + base)))
                deleted.append("/" + name)
                continue
            _add(tar, source, name, cut)
            marks = _overlay_marks(source)
            if marks & {"trusted.overlay.redirect", "trusted.overlay.metacopy"}:
                raise FailedPreconditionError(
                    f"/{name} is kept by reference to the image's layers, which no checkpoint can hold; set the "
                    "overlay module's redirect_dir and metacopy to off"
                )
            if "trusted.overlay.opaque" in marks:
                tar.addfile(tarfile.TarInfo(os.path.join(name, _OPAQUE_MARK)))
    return deleted


def write_archive(directory: str, log_path: str, path: str, cut: threading.Event) -> None:
    """Write all that is in ``directory``, and the container's log where there is one, to the existing ``path``.

    It is on disk afterwards. Raises OSError.
    """
    with _create(path) as tar:
        for name in _walk(directory):
            _add(tar, os.path.join(directory, name), name, cut)
        if log_path:
            _add_log(tar, log_path, cut)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def error_lines(dump_log: str) -> list[str]:
    """The last errors that criu told of in its log, without their times."""
    return [line[line.index("Error (") :] for line in dump_log.splitlines() if "Error (" in line][-3:]


def _create(path: str) -> tarfile.TarFile:
    # pax, for names of any bytes and length, extended attributes, and times of nanoseconds.
    return tarfile.TarFile(path, "w", format=tarfile.PAX_FORMAT, encoding="utf-8", copybufsize=_PIECE)


def _walk(top: str) -> Iterator[str]:
    """Everything below ``top`` by its relative name, directories before what is in them."""
    pending = [""]
    while pending:
        directory = pending.pop()
        with os.scandir(os.path.join(top, directory)) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            name = os.path.join(directory, entry.name)
            yield name
            if entry.is_dir(follow_symlinks=False):
                pending.append(name)


def _add(tar: tarfile.TarFile, source: str, name: str, cut: threading.Event) -> None:
    entry = tar.gettarinfo(source, name)
    # There is no way to write a socket, and nothing in it.
    if entry is None:
        return
    # The host's names mean nothing in the container.
    entry.uname = entry.gname = ""
    entry.pax_headers = {
        "SCHILY.xattr." + name: os.getxattr(source, name, follow_symlinks=False).decode("utf-8", "surrogateescape")
        for name in os.listxattr(source, follow_symlinks=False)
        if name.startswith(_KEPT_XATTRS)
    }
    if entry.isreg():
        with open(source, "rb") as file:
            tar.addfile(entry, _Cuttable(file, cut))
    else:
        tar.addfile(entry)


def _add_log(tar: tarfile.TarFile, path: str, cut: threading.Event) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    with open(fd, "rb") as file:
        # The log may grow now: as much as it held at this moment is taken.
        entry = tar.gettarinfo(arcname="container.log", fileobj=file)
        entry.uname = entry.gname = ""
        tar.addfile(entry, _Cuttable(file, cut))


def _overlay_marks(path: str) -> set[str]:
    marks = set(os.listxattr(path, follow_symlinks=False))
    # The value "x" says that the directory has whiteouts made of attributes, and not that it is opaque.
    if "trusted.overlay.opaque" in marks and os.getxattr(path, "trusted.overlay.opaque") != b"y":
        marks.remove("trusted.overlay.opaque")
    return marks


def _rfc3339(at: int) -> str:
    seconds, nanoseconds = divmod(at, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"


class _Cuttable:
    """A file that can be read until the event is set."""

    def __init__(self, file: IO[bytes], cut: threading.Event) -> None:
        self._file = file
        self._cut = cut

    def read(self, size: int = -1) -> bytes:
        if self._cut.is_set():
            raise InterruptedError("cut short")
        return self._file.read(size)
