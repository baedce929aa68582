"""The threads of an unpack worker, on a node that has no room for another thread."""

from __future__ import annotations

import errno
import io
import threading
from unittest.mock import Mock

import pytest

from snapshotter.layer_stream import LayerStream, decoder
from snapshotter.limits import LayerLimits


@pytest.mark.parametrize("started", [0, 1])
def test_a_thread_that_cannot_be_started_is_an_error_of_the_node(started: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number is that of a limit of processes, so that the caller is told to try again."""
    effects = [None] * started + [RuntimeError("can't start new thread")]
    monkeypatch.setattr(threading.Thread, "start", Mock(side_effect=effects))
    blob = io.BytesIO(b"")
    with pytest.raises(OSError, match="can't start new thread; is a limit of processes reached") as caught:
        LayerStream(blob, decoder(blob, "none"), LayerLimits())
    assert caught.value.errno == errno.EAGAIN
