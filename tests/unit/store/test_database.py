"""The database."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sqlite3
import stat
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest

from criserver.errors import CriError, ResourceExhaustedError
from criserver.store import Change, Store


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "criserver.db")


def test_records_are_kept_across_openings(path: str) -> None:
    store = Store(path)
    store.write_now(Change("sandboxes", "b", b"2"))
    store.write_now(Change("sandboxes", "a", b"1"))
    store.write_now(Change("sandboxes", "a", b"3"))
    store.write_now(Change("sandboxes", "nothing", None))
    store.close()
    store = Store(path)
    assert store.items("sandboxes") == [("a", b"3"), ("b", b"2")]
    assert store.get("containers", "a") is None
    store.write_now(Change("sandboxes", "a", None))
    assert store.get("sandboxes", "a") is None
    store.close()


def test_a_transaction_is_all_or_nothing(path: str) -> None:
    store = Store(path)
    with pytest.raises(KeyError):
        store.write_now(Change("images", "a", b"1"), Change("no table", "a", b"1"))
    assert store.items("images") == []
    store.write_now(Change("images", "a", b"1"), Change("image_names", "n", b"a"))
    assert store.get("image_names", "n") == b"a"
    store.close()


def test_a_commit_is_there_without_a_close(path: str) -> None:
    store = Store(path)
    store.write_now(Change("containers", "c", b"running"))
    other = sqlite3.connect(path)
    assert other.execute("SELECT value FROM containers").fetchone() == (b"running",)
    other.close()
    store.close()


async def test_a_checkpoint_folds_the_log_in(path: str) -> None:
    store = Store(path)
    for number in range(100):
        store.write_now(Change("containers", str(number), b"x" * 1000))
    await store.checkpoint()
    shutil.copy(path, path + "-alone")  # without the log
    alone = sqlite3.connect(path + "-alone")
    assert alone.execute("SELECT count(*) FROM containers").fetchone() == (100,)
    alone.close()
    assert len(store.items("containers")) == 100
    store.close()


def test_a_newer_schema_is_refused(path: str) -> None:
    Store(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(CriError, match=r"schema version 99.*newer criserver wrote it.*`criserver reset --images`"):
        Store(path)


def test_a_file_that_is_no_database_is_refused_by_name(path: str) -> None:
    with open(path, "w") as f:
        f.write("not a database, and long enough to be looked at as one" * 100)
    with pytest.raises(CriError, match=r"criserver\.db.*move it away"):
        Store(path)


def test_an_unknown_table_is_a_mistake_of_ours(path: str) -> None:
    store = Store(path)
    with pytest.raises(KeyError):
        store.get("users; DROP TABLE meta", "x")
    store.close()


async def test_a_removal_takes_no_room(path: str) -> None:
    def sizes() -> tuple[int, int]:
        return os.path.getsize(path), os.path.getsize(f"{path}-wal")

    store = Store(path)
    for number in range(50):
        store.write_now(Change("images", str(number), b"x" * 500))
    await store.checkpoint()
    before = sizes()
    for number in range(50):
        store.write_now(Change("images", str(number), None))
    await store.checkpoint()
    assert sizes() == before
    store.close()
    for _ in range(3):
        Store(path).close()
    assert os.path.getsize(path) < before[0] + 100_000


async def test_changes_are_made_in_their_order_and_beside_the_event_loop(path: str) -> None:
    store = Store(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # nothing can be written now
    written = [store.submit(Change("images", "a", str(number).encode())) for number in range(20)]
    await asyncio.sleep(0.05)
    assert not any(write.done() for write in written)
    other.execute("COMMIT")
    await asyncio.gather(*written)
    assert store.get("images", "a") == b"19"
    other.close()
    store.close()


async def test_a_change_is_made_also_if_its_caller_is_cancelled(path: str) -> None:
    store = Store(path)
    caller = asyncio.create_task(store.write(Change("images", "a", b"1")))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    store.close()
    store = Store(path)
    assert store.get("images", "a") == b"1"
    store.close()


def test_what_the_database_has_lost_is_taken_from_the_second_copy(path: str, tmp_path: Path) -> None:
    """The database is deleted, emptied, or an older one is put in its place, under running pods."""
    mirror = str(tmp_path / "records")
    store = Store(path, mirror)
    store.write_now(Change("sandboxes", "p", b"old"), Change("images", "i", b"image"), Change("images", "gone", b"1"))
    store.write_now(Change("image_names", "registry.example/a/b:1", b"i"), Change("image_names", "x" * 500, b"i\n"))
    store.close()
    shutil.copy(path, path + ".older")
    store = Store(path, mirror)
    store.write_now(Change("images", "gone", None))
    store.close()
    store = Store(path, mirror)
    store.write_now(Change("sandboxes", "p", b"new"), Change("containers", "c", b"1"), Change("containers", "d", b"1"))
    store.write_now(Change("containers", "d", None))
    store.close()
    for lose in (os.unlink, lambda path: open(path, "w").close(), partial(shutil.copy, path + ".older")):
        lose(path)
        store = Store(path, mirror)
        assert (store.items("sandboxes"), store.items("containers")) == ([("p", b"new")], [("c", b"1")])
        assert store.items("images") == [("i", b"image")]
        assert store.items("image_names") == [("registry.example/a/b:1", b"i"), ("x" * 500, b"i\n")]
        store.close()
    assert stat.S_IMODE(os.stat(mirror).st_mode) == stat.S_IMODE(os.stat(f"{mirror}/sandboxes").st_mode) == 0o700
    shutil.rmtree(mirror)  # the boot ends
    store = Store(path, mirror)
    assert (store.items("sandboxes"), store.items("containers")) == ([("p", b"new")], [("c", b"1")])
    assert sorted(os.listdir(f"{mirror}/containers")) == ["c"]
    store.close()


def test_a_damaged_database_is_told_and_its_successor_has_the_records(path: str, tmp_path: Path) -> None:
    mirror = str(tmp_path / "records")
    store = Store(path, mirror)
    store.write_now(*(Change("containers", str(number), b"x" * 1000) for number in range(100)))
    store.close()
    with open(path, "r+b") as f:
        f.seek(8192)
        f.write(os.urandom(4096 * 20))
    with pytest.raises(CriError, match=rf"criserver\.db: .*move it away: a new one takes .* from {mirror}"):
        Store(path, mirror)
    os.rename(path, path + ".damaged")
    store = Store(path, mirror)
    assert len(store.items("containers")) == 100
    store.close()


@pytest.mark.parametrize("damage", [b"\0garbage", b'p\n{"state": "rea', b"", b"c\n{}", None])
def test_a_damaged_copy_destroys_nothing_of_the_database(path: str, tmp_path: Path, damage: bytes | None) -> None:
    mirror = str(tmp_path / "records")
    store = Store(path, mirror)
    store.write_now(Change("sandboxes", "p", b'{"state": "ready"}'), Change("containers", "c", b"1"))
    store.close()
    copy = tmp_path / "records" / "sandboxes" / "p"
    copy.unlink()
    if damage is None:
        copy.symlink_to("nowhere")  # it cannot be read
    else:
        copy.write_bytes(damage)
    for _ in range(2):
        store = Store(path, mirror)
        assert store.items("sandboxes") == [("p", b'{"state": "ready"}')]
        assert store.items("containers") == [("c", b"1")]
        store.close()
        assert copy.read_bytes() == b'p\n{"state": "ready"}'


def test_a_full_disk_leaves_both_copies_as_they_were(path: str, tmp_path: Path) -> None:
    store = Store(path, str(tmp_path / "records"))
    store.write_now(Change("containers", "c", b"1"))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA journal_mode")
    pages = other.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(ResourceExhaustedError, match="cannot be written"):
        store.write_now(Change("containers", "c", b"2"), Change("containers", "d", b"x" * (4 << 20)))
    assert store.items("containers") == [("c", b"1")]
    assert (tmp_path / "records" / "containers" / "c").read_bytes() == b"c\n1"
    assert not (tmp_path / "records" / "containers" / "d").exists()
    other.close()
    store.close()


def test_a_copy_that_cannot_be_written_is_none(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old copy would replace the newer record at the next start."""
    store = Store(path, str(tmp_path / "records"))
    store.write_now(Change("containers", "c", b"1"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        store.write_now(Change("containers", "c", b"2"))
    assert os.listdir(tmp_path / "records" / "containers") == []
    assert not (tmp_path / "records" / "whole").exists()
    assert store.items("containers") == [("c", b"2")]
    store.close()
    store = Store(path, str(tmp_path / "records"))
    assert store.items("containers") == [("c", b"2")]
    store.close()


def test_records_that_go_together_are_all_gone_or_all_here_after_a_kill(path: str, tmp_path: Path) -> None:
    store = Store(path, str(tmp_path / "records"))
    store.write_now(Change("images", "i", b"1"), Change("image_names", "n", b"2"))
    store.close()
    if (child := os.fork()) == 0:
        store = Store(path, str(tmp_path / "records"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "unlink", lambda *_: os._exit(9))  # the first of the two copies
            store.write_now(Change("images", "i", None), Change("image_names", "n", None))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / "records" / "images" / "i").exists()
    store = Store(path, str(tmp_path / "records"))
    assert (store.items("images"), store.items("image_names")) == ([], [])
    store.close()
    assert [name for name in os.listdir(tmp_path / "records") if (tmp_path / "records" / name).is_file()] == ["whole"]


def test_a_copy_is_written_whole_or_not_at_all(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """write(2) may write a part only, as where the file system is nearly full."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, content: write(fd, content[:3]))
    store = Store(path, str(tmp_path / "records"))
    store.write_now(Change("containers", "c", b"whole"))
    store.close()
    assert (tmp_path / "records" / "containers" / "c").read_bytes() == b"c\nwhole"


def failing(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("value", [b"2", None])
async def test_a_copy_that_an_error_has_left_goes_with_the_next_write(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: bytes | None
) -> None:
    store = Store(path, str(tmp_path / "records"))
    store.write_now(Change("containers", "c", b"1"))
    write = partial(store.write, Change("sandboxes", "p", b"1"))
    for agree in (write, store.checkpoint):
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", failing)
            patch.setattr(os, "unlink", failing)
            with pytest.raises(OSError, match="error"):
                store.write_now(Change("containers", "c", value))
        await agree()
        stored = dict(store.items("containers"))
        copies = {name: (tmp_path / "records/containers" / name).read_bytes() for name in stored}
        assert copies == {key: f"{key}\n".encode() + value for key, value in stored.items()}
        assert sorted(os.listdir(tmp_path / "records/containers")) == sorted(stored)
        store.write_now(Change("containers", "c", b"1"))
    store.close()


def test_changes_that_belong_together_are_not_made_in_half(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(path, str(tmp_path / "records"))
    store.write_now(Change("images", "i", b"1"), Change("image_names", "n", b"1"))
    assert store._mirror is not None
    put = store._mirror.put
    failures = ["image_names"]

    def put_or_fail(table: str, key: str, value: bytes | None) -> None:
        if table in failures:
            failures.remove(table)
            failing()
        put(table, key, value)

    monkeypatch.setattr(store._mirror, "put", put_or_fail)
    with pytest.raises(OSError, match="error"):
        store.write_now(Change("images", "i", b"2"), Change("image_names", "n", b"2"))
    store.close()
    store = Store(path, str(tmp_path / "records"))
    assert (store.items("images"), store.items("image_names")) == ([("i", b"1")], [("n", b"1")])
    store.close()


def test_a_list_of_changes_that_stays_brings_no_old_values_back(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(path, str(tmp_path / "records"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", failing)
        with pytest.raises(OSError, match="error"):
            store.write_now(Change("images", "i", b"1"), Change("image_names", "n", b"1"))
        with pytest.raises(OSError, match="error"):
            store.write_now(Change("images", "i", b"2"))
    assert store.items("images") == [("i", b"1")]
    store.write_now(Change("images", "i", b"2"))
    store.close()
    store = Store(path, str(tmp_path / "records"))
    assert store.items("images") == [("i", b"2")]
    store.close()
