"""What plugins are told of containers, also of one whose files are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.node_plugins import NodePlugins
from criserver.runtime.plugin_events import PluginCalls
from criserver.runtime.record_store import RecordStore
from tests.support.records import container, sandbox
from tests.support.samples import FakeStore, brought_to


@pytest.mark.parametrize("text", ["", '{"process": {"args": ["a"', "[1]", '{"mounts": [{}]}', "\udcff"])
async def test_a_damaged_spec_hides_no_other_container_and_hinders_no_removal(tmp_path: Path, text: str) -> None:
    records, plugins = RecordStore(FakeStore()), NodePlugins()
    pod = sandbox("p", SandboxState.READY)
    brought_to(records, pod)
    for name in ("bad", "good"):
        brought_to(records, container(name, pod, ContainerState.CREATED))
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "config.json").write_text(text, errors="surrogateescape")
    (tmp_path / "good" / "config.json").write_text(json.dumps({"process": {"args": ["a"]}}))
    node: Any = Mock(records=records, plugins=plugins, processes={}, container_dir=lambda name: str(tmp_path / name))
    node.config.nri.default_validator = {"enable": False}
    plugins.begin(records, Mock())
    plugins.events = calls = PluginCalls(node)
    calls._pod = Mock(return_value=None)
    _, told = await calls.everything()
    assert {one.id: list(one.args) for one in told} == {"bad": [], "good": ["a"]}
    await calls.container_removed(records.containers["bad"])
    assert "bad" not in plugins.known
