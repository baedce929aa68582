"""The daemon's side of the nursery: its start, and a start that fails."""

from __future__ import annotations

import sys

import pytest

from criserver.errors import CriError
from criserver.runtime.nursery import Nursery
from shims import launch


async def test_a_started_nursery_has_greeted_and_ends_with_its_daemon() -> None:
    nursery = Nursery()
    await nursery.start()
    await nursery.stop()
    assert nursery._process is not None
    assert nursery._process.returncode == 0


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "import os; os.write(int(os.sys.argv[1]), b'HTTP/1.1 200')"])
async def test_a_nursery_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(launch, "command", lambda python, fd: [sys.executable, "-c", code, str(fd)])
    nursery = Nursery()
    with pytest.raises(CriError, match="nursery of shims does not start"):
        await nursery.start()
    await nursery.stop()
