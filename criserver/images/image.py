"""The values that callers get: an image, what images occupy, what a prune has removed and an import left out."""

from __future__ import annotations

from dataclasses import dataclass

from criserver.images import image_user
from criserver.images.image_user import ImageUser
from criserver.images.manifests import ImageConfig


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is completely on this node.

    ``size`` is in bytes: the configuration and the layers as they are in the registry. ``manifest`` is the digest
    of its manifest for this platform, ``chain_id`` names its topmost layer. Names are canonical and sorted.
    """

    id: str
    repo_tags: tuple[str, ...]
    repo_digests: tuple[str, ...]
    size: int
    config: ImageConfig
    chain_id: str
    manifest: str
    pinned: bool

    @property
    def user(self) -> ImageUser:
        """The user of its containers if the pod names none. Raises InvalidArgumentError for an invalid user."""
        return image_user.parse(self.config.user)


@dataclass(frozen=True, slots=True)
class FsUsage:
    """What images occupy: bytes and inodes of the blobs and of the unpacked layers."""

    bytes: int
    inodes: int


@dataclass(frozen=True, slots=True)
class ImageUsage:
    """What one image occupies, in bytes. ``own`` is the part of both that no other image needs."""

    image: Image
    blobs: int
    layers: int
    own: int


@dataclass(frozen=True, slots=True)
class Pruned:
    """The images that a prune removed, and what was freed by it."""

    images: tuple[Image, ...]
    freed: FsUsage


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An image or a name of an archive that an import has left out: what it is, and why."""

    what: str
    reason: str
