"""Faults of the processes that compare layers: a verification says that it could not be made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from criserver.errors import CriError, DeadlineExceededError, UnavailableError
from snapshotter import LayerLimits, worker_process
from tests.support.imagebuilder import build_image, write_archive
from tests.support.ownregistry import rooms
from tests.support.rooms import Rooms

__all__ = ["rooms"]


@pytest.mark.parametrize(
    ("program", "kind", "words"),
    [
        ("import os; os.kill(os.getpid(), 9)", UnavailableError, "was ended by signal 9; verify again"),
        ("import time; time.sleep(60)", DeadlineExceededError, "did nothing for 0.2 seconds; verify again"),
        ("raise SystemExit('odd')", CriError, "ended with status 1: odd; verify again"),
    ],
    ids=["killed", "hanging", "failing"],
)
async def test_a_verification_without_its_process_fails_in_words(
    rooms: Rooms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, kind: type[CriError], words: str
) -> None:
    write_archive(build_image([{"a": os.urandom(1000)}]), str(tmp_path / "a.tar"))
    await rooms.images.import_archive(str(tmp_path / "a.tar"))
    with monkeypatch.context() as patch:
        patch.setattr(worker_process, "_CHECKER", program)
        rooms.snapshotter.limits = LayerLimits(max_stall=0.2 if kind is DeadlineExceededError else 300.0)
        with pytest.raises(CriError, match=words) as caught:
            async for _ in rooms.images.verify():
                pass
        assert type(caught.value) is kind
    rooms.snapshotter.limits = LayerLimits()
    last = [found async for found in rooms.images.verify()][-1]
    assert (last.layers, last.damage) == (1, ())
