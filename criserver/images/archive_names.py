"""The names that the images of an archive get. Pure functions.

An archive names an image by a whole name, by a tag alone (``org.opencontainers.image.ref.name``), or not at all.
"""

from __future__ import annotations

import os
import re

from criserver.errors import InvalidArgumentError
from criserver.images import references
from criserver.images.image import LeftOut
from criserver.images.references import Reference
from criserver.text import quoted

_ENDINGS = ((".gz", ".gzip", ".zst", ".zstd", ".tgz", ".tzst"), (".tar",), (".oci",))
_MAX_REPOSITORY = 128
_MAX_FILE = 255


class Naming:
    """How an import names images: ``file`` is the archive's file, ``given`` the operator's name, "" for none.

    1. A whole name stays as it is.
    2. A tag alone gets the repository of ``given``, or else the one that the file is called after.
    3. An image without a name gets ``given`` if it is the only one that has no whole name. So does an image that has a
       tag alone, if ``given`` has a tag too.
    """

    def __init__(self, file: str, given: str = "") -> None:
        """Raises InvalidArgumentError if ``given`` is no name of an image, or has a digest."""
        self._given: Reference | None = references.parse(given) if given else None
        if self._given is not None and self._given.digest:
            raise InvalidArgumentError(f"the name {quoted(given)} for an import has a digest; give a name without one")
        self._has_tag = ":" in given.rpartition("/")[2]
        self._repository = self._given.name if self._given is not None else repository_of(file)

    def names(self, texts: tuple[str, ...], *, alone: bool) -> tuple[tuple[Reference, ...], tuple[LeftOut, ...]]:
        """The names of an image that the archive calls ``texts``, and those that are no names.

        ``alone`` says that no other image of the archive lacks a whole name.
        """
        if self._given is not None and alone and (not texts or (self._has_tag and not any(map(is_whole, texts)))):
            return (self._given,), ()
        names: list[Reference] = []
        left_out: list[LeftOut] = []
        for text in texts:
            try:
                names.append(references.parse(self._whole(text)))
            except InvalidArgumentError as e:
                left_out.append(LeftOut(f"name {quoted(text)}", str(e)))
        return tuple(names), tuple(left_out)

    def _whole(self, text: str) -> str:
        if is_whole(text):
            return text
        if not self._repository:
            raise InvalidArgumentError("it is a tag alone; give the image's name with --name")
        return f"{self._repository}:{text}"


def is_whole(text: str) -> bool:
    """Whether a name in an archive has a repository. Without one it is a tag within the archive."""
    return any(character in text for character in "/:@")


def repository_of(file: str) -> str:
    """The repository that a file is called after: ``alpine`` for ``/tmp/Alpine.tar.gz``; "" if there is none."""
    name = os.path.basename(file)[:_MAX_FILE].lower()
    for endings in _ENDINGS:
        name = next((name.removesuffix(ending) for ending in endings if name.endswith(ending)), name)
    return re.sub(r"[^a-z0-9]*[^a-z0-9._-][^a-z0-9]*|[._-]{2,}", "-", name)[:_MAX_REPOSITORY].strip("._-")
