"""A start that fails while the node lacks descriptors."""

from __future__ import annotations

import asyncio
import errno
import os
from types import SimpleNamespace
from unittest.mock import AsyncMock, Mock

import pytest

from criserver.errors import FailedPreconditionError
from criserver.runtime import container_start
from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.record_store import RecordStore
from tests.support.records import container, sandbox
from tests.support.samples import FakeStore, brought_to


async def test_a_failed_start_ends_although_its_target_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ephemeral container would be shown as created for ever."""
    records = RecordStore(FakeStore())
    brought_to(records, sandbox("p", SandboxState.READY))
    brought_to(records, container("c", records.sandboxes["p"], ContainerState.CREATED))
    node = SimpleNamespace(
        records=records,
        lock=lambda _: asyncio.Lock(),
        handler=Mock(),
        plugins=Mock(start_container=AsyncMock()),
        background=lambda work, _: work.close(),
        config=Mock(),
    )
    process = Mock(start=AsyncMock(side_effect=FailedPreconditionError("the runtime's words")))
    lack = Mock(side_effect=[None, OSError(errno.EMFILE, os.strerror(errno.EMFILE))])
    monkeypatch.setattr(container_start, "_target_ended", lack)
    monkeypatch.setattr(container_start, "prepare_log", AsyncMock(return_value=""))
    with pytest.raises(FailedPreconditionError, match="cannot be started: the runtime's words"):
        await container_start._start_in_turn(node, "c", process)  # type: ignore[arg-type]
    assert lack.call_count == 2
    process.start_failed.assert_called_once_with("the runtime's words")
