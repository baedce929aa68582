"""CRI's ImageService, and the operator's calls that CRI has none for."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import tempfile
import time
from collections.abc import AsyncIterator

from criserver.api import views
from criserver.errors import InvalidArgumentError
from criserver.images import Credentials, Images
from criserver.images.credentials import decode_basic
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.pb.runtime.v1 import api_pb2 as cri

# RPCs that a later version builds, with the feature that each belongs to.
MISSING: dict[str, str] = {}


class ImageService:
    """The methods are named after the RPCs; what each promises is CRI's."""

    def __init__(self, images: Images, image_directory: str) -> None:
        self._images = images
        self._directory = image_directory

    async def list_images(self, request: cri.ListImagesRequest) -> cri.ListImagesResponse:
        wanted = request.filter.image.image
        return cri.ListImagesResponse(images=[views.image(i) for i in self._images.list(wanted or None)])

    async def stream_images(self, request: cri.StreamImagesRequest) -> AsyncIterator[cri.StreamImagesResponse]:
        for image in self._images.list(request.filter.image.image or None):
            yield cri.StreamImagesResponse(images=[views.image(image)])

    async def image_status(self, request: cri.ImageStatusRequest) -> cri.ImageStatusResponse:
        image = self._images.get(_named(request.image))
        if image is None:
            return cri.ImageStatusResponse()
        info = {}
        if request.verbose:
            config = dataclasses.asdict(image.config)
            info = views.info(manifest=image.manifest, chainID=image.chain_id, config=config)
        return cri.ImageStatusResponse(image=views.image(image), info=info)

    async def pull_image(self, request: cri.PullImageRequest) -> cri.PullImageResponse:
        name = _named(request.image)
        image = await self._images.pull(name, _credentials(request.auth) if request.HasField("auth") else None)
        return cri.PullImageResponse(image_ref=image.id)

    async def remove_image(self, request: cri.RemoveImageRequest) -> cri.RemoveImageResponse:
        await self._images.remove(_named(request.image))
        return cri.RemoveImageResponse()

    async def image_fs_info(self, request: cri.ImageFsInfoRequest) -> cri.ImageFsInfoResponse:
        usage = self._images.fs_usage()
        found = cri.FilesystemUsage(
            timestamp=time.time_ns(),
            fs_id=cri.FilesystemIdentifier(mountpoint=self._directory),
            used_bytes=cri.UInt64Value(value=usage.bytes),
            inodes_used=cri.UInt64Value(value=usage.inodes),
        )
        return cri.ImageFsInfoResponse(image_filesystems=[found], container_filesystems=[found])


class AdminService:
    """What ``criserver image`` asks of the daemon."""

    def __init__(self, images: Images, spool_directory: str) -> None:
        self._images = images
        self._spool = spool_directory

    async def import_image(self, request: AsyncIterator[admin.ImportImageRequest]) -> admin.ImportImageResponse:
        os.makedirs(self._spool, mode=0o700, exist_ok=True)
        name = ""
        # A file without a name: nothing of it is left, however the call or the daemon ends.
        with tempfile.TemporaryFile(dir=self._spool) as spool:
            async for piece in request:
                name = piece.name or name
                await asyncio.to_thread(spool.write, piece.data)
            spool.flush()
            images = await self._images.import_archive(f"/proc/self/fd/{spool.fileno()}", name=name)
        return admin.ImportImageResponse(
            images=[admin.ImportedImage(id=i.id, names=[*i.repo_tags, *i.repo_digests]) for i in images]
        )


def _named(spec: cri.ImageSpec) -> str:
    if not spec.image:
        raise InvalidArgumentError("image.image is empty; an image must be named")
    return spec.image


def _credentials(auth: cri.AuthConfig) -> Credentials | None:
    """What an AuthConfig says: tokens, or user and password, by themselves or as docker's base64 of both."""
    username, password = auth.username, auth.password
    if auth.auth and not username:
        try:
            username, password = decode_basic(auth.auth)
        except ValueError as e:
            raise InvalidArgumentError("auth.auth is not base64 of a user name, a colon and a password") from e
    if not (username or auth.identity_token or auth.registry_token):
        return None
    return Credentials(username, password, auth.server_address, auth.identity_token, auth.registry_token)
