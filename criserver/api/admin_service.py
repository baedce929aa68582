"""The RPCs of the operator's commands that CRI does not have."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import aiofiles.tempfile

from criserver.api.inspection import inspect
from criserver.api.node_status import disk_use, image_message, node_status
from criserver.api.traced_calls import traced_calls
from criserver.errors import FailedPreconditionError, InvalidArgumentError
from criserver.images import Credentials, Damage, Images, LayerProgress, LeftOut, Stage
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.runtime.node import Node
from criserver.runtime.sandbox_remove import remove_sandbox, remove_sandbox_by_force
from criserver.text import printable
from snapshotter.files import make_private

# Seconds between two progress reports of a pull.
_INTERVAL = 0.1
_STAGES = {
    Stage.WAITING: admin.WAITING,
    Stage.DOWNLOADING: admin.DOWNLOADING,
    Stage.UNPACKING: admin.UNPACKING,
    Stage.DONE: admin.DONE,
}


class AdminService:
    """The methods have the names of the RPCs in admin.proto, which documents them."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._images: Images = node.images
        self._spool = os.path.join(node.config.root, "spool")

    async def import_image(self, request: AsyncIterator[admin.ImportImageRequest]) -> admin.ImportImageResponse:
        make_private(self._spool)
        first: admin.ImportImageRequest | None = None
        # The file has no name, so nothing of it is left when the call or the daemon ends.
        async with aiofiles.tempfile.TemporaryFile(dir=self._spool) as spool:
            async for piece in request:
                first = first or piece
                await spool.write(piece.data)
            first = first or admin.ImportImageRequest()
            await spool.flush()
            path = f"/proc/self/fd/{spool.fileno()}"
            left_out: list[LeftOut] = []
            images = await self._images.import_archive(
                path, name=first.name, file=first.file, given=first.given_name, pinned=first.pin, left_out=left_out
            )
        return admin.ImportImageResponse(
            images=[image_message(image) for image in images],
            left_out=[admin.LeftOut(what=printable(left.what), reason=printable(left.reason)) for left in left_out],
        )

    async def pull_image(self, request: admin.PullImageRequest) -> AsyncIterator[admin.PullImageResponse]:
        credentials = _credentials(request)
        pull = asyncio.create_task(self._images.pull(request.name, credentials))
        await asyncio.sleep(0)  # so that the pull begins, or refuses the name
        reported: tuple[LayerProgress, ...] = ()
        try:
            progress = self._images.watch(request.name, credentials) if not pull.done() else tuple
            ended = False
            while not ended:
                ended = bool((await asyncio.wait([pull], timeout=_INTERVAL))[0])
                if ended:
                    image = pull.result()
                layers = progress()
                if layers != reported:
                    reported = layers
                    yield admin.PullImageResponse(layers=[_layer(layer) for layer in layers])
        finally:
            if not pull.done():
                pull.cancel()
                await asyncio.wait([pull])
        if request.pin:
            image = await self._images.pin(image.id, pinned=True)
        yield admin.PullImageResponse(image=image_message(image))

    async def export_images(self, request: admin.ExportImagesRequest) -> AsyncIterator[admin.ExportImagesResponse]:
        if not request.images:
            raise InvalidArgumentError("no image is named; name the images to export")
        async for piece in self._images.export(request.images):
            yield admin.ExportImagesResponse(data=piece)

    async def remove_image(self, request: admin.RemoveImageRequest) -> admin.RemoveImageResponse:
        image = self._images.wanted(request.image)
        if image.pinned and not request.force:
            raise FailedPreconditionError(
                f"image {request.image} is pinned; unpin it first (`criserver image unpin`), or use --force"
            )
        await self._images.remove(image.id)
        return admin.RemoveImageResponse(image=image_message(image), snapshots=self._images.snapshots_of(image))

    async def pin_image(self, request: admin.PinImageRequest) -> admin.PinImageResponse:
        return admin.PinImageResponse(image=image_message(await self._images.pin(request.image, pinned=request.pinned)))

    async def verify_images(self, request: admin.VerifyImagesRequest) -> AsyncIterator[admin.VerifyImagesResponse]:
        images = len(self._images.list())
        async for progress in self._images.verify():
            yield admin.VerifyImagesResponse(
                bytes=progress.bytes,
                total_bytes=progress.total_bytes,
                blobs=progress.blobs,
                layers=progress.layers,
                images=images,
                damage=[self._damage(damage) for damage in progress.damage],
            )

    async def prune_images(self, request: admin.PruneImagesRequest) -> admin.PruneImagesResponse:
        used = {c.image_id for c in self._node.records.containers.values()}
        if request.dry_run:
            images = self._images.unused(used) if request.all else ()
            return admin.PruneImagesResponse(images=[image_message(image) for image in images])
        pruned = await self._images.prune(unused=request.all, used=used)
        return admin.PruneImagesResponse(
            images=[image_message(image) for image in pruned.images],
            freed_bytes=pruned.freed.bytes,
            freed_inodes=pruned.freed.inodes,
        )

    async def remove_pod(self, request: admin.RemovePodRequest) -> admin.RemovePodResponse:
        sandbox = self._node.records.sandbox(request.id)
        left: list[str] = []
        if request.force:
            left = await remove_sandbox_by_force(self._node, sandbox.id)
        else:
            await remove_sandbox(self._node, sandbox.id)
        return admin.RemovePodResponse(id=sandbox.id, left=left)

    async def node_status(self, request: admin.NodeStatusRequest) -> admin.NodeStatusResponse:
        return node_status(self._node, stacks=request.stacks)

    async def inspect(self, request: admin.InspectRequest) -> admin.InspectResponse:
        return admin.InspectResponse(document=await inspect(self._node, request.id))

    async def disk_use(self, request: admin.DiskUseRequest) -> admin.DiskUseResponse:
        return await disk_use(self._node)

    async def trace(self, request: admin.TraceRequest) -> admin.TraceResponse:
        return traced_calls(request.subject)

    def _damage(self, damage: Damage) -> admin.Damage:
        if not damage.images:
            advice = "no image uses it; `criserver image prune` deletes unused content"
        else:
            advice = "remove the images that use it, and pull or import them again"
            if damage.kind == "layer" and any(self._images.snapshots_of(image) for image in damage.images):
                advice += ", after the containers that use it are removed"
        return admin.Damage(
            what=f"{damage.kind} {damage.digest}: {damage.reason}",
            images=[image_message(image) for image in damage.images],
            advice=advice,
        )


def _layer(layer: LayerProgress) -> admin.LayerProgress:
    return admin.LayerProgress(
        digest=layer.digest, size=layer.size, received=layer.received, stage=_STAGES[layer.stage]
    )


def _credentials(request: admin.PullImageRequest) -> Credentials | None:
    credentials = Credentials(
        request.username,
        request.password,
        identity_token=request.identity_token,
        registry_token=request.registry_token,
    )
    return None if credentials == Credentials() else credentials
