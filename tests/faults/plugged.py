"""Operations with a plugin of the node (NRI), which is told of every event and connects to each new daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.node import Node
from tests.support.nri_plugin import TestPlugin

if TYPE_CHECKING:
    from tests.faults.operations import Operation

WITH_PLUGIN = ", with an NRI plugin"

_connected: list[TestPlugin] = []


def with_plugin(operation: Operation) -> Operation:
    """The operation with a plugin that is connected while it is prepared, called, and called again."""

    def prepare(node: Node) -> str:
        _connect(node)
        return operation.prepare(node)

    def again(node: Node, known: str) -> object:
        _connect(node)
        return operation.again(node, known)

    return operation._replace(name=operation.name + WITH_PLUGIN, prepare=prepare, again=again)


def _connect(node: Node) -> None:
    """Connect a plugin in place of the last one. A daemon that ends ends the connection of its plugin."""
    while _connected:
        _connected.pop().stop()
    plugin = TestPlugin(f"{node.base}/nri/nri.sock", "10", "points")
    plugin.start()
    _connected.append(plugin)
