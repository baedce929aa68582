"""What an import loads of an archive: each image that this node can run, under its names."""

from __future__ import annotations

from criserver.errors import CriError, InvalidArgumentError, UnimplementedError
from criserver.images.archive import Archive, ArchivedImage
from criserver.images.archive_names import Naming, is_whole
from criserver.images.image import LeftOut
from criserver.images.manifests import Descriptor, OtherPlatformError, choose
from criserver.images.platforms import Platform
from criserver.images.pull import Lease, Loader

Loaded = tuple[Descriptor, list[str]]


async def load_images(
    archive: Archive, naming: Naming, loader: Loader, platform: Platform, lease: Lease
) -> tuple[list[Loaded], list[LeftOut]]:
    """Load the images of an archive. Returns the manifest and the names of each, and what was left out.

    These are left out:

    1. What is no container image, such as an artifact or a signature.
    2. An image that is for other platforms only.
    3. A name that is no reference, and an image that has only such names.
    4. A tag without a repository, if there is none to give it. Its image is imported without a name.

    Anything else that is wrong with an image is raised. If nothing is left to import, the first reason is raised.
    """
    loaded: list[Loaded] = []
    left_out: list[LeftOut] = []
    reason: CriError | None = None
    images = await archive.images()
    unnamed = sum(not any(map(is_whole, image.names)) for image in images)
    for image in images:
        names, wrong = naming.names(image.names, alone=unnamed == 1)
        left_out += wrong
        if wrong and not names and any(map(is_whole, image.names)):
            continue
        try:
            target = choose(image.index, platform, archive.name)
            manifest = await loader.load(archive, target, lease)
        except (OtherPlatformError, UnimplementedError) as e:
            left_out.append(LeftOut(_called(image), str(e)))
            reason = reason or e
            continue
        texts = [str(name) for name in names]
        if image.published:
            texts += [f"{name.name}@{target.digest}" for name in names]
        loaded.append((manifest, texts))
    if not loaded:
        raise _nothing(archive, left_out, reason)
    return loaded, left_out


def _called(image: ArchivedImage) -> str:
    if image.names:
        return f"image {', '.join(image.names)}"
    return f"image {image.index.manifests[0].digest}"


def _nothing(archive: Archive, left_out: list[LeftOut], reason: CriError | None) -> CriError:
    """The error of an import that has left out everything."""
    if reason is not None and len(left_out) == 1:
        return reason
    told = "; ".join(f"{left.what}: {left.reason}" for left in left_out)
    return (type(reason) if reason is not None else InvalidArgumentError)(f"{archive.name} has no image to add: {told}")
