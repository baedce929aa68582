"""The note of the blobs and layers that are on disk for certain, and what it says after a boot.

Blobs and layers are not synced one by one. From time to time their file systems are synced as a whole, and then this
note is written. After a power cut it tells what the cut cannot have damaged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field

import structlog

from snapshotter import files

_log = structlog.get_logger(__name__)

_LIMIT = 64 << 20


@dataclass(frozen=True, slots=True)
class Note:
    """What was on disk when the note was written.

    ``boot`` is the ID of the boot whose page cache has all else; "" if some of that is unchecked since an earlier boot.
    ``blobs`` and ``layers`` have the stamps of what was synced, by digest and by chain ID.
    """

    boot: str = ""
    blobs: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)


def is_unclean(note: Note | None, boot: str) -> bool:
    """Whether content that the note does not list may be damaged.

    1. There is no note: no release with notes has run before. All content is taken for sound, as in that release.
    2. The note is of this boot: only the daemon has ended, and the page cache has all content.
    3. Otherwise the page cache of another boot is lost. An orderly stop lists everything, so nothing is unlisted then.
    """
    return note is not None and note.boot != boot


def stamp(path: str) -> str:
    """A stamp that differs from that of a later file with the same name, also after a boot; "" if there is no file.

    Stamps are only compared for equality, so a clock that was wrong or was set does no harm.
    """
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return ""
    return f"{status.st_ino}.{status.st_ctime_ns}"


def read(path: str) -> Note | None:
    """The note in the file ``path``; None if there is none. A note that cannot be read lists nothing."""
    try:
        found = json.loads(files.read(path, _LIMIT))
        note = Note(found["boot"], dict(found["blobs"]), dict(found["layers"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        _log.warning("the note of synced images cannot be read; all images are checked", path=path, error=str(e))
        return Note()
    return note


def write(path: str, note: Note) -> None:
    """Replace the note in the file ``path``, and sync it. Raises OSError."""
    new = f"{path}.new"
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            json.dump(asdict(note), file)
            file.flush()
            os.fsync(fd)
        os.rename(new, path)
    except OSError:
        with suppress(OSError):
            os.unlink(new)
        raise
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
