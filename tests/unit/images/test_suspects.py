"""When content is synced and noted."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from criserver.images import ContentStore, sync_note
from criserver.images.suspects import Suspects
from snapshotter import Snapshotter, mounts


class Stores:
    def __init__(self, base: Path) -> None:
        self.note = str(base / "note")
        self.content = ContentStore(str(base / "content"))
        self.snapshotter = Snapshotter(str(base / "snapshots"))

    def suspects(self) -> Suspects:
        return Suspects(self.content, self.snapshotter, self.note)

    def noted(self) -> set[str]:
        note = sync_note.read(self.note)
        assert note is not None
        return set(note.blobs)


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    real = mounts.syncfs

    def count(path: str) -> None:
        calls.append(path)
        real(path)

    monkeypatch.setattr(mounts, "syncfs", count)
    return calls


async def test_only_new_content_is_synced(tmp_path: Path, syncs: list[str]) -> None:
    stores = Stores(tmp_path)
    suspects = stores.suspects()
    one = await stores.content.put(b"one")
    await suspects.sync()
    await suspects.sync()
    assert len(syncs) == 1  # both stores are on one file system
    two = await stores.content.put(b"two")
    assert stores.noted() == {one}
    await suspects.sync()
    assert len(syncs) == 2
    assert stores.noted() == {one, two}
    await stores.content.put(b"two")  # another file by now
    await suspects.sync()
    assert len(syncs) == 3


async def test_without_a_note_nothing_is_synced(tmp_path: Path, syncs: list[str]) -> None:
    stores = Stores(tmp_path)
    await stores.content.put(b"one")
    await Suspects(stores.content, stores.snapshotter).sync()
    assert syncs == []


async def test_what_a_failed_sync_may_have_lost_is_never_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = Stores(tmp_path)
    suspects = stores.suspects()
    one = await stores.content.put(b"one")
    await suspects.sync()
    await stores.content.put(b"lost")

    def fail(path: str) -> None:
        raise OSError(5, "Input/output error", path)

    with monkeypatch.context() as patch:
        patch.setattr(mounts, "syncfs", fail)
        with pytest.raises(OSError, match="Input/output"):
            await suspects.sync()
    three = await stores.content.put(b"three")
    await suspects.sync()
    assert stores.noted() == {one, three}


async def test_a_disk_that_stands_still_holds_up_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = Stores(tmp_path)
    suspects = stores.suspects()
    goes_on = threading.Event()
    begun = threading.Event()

    def stand_still(_: str) -> None:
        begun.set()
        goes_on.wait(60)

    monkeypatch.setattr(mounts, "syncfs", stand_still)
    task = asyncio.create_task(suspects.sync())
    await asyncio.to_thread(begun.wait, 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task  # although the thread has not ended
    assert not goes_on.is_set()
    goes_on.set()
    await suspects.sync()


async def test_content_that_is_gone_is_no_suspect_any_more(tmp_path: Path) -> None:
    stores = Stores(tmp_path)
    gone, there = await stores.content.put(b"gone"), await stores.content.put(b"there")
    sync_note.write(stores.note, sync_note.Note("another boot"))
    suspects = stores.suspects()
    assert suspects.blobs == {gone, there}
    await stores.content.delete(gone)
    suspects.layers = {"needed", "gone"}
    suspects.forget_gone({"needed"})
    assert suspects.blobs == {there}
    assert suspects.layers == {"needed"}
    await suspects.sync()
    note = sync_note.read(stores.note)
    assert note is not None
    assert (note.boot, note.blobs) == ("", {})
