"""The documents of `criserver inspect` and of verbose statuses."""

from __future__ import annotations

import json
import threading
from collections.abc import ItemsView
from typing import Any

from criserver.api import inspection


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
