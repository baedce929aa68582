"""The file of an archive: a plain tar file as it is, or a compressed one decompressed into a file without a name."""

from __future__ import annotations

import errno
import io
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import BinaryIO

from criserver.errors import CriError, InvalidArgumentError, NotFoundError, ResourceExhaustedError
from snapshotter import LayerError
from snapshotter.limits import LayerLimits
from snapshotter.threads import in_thread

GZIP = b"\x1f\x8b"
ZSTD = b"\x28\xb5\x2f\xfd"
_STEP = 8 << 20
_DAMAGED = "its compressed data is invalid, or ends early"


@asynccontextmanager
async def plain_file(path: str, what: str, scratch: Callable[[], BinaryIO], limits: LayerLimits) -> AsyncIterator[int]:
    """A descriptor of the tar file at ``path``, without its compression (gzip, zstd); ``what`` names it in errors.

    A compressed file is decompressed into the file that ``scratch`` makes. It may be as large as one layer may.

    Raises NotFoundError, InvalidArgumentError, ResourceExhaustedError if a limit is exceeded or the disk is full.
    """
    try:
        file = io.FileIO(path)
    except OSError as e:
        raise NotFoundError(f"{what}: {e.strerror}") from e
    with file:
        start = file.read(len(ZSTD))
        file.seek(0)
        if not start.startswith(GZIP) and start != ZSTD:
            yield file.fileno()
            return
        with scratch() as plain:
            await _decompress(file, plain, what, limits)
            yield plain.fileno()


async def _decompress(file: BinaryIO, plain: BinaryIO, what: str, limits: LayerLimits) -> None:
    # The decoders are imported for the first compressed archive.
    from isal import isal_zlib

    try:
        steps = _steps(file, plain, what, limits)
        while await in_thread(next, steps, None) is not None:
            pass
    except isal_zlib.IsalError as e:  # type: ignore[misc]  # declared as an instance in isal's stubs
        raise InvalidArgumentError(f"{what} is damaged: {_DAMAGED}") from e
    except LayerError as e:
        raise InvalidArgumentError(f"{what} is damaged: {_DAMAGED}") from e
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhaustedError(f"{what}: no space to decompress it; enlarge the file system") from e
        raise CriError(f"{what} cannot be decompressed: {e.strerror}") from e


def _steps(file: BinaryIO, plain: BinaryIO, what: str, limits: LayerLimits) -> Iterator[int]:
    """Decompress ``file`` into ``plain``. Yields how many bytes there are, after some megabytes each."""
    from snapshotter.layer_stream import decoder

    read = size = told = 0

    def count(length: int) -> None:
        nonlocal read
        read += length

    for piece in decoder(file, "gzip")(file, count):
        size += len(piece)
        if size > limits.max_bytes or (size > limits.ratio_floor and size > limits.max_ratio * read):
            raise ResourceExhaustedError(
                f"{what} has more than {size - len(piece)} bytes without its compression, too many for {read} bytes; "
                "the limits are max_bytes and max_ratio in [images], or import it as a plain tar file"
            )
        view = memoryview(piece)
        while view:
            view = view[plain.write(view) :]
        if size - told >= _STEP:
            told = size
            yield size
