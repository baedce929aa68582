"""What plugins are told of pods and containers, and when; also of a container whose files are damaged."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from criserver.pb.nri.v1alpha1 import api_pb2 as nri
from criserver.runtime import plugin_events
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
    plugins.begin(records, Mock(), Mock())
    plugins.events = calls = PluginCalls(node)
    calls._pod = Mock(return_value=None)
    _, told = await calls.everything()
    assert {one.id: list(one.args) for one in told} == {"bad": [], "good": ["a"]}
    await calls.container_removed(records.containers["bad"])
    assert "bad" not in plugins.known


class Calls:
    """Plugin events of one container whose bundle is in a directory. ``asked`` has what plugins were told."""

    def __init__(self, directory: Path, adjust: nri.ContainerAdjustment | None = None) -> None:
        self.records, plugins = RecordStore(FakeStore()), NodePlugins()
        self.pod = sandbox("p", SandboxState.READY)
        self.one = container("c", self.pod, ContainerState.CREATED)
        brought_to(self.records, self.pod)
        brought_to(self.records, self.one)
        self.tasks: list[asyncio.Task[Any]] = []
        node: Any = Mock(records=self.records, plugins=plugins, processes={}, container_dir=lambda _: str(directory))
        node.config.nri.default_validator = {"enable": False}
        node.config.netns_dir = str(directory / "netns")
        node.namespaces_dir = node.sandbox_files_dir = node.sandbox_dir = lambda _: str(directory)
        node.background = lambda work, _what: self.tasks.append(asyncio.create_task(work))
        self.events = PluginCalls(node)
        self.asked: list[tuple[str, Any]] = []
        self.answered = asyncio.Event()
        plugin = Mock(index="10", base="a", subscribed=lambda _: True)
        plugin.name = "10-a"

        async def call(method: str, request: Any, response: Any) -> Any:
            self.asked.append((method, request.SerializeToString()))
            await self.answered.wait()
            return response(adjust=adjust) if method == "CreateContainer" and adjust is not None else response()

        plugin.call = call
        self.events.plugins._plugins = [plugin]
        self.spec = directory / "config.json"

    def write(self, argument: str) -> dict[str, Any]:
        spec = {"process": {"args": [argument]}}
        self.spec.write_text(json.dumps(spec))
        return spec

    def told(self, kind: Any) -> Any:
        """The last request, as a message of this kind."""
        return kind.FromString(self.asked[-1][1])


async def test_an_operation_does_not_wait_for_what_plugins_say_of_its_end_and_later_events_come_later(
    tmp_path: Path,
) -> None:
    calls = Calls(tmp_path)
    calls.write("a")
    await calls.events.container_created(calls.one)
    later = asyncio.create_task(calls.events.start_container(calls.one))
    for _ in range(5):
        await asyncio.sleep(0)
    assert [method for method, _ in calls.asked] == ["PostCreateContainer"]
    calls.answered.set()
    await later
    assert [method for method, _ in calls.asked] == ["PostCreateContainer", "StartContainer"]


async def test_a_spec_that_plugins_leave_as_it_is_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(tmp_path)
    calls.answered.set()
    read = Mock(side_effect=plugin_events._read)
    monkeypatch.setattr(plugin_events, "_read", read)
    await calls.events.create_container(calls.one, calls.write("a"))
    await calls.events.start_container(calls.one)
    assert list(calls.told(nri.StartContainerRequest).container.args) == ["a"]
    read.assert_not_called()
    calls.write("longer")  # as an update of its limits does
    await calls.events.start_container(calls.one)
    assert list(calls.told(nri.StartContainerRequest).container.args) == ["longer"]


async def test_a_spec_that_cannot_be_read_now_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(tmp_path)
    calls.answered.set()
    calls.write("a")
    with monkeypatch.context() as patch:
        patch.setattr(plugin_events, "_read", Mock(side_effect=OSError(errno.EMFILE, os.strerror(errno.EMFILE))))
        await calls.events.start_container(calls.one)
    assert list(calls.told(nri.StartContainerRequest).container.args) == []
    await calls.events.start_container(calls.one)
    assert list(calls.told(nri.StartContainerRequest).container.args) == ["a"]


async def test_a_spec_that_a_plugin_adjusts_is_read_again(tmp_path: Path) -> None:
    calls = Calls(tmp_path, nri.ContainerAdjustment(args=["b"]))
    calls.answered.set()
    await calls.events.create_container(calls.one, calls.write("a"))
    before = calls.spec.stat()
    calls.write("b")
    os.utime(calls.spec, ns=(before.st_atime_ns, before.st_mtime_ns))  # two writes within a tick of the clock
    await calls.events.start_container(calls.one)
    assert list(calls.told(nri.StartContainerRequest).container.args) == ["b"]


async def test_a_pod_is_shown_as_it_is_now(tmp_path: Path) -> None:
    calls = Calls(tmp_path)
    calls.answered.set()
    (tmp_path / "net").touch()
    await calls.events.run_sandbox(calls.pod)
    shown = calls.told(nri.RunPodSandboxRequest).pod
    assert [n.type for n in shown.linux.namespaces] == ["network"]
    (tmp_path / "net").unlink()
    await calls.events.sandbox_stopped(dataclasses.replace(calls.pod, ips=("10.0.0.9",)))
    shown = calls.told(nri.StopPodSandboxRequest).pod
    assert (list(shown.ips), list(shown.linux.namespaces)) == (["10.0.0.9"], [])
