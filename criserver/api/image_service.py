"""CRI's ImageService."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable

from criserver.api import views
from criserver.api.inspection import image_info
from criserver.api.lists import make_each
from criserver.errors import InvalidArgumentError
from criserver.images import Credentials, Images
from criserver.images.credentials import decode_basic
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.stats import DiskUsage

# RPCs that are not implemented yet, each with the name of its feature.
MISSING: dict[str, str] = {}


class ImageService:
    """The methods have the names of the RPCs. CRI documents them."""

    def __init__(self, images: Images, image_directory: str, writable: Callable[[], DiskUsage]) -> None:
        """``writable`` returns the disk usage of the containers' writable layers."""
        self._images = images
        self._directory = image_directory
        self._writable = writable

    async def list_images(self, request: cri.ListImagesRequest) -> cri.ListImagesResponse:
        name = request.filter.image.image or None
        return cri.ListImagesResponse(images=make_each(self._images.list(name), views.image))

    async def stream_images(self, request: cri.StreamImagesRequest) -> AsyncIterator[cri.StreamImagesResponse]:
        for image in make_each(self._images.list(request.filter.image.image or None), views.image):
            yield cri.StreamImagesResponse(images=[image])

    async def image_status(self, request: cri.ImageStatusRequest) -> cri.ImageStatusResponse:
        image = self._images.get(_image_name(request.image))
        if image is None:
            return cri.ImageStatusResponse()
        info = await image_info(self._images, image) if request.verbose else {}
        return cri.ImageStatusResponse(image=views.image(image), info=info)

    async def pull_image(self, request: cri.PullImageRequest) -> cri.PullImageResponse:
        name = _image_name(request.image)
        image = await self._images.pull(name, _credentials(request.auth) if request.HasField("auth") else None)
        return cri.PullImageResponse(image_ref=image.id)

    async def remove_image(self, request: cri.RemoveImageRequest) -> cri.RemoveImageResponse:
        await self._images.remove(_image_name(request.image))
        return cri.RemoveImageResponse()

    async def image_fs_info(self, request: cri.ImageFsInfoRequest) -> cri.ImageFsInfoResponse:
        images, writable = self._images.fs_usage(), self._writable()
        return cri.ImageFsInfoResponse(
            image_filesystems=[self._usage(time.time_ns(), images.bytes, images.inodes)],
            # The same mount point means the same file system.
            container_filesystems=[self._usage(writable.timestamp, writable.bytes, writable.inodes)],
        )

    def _usage(self, timestamp: int, size: int, inodes: int) -> cri.FilesystemUsage:
        return cri.FilesystemUsage(
            timestamp=timestamp,
            fs_id=cri.FilesystemIdentifier(mountpoint=self._directory),
            used_bytes=cri.UInt64Value(value=size),
            inodes_used=cri.UInt64Value(value=inodes),
        )


def _image_name(spec: cri.ImageSpec) -> str:
    if not spec.image:
        raise InvalidArgumentError("image.image is empty; an image must be named")
    return spec.image


def _credentials(auth: cri.AuthConfig) -> Credentials | None:
    """The credentials of an AuthConfig: tokens, or user and password, in two fields or as docker's base64 of both."""
    username, password = auth.username, auth.password
    if auth.auth and not username:
        try:
            username, password = decode_basic(auth.auth)
        except ValueError as e:
            raise InvalidArgumentError("auth.auth is not base64 of a user name, a colon and a password") from e
    if not (username or auth.identity_token or auth.registry_token):
        return None
    return Credentials(username, password, auth.server_address, auth.identity_token, auth.registry_token)
