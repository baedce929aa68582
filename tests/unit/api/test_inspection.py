"""The documents of `criserver inspect` and of verbose statuses."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import ItemsView
from types import SimpleNamespace
from typing import Any

import pytest

from criserver.api import inspection
from criserver.images.manifests import ImageConfig


class Facts(dict[str, Any]):
    """A document that keeps the threads in which it is read."""

    def __init__(self, facts: dict[str, Any]) -> None:
        super().__init__(facts)
        self.threads: set[threading.Thread] = set()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        self.threads.add(threading.current_thread())
        return super().items()


async def test_a_document_is_written_as_json_in_a_thread() -> None:
    facts = Facts({"name": "\u00e9 \ud800", "mounts": ["/a", 1, None], "status": {"state": True}})
    text = await inspection._looked_up(lambda given: given, facts)
    assert text == json.dumps(dict(facts))
    (thread,) = facts.threads
    assert thread is not threading.current_thread()


DEEP: list[Any] = functools.reduce(lambda inner, _: [inner], range(5000), [])


@pytest.mark.parametrize("strange", [float("inf"), DEEP], ids=["infinite", "deep"])
async def test_a_configuration_that_cannot_be_shown_leaves_the_rest(strange: object) -> None:
    """JSON has numbers that are larger than Python's, and any depth."""
    image: Any = SimpleNamespace(manifest="sha256:m", chain_id="sha256:c", config=ImageConfig(cmd=("sh",)))
    images: Any = SimpleNamespace(configuration=lambda _: {"x": strange})
    shown = json.loads((await inspection.image_info(images, image))["info"])
    assert shown.keys() == {"manifest", "chainID", "config"}
    assert shown["config"]["cmd"] == ["sh"]
