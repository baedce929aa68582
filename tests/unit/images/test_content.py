"""The content store."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from criserver.errors import DataLossError, NotFoundError, ResourceExhaustedError
from criserver.images.content import ContentStore
from criserver.images.digests import digest_of

DATA = os.urandom(200_000)
DIGEST = digest_of(DATA)


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "content")


def files(root: str) -> list[str]:
    return sorted(os.path.join(d, f)[len(root) + 1 :] for d, _, names in os.walk(root) for f in names)


async def fill(store: ContentStore, data: bytes, digest: str) -> None:
    async with store.ingest(digest) as ingest:
        for start in range(0, len(data), 70_000):
            await ingest.write(data[start : start + 70_000])
        await ingest.commit(digest)


async def test_a_blob_comes_in_whole(root: str) -> None:
    store = ContentStore(root)
    await fill(store, DATA, DIGEST)
    assert files(root) == [f"blobs/sha256/{DIGEST[7:]}"]
    assert store.size(DIGEST) == len(DATA)
    assert store.read(DIGEST, len(DATA)) == DATA
    with store.open(DIGEST) as f:
        assert f.read() == DATA
    assert store.usage() == (200_704, 1)
    assert ContentStore(root).digests() == {DIGEST}
    assert ContentStore(root).usage() == (200_704, 1)


async def test_a_blob_by_sha512_is_beside_those_by_sha256(root: str) -> None:
    store = ContentStore(root)
    digest = digest_of(DATA, "sha512:")
    await fill(store, DATA, DIGEST)
    await fill(store, DATA, digest)
    assert files(root) == [f"blobs/sha256/{DIGEST[7:]}", f"blobs/sha512/{digest[7:]}"]
    store = ContentStore(root)
    assert (store.digests(), store.usage()) == ({DIGEST, digest}, (2 * 200_704, 2))
    assert (store.read(digest, len(DATA)), store.check(digest)) == (DATA, "")
    other = digest_of(b"x", digest)
    with pytest.raises(DataLossError, match=f"blob {other}: the content received has digest {digest}"):
        await fill(store, DATA, other)
    with open(store.path(digest), "r+b") as file:
        file.write(b"damaged")
    assert store.check(digest).startswith("its content has digest sha512:")
    with pytest.raises(DataLossError, match="its content has digest sha512:"):
        store.read(digest, len(DATA))
    assert await store.delete(digest) == 200_704
    assert files(root) == [f"blobs/sha256/{DIGEST[7:]}"]


async def test_the_same_blob_twice_counts_once(root: str) -> None:
    store = ContentStore(root)
    await fill(store, DATA, DIGEST)
    await fill(store, DATA, DIGEST)
    assert store.usage() == (200_704, 1)


async def test_another_digest_leaves_nothing(root: str) -> None:
    store = ContentStore(root)
    with pytest.raises(DataLossError, match=f"blob {digest_of(b'x')}: the content received has digest {DIGEST}"):
        await fill(store, DATA, digest_of(b"x"))
    assert files(root) == []
    assert store.digests() == set()


async def test_what_is_not_committed_leaves_nothing(root: str) -> None:
    store = ContentStore(root)
    async with store.ingest() as ingest:
        await ingest.write(DATA)
        assert len(files(root)) == 1
    assert files(root) == []


async def test_what_could_not_be_deleted_goes_with_the_next_collection(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ContentStore(root)

    def failing(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(KeyError), monkeypatch.context() as patch:
        patch.setattr(os, "unlink", failing)
        async with store.ingest() as ingest:
            await ingest.write(DATA)
            raise KeyError
    assert files(root) == ["ingest/0"]
    await store.delete_rest()
    assert files(root) == []
    assert store.usage() == (0, 0)


async def test_a_cancelled_writer_leaves_nothing(root: str) -> None:
    store = ContentStore(root)
    started = asyncio.Event()

    async def write() -> None:
        async with store.ingest() as ingest:
            while True:
                started.set()
                await ingest.write(DATA)

    task = asyncio.create_task(write())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert files(root) == []


def test_a_new_store_sweeps_what_a_crash_left(root: str) -> None:
    ContentStore(root)
    for name in ("ingest/7", "ingest/x"):
        with open(os.path.join(root, name), "wb") as f:
            f.write(b"half")
    ContentStore(root)
    assert files(root) == []


async def test_deleting(root: str) -> None:
    store = ContentStore(root)
    digest = await store.put(b"one")
    await store.delete(digest)
    await store.delete(digest)
    assert files(root) == []
    assert store.size(digest) is None
    assert store.usage() == (0, 0)
    with pytest.raises(NotFoundError, match=digest):
        store.read(digest, 10)


async def test_a_deleted_blob_is_gone_before_the_first_wait(root: str) -> None:
    store = ContentStore(root)
    digest = await store.put(b"one")
    task = asyncio.create_task(store.delete(digest))
    await asyncio.sleep(0)
    assert store.size(digest) is None
    await store.put(b"one")
    await task
    assert store.read(digest, 10) == b"one"


async def test_reading_is_bounded_and_checked(root: str) -> None:
    store = ContentStore(root)
    digest = await store.put(b"12345")
    with pytest.raises(ResourceExhaustedError, match="larger than 4 bytes"):
        store.read(digest, 4)
    with open(store.path(digest), "wb") as f:
        f.write(b"1234x")
    with pytest.raises(DataLossError, match="is damaged on disk"):
        store.read(digest, 5)


async def test_what_arrives_counts_and_is_told(root: str) -> None:
    store = ContentStore(root)
    assert store.arrived(DIGEST) == 0
    async with store.ingest(DIGEST) as ingest:
        await ingest.write(DATA[:70_000])
        assert store.arrived(DIGEST) == 70_000
        assert store.usage() == (73_728, 1)
        await ingest.write(DATA[70_000:])
        await ingest.commit(DIGEST)
        assert store.usage() == (200_704, 1)
    assert store.arrived(DIGEST) == len(DATA)
    async with store.ingest(DIGEST) as ingest:
        await ingest.write(DATA)
    assert store.usage() == (200_704, 1)


async def test_what_is_no_blob_keeps_nobody_from_starting(root: str) -> None:
    """A directory or a link in a blob's place could never become that blob; what has another name is not ours."""
    store = ContentStore(root)
    await fill(store, DATA, DIGEST)
    other = digest_of(b"x")
    blobs = os.path.join(root, "blobs", "sha256")
    os.makedirs(os.path.join(root, "ingest", "0", "directory"))
    os.makedirs(os.path.join(blobs, other[7:], "directory"))
    os.symlink("nowhere", os.path.join(blobs, "f" * 64))
    os.mkdir(os.path.join(blobs, "of somebody"))
    store = ContentStore(root)
    assert os.listdir(os.path.join(root, "ingest")) == []
    assert store.digests() == {DIGEST}
    assert sorted(os.listdir(blobs)) == sorted(["of somebody", DIGEST[7:]])
    await fill(store, b"x", other)
    assert store.read(other, 1) == b"x"


async def test_a_blob_that_cannot_be_deleted_is_there_again_for_the_next_attempt(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ContentStore(root)
    await fill(store, DATA, DIGEST)

    async def no_room(*_: object) -> None:
        raise OSError(errno.EAGAIN, "can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "to_thread", no_room)
        with pytest.raises(OSError, match="can't start new thread"):
            await store.delete(DIGEST)
    assert (store.digests(), store.usage(), files(root)) == ({DIGEST}, (200_704, 1), [f"blobs/sha256/{DIGEST[7:]}"])
    assert await store.delete(DIGEST) == 200_704
    assert (store.digests(), store.usage(), files(root)) == (set(), (0, 0), [])


async def test_a_blob_that_came_anew_while_its_deletion_failed_counts_once(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ContentStore(root)
    await fill(store, DATA, DIGEST)

    async def fill_and_fail(*_: object) -> None:
        monkeypatch.undo()
        await fill(store, DATA, DIGEST)
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(asyncio, "to_thread", fill_and_fail)
    with pytest.raises(OSError, match="broken"):
        await store.delete(DIGEST)
    assert (store.usage(), files(root)) == ((200_704, 1), [f"blobs/sha256/{DIGEST[7:]}"])
