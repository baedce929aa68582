"""The members of an archive, by name: where the content of each is. Nothing is extracted.

The headers are read by the tar reader of layers, which trusts nothing. The tarfile of Python's standard library keeps a
copy of all global headers for each member, and reads headers of a negative size up to the end of the archive.
"""

from __future__ import annotations

import os
import posixpath
from typing import NamedTuple

from criserver.errors import InvalidArgumentError
from snapshotter.errors import LayerError, TruncatedLayerError
from snapshotter.limits import LayerLimits
from snapshotter.tar import BLOCK, FILE, LINK, SYMLINK, TarReader

_MAX_MEMBERS = 100_000
_MAX_HEADERS = 64 << 20  # bytes of all headers together, as a small compressed file can hold many


class Member(NamedTuple):
    """A member: the ``size`` bytes of its content begin at ``offset``. ``target`` is the path that a link leads to."""

    size: int
    offset: int
    is_file: bool
    target: str | None


def read_members(fd: int, what: str, limits: LayerLimits) -> dict[str, Member]:
    """The members of the tar file ``fd``, by their normalised names; ``what`` names the archive in errors.

    The last one of a name counts. Sparse files are no files here. Blocks. Raises InvalidArgumentError.
    """
    headers = _Headers(fd)
    members: dict[str, Member] = {}
    number = 0
    try:
        for number, entry in enumerate(TarReader(headers.read, limits, headers.skip), 1):
            if number > _MAX_MEMBERS:
                raise InvalidArgumentError(f"{what} has more than {_MAX_MEMBERS} members")
            name, link = os.fsdecode(entry.name), os.fsdecode(entry.link)
            target = None
            if entry.kind == SYMLINK:
                target = posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
            elif entry.kind == LINK:
                target = posixpath.normpath(link)
            is_file = entry.kind == FILE and entry.extents is None
            members[posixpath.normpath(name)] = Member(entry.size, headers.at, is_file, target)
    except LayerError as e:
        raise InvalidArgumentError(f"{what} is {'damaged' if number else 'no tar file'}: {e}") from e
    except OSError as e:
        raise InvalidArgumentError(f"{what} cannot be read: {e.strerror}") from e
    return members


class _Headers:
    """The headers of a tar file, block by block; ``at`` is the position behind the last one."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._end = os.fstat(fd).st_size
        self._size = 0
        self.at = 0

    def read(self) -> bytes:
        """The next block. Raises LayerError if there were too many."""
        block = os.pread(self._fd, BLOCK, self.at)
        self.at += len(block)
        self._size += len(block)
        if self._size > _MAX_HEADERS:
            raise LayerError(f"headers of more than {_MAX_HEADERS} bytes")
        return block

    def skip(self, size: int) -> None:
        """Pass over content and its padding. The archive may end without the padding."""
        if self.at + size > self._end:
            raise TruncatedLayerError("the archive ends in the middle of a member")
        self.at += -(-size // BLOCK) * BLOCK
