"""The database."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from criserver.errors import CriError
from criserver.store import Store


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "criserver.db")


def test_records_are_kept_across_openings(path: str) -> None:
    store = Store(path)
    store.put("sandboxes", "b", b"2")
    store.put("sandboxes", "a", b"1")
    store.put("sandboxes", "a", b"3")
    store.delete("sandboxes", "nothing")
    store.close()
    store = Store(path)
    assert store.items("sandboxes") == [("a", b"3"), ("b", b"2")]
    assert store.get("containers", "a") is None
    store.delete("sandboxes", "a")
    assert store.get("sandboxes", "a") is None
    store.close()


def test_a_transaction_is_all_or_nothing(path: str) -> None:
    store = Store(path)
    with pytest.raises(ZeroDivisionError), store.transaction():
        store.put("images", "a", b"1")
        raise ZeroDivisionError
    assert store.items("images") == []
    with store.transaction():
        store.put("images", "a", b"1")
        store.put("image_names", "n", b"a")
    assert store.get("image_names", "n") == b"a"
    store.close()


def test_a_commit_is_there_without_a_close(path: str) -> None:
    store = Store(path)
    store.put("containers", "c", b"running")
    other = sqlite3.connect(path)
    assert other.execute("SELECT value FROM containers").fetchone() == (b"running",)
    other.close()
    store.close()


async def test_a_checkpoint_folds_the_log_in(path: str) -> None:
    store = Store(path)
    for number in range(100):
        store.put("containers", str(number), b"x" * 1000)
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
    with pytest.raises(CriError, match=r"schema version 99.*newer criserver"):
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
        store.put("images", str(number), b"x" * 500)
    await store.checkpoint()
    before = sizes()
    for number in range(50):
        store.delete("images", str(number))
    await store.checkpoint()
    assert sizes() == before
    store.close()
    for _ in range(3):
        Store(path).close()
    assert os.path.getsize(path) < before[0] + 100_000
