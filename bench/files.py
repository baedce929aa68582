"""Compare aiofiles with one call in a thread for each piece: blobs that arrive, exports, the import's spool file."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable

import aiofiles
import aiofiles.tempfile

from criserver.images import ContentStore
from snapshotter.threads import Threads, in_thread

_CHUNK = 128 << 10  # as a download brings them
_PIECE = 1 << 20  # of exports and imports

Way = Callable[[str, int], Awaitable[None]]


async def blob_by_threads(directory: str, size: int) -> None:
    """As the content store does it: one call in a thread hashes and writes."""
    chunk = bytes(_CHUNK)
    async with ContentStore(directory).ingest() as ingest:
        for _ in range(size // _CHUNK):
            await ingest.write(chunk)


async def blob_by_aiofiles(directory: str, size: int) -> None:
    """Two calls in threads: one hashes, one writes."""
    chunk, found = bytes(_CHUNK), hashlib.sha256()
    async with aiofiles.open(os.path.join(directory, "blob"), "wb") as file:
        for _ in range(size // _CHUNK):
            await in_thread(found.update, chunk)
            await file.write(chunk)


async def export_by_threads(directory: str, size: int) -> None:
    """As an export does it: one call in a thread reads and hashes."""
    path, found = source(directory, size), hashlib.sha256()

    def piece() -> bytes:
        data = file.read(_PIECE)
        found.update(data)
        return data

    with open(path, "rb") as file:
        while await in_thread(piece):
            pass


async def export_by_aiofiles(directory: str, size: int) -> None:
    """Two calls in threads: one reads, one hashes."""
    found = hashlib.sha256()
    async with aiofiles.open(source(directory, size), "rb") as file:
        while data := await file.read(_PIECE):
            await in_thread(found.update, data)


async def spool_by_threads(directory: str, size: int) -> None:
    """The import's file by a call in a thread for each piece."""
    piece = bytes(_PIECE)
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(size // _PIECE):
            await asyncio.to_thread(file.write, piece)


async def spool_by_aiofiles(directory: str, size: int) -> None:
    """As the daemon's import does it."""
    piece = bytes(_PIECE)
    async with aiofiles.tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(size // _PIECE):
            await file.write(piece)


def source(directory: str, size: int) -> str:
    """A file to export, made once."""
    path = os.path.join(os.path.dirname(directory), "source")
    if not os.path.exists(path):
        with open(path, "wb") as file:
            file.writelines(bytes(_PIECE) for _ in range(size // _PIECE))
    return path


PAIRS: dict[str, tuple[Way, Way]] = {
    "a blob that arrives": (blob_by_threads, blob_by_aiofiles),
    "an export": (export_by_threads, export_by_aiofiles),
    "an import's spool file": (spool_by_threads, spool_by_aiofiles),
}


async def measure(base: str, size: int, rounds: int) -> None:
    """Time both ways of each job in alternating order. The first round is not counted."""
    asyncio.get_running_loop().set_default_executor(Threads())
    source(os.path.join(base, "x"), size)
    for job, ways in PAIRS.items():
        seconds: dict[Way, list[float]] = {way: [] for way in ways}
        processor: dict[Way, list[float]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            for way in ways if number % 2 else ways[::-1]:
                with tempfile.TemporaryDirectory(dir=base) as directory:
                    began, used = time.perf_counter(), time.process_time()
                    await way(directory, size)
                    if number:
                        seconds[way].append(time.perf_counter() - began)
                        processor[way].append(time.process_time() - used)
        for what, samples in (("seconds", seconds), ("CPU seconds", processor)):
            ours, theirs = (statistics.median(samples[way]) for way in ways)
            print(
                f"{job:24}{what:12} threads {ours:6.3f}  aiofiles {theirs:6.3f}  ratio {theirs / ours:.2f}", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare aiofiles with calls in threads.")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="timed runs of each way (9)")
    parser.add_argument("--megabytes", type=int, default=400, metavar="N", help="the size of the file (400)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as base:
        asyncio.run(measure(base, options.megabytes << 20, options.rounds))


if __name__ == "__main__":
    main()
