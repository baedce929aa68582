"""The thaw at the end of a checkpoint: a shortage of the node does not leave a container frozen."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest

from criserver.errors import CriError
from criserver.runtime import cgroups, container_checkpoint

NODE: Any = SimpleNamespace(records=SimpleNamespace(sandbox=lambda _: None))
CONTAINER: Any = SimpleNamespace(id="c", sandbox_id="p", parent_cgroup=lambda _: "/pod")


@pytest.fixture
def thaws(monkeypatch: pytest.MonkeyPatch) -> list[Exception | None]:
    """What the next thaws raise; None for one that succeeds."""
    outcomes: list[Exception | None] = []

    def thaw(path: str) -> None:
        assert path == "/pod/c"
        if (error := outcomes.pop(0)) is not None:
            raise error

    monkeypatch.setattr(cgroups, "thaw", thaw)
    monkeypatch.setattr(container_checkpoint, "_THAW_PAUSES", (0.0, 0.0))
    return outcomes


def shortage() -> OSError:
    return OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_thaw_is_tried_again(thaws: list[Exception | None]) -> None:
    thaws += [shortage(), shortage(), None]
    container_checkpoint._thaw(NODE, CONTAINER)
    assert thaws == []


def test_a_container_that_stays_frozen_is_told(thaws: list[Exception | None]) -> None:
    thaws += [shortage(), shortage(), shortage()]
    with pytest.raises(container_checkpoint._NotUndoneError, match=r"is frozen, and .*open files"):
        container_checkpoint._thaw(NODE, CONTAINER)


def test_another_program_that_freezes_it_is_told_at_once(thaws: list[Exception | None]) -> None:
    thaws += [CriError("another program")]
    with pytest.raises(CriError, match="another program"):
        container_checkpoint._thaw(NODE, CONTAINER)
