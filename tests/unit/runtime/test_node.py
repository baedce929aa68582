"""Work of a node that has failed and is tried again."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest

from criserver.runtime import node as nodes
from criserver.runtime.node import Node
from tests.support.waiting import until


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    monkeypatch.setattr(nodes, "_FIRST_PAUSE", 0.001)
    rooms: Any = [Mock() for _ in range(10)]
    return Node(*rooms)


async def test_work_is_tried_until_it_is_done(node: Node) -> None:
    done: list[int] = []

    async def work() -> None:
        done.append(len(done))
        if len(done) < 3:
            raise OSError("no descriptor")

    node.try_again("c", work, "something cannot be undone")
    await until(lambda: len(done) == 3 and not node._tasks)
    assert done == [0, 1, 2]


async def test_a_stop_does_not_wait_for_work_that_fails(node: Node) -> None:
    done: list[None] = []

    async def work() -> None:
        done.append(None)
        raise OSError("no descriptor")

    node.try_again("c", work, "something cannot be undone")
    await until(lambda: done)
    await node.settle()
    assert not node._tasks
