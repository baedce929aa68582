"""What operations tell without a plugin: nothing, but what plugins would know is kept for the first one."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.node_plugins import Known, Limits, NodePlugins
from criserver.runtime.record_store import RecordStore
from tests.support.records import container, sandbox
from tests.support.samples import FakeStore, brought_to


async def test_without_plugins_what_they_would_know_is_kept() -> None:
    plugins = NodePlugins()
    pod, one = sandbox("p", SandboxState.READY), container("c", sandbox("p"), ContainerState.CREATED)
    await plugins.run_sandbox(pod)
    assert await plugins.create_container(one, {}) is None
    assert plugins.known == {"p": Known.MADE, "c": Known.MADE}
    limits = Limits(None, {"cpu": {}})
    assert await plugins.update_container(one, limits) is limits
    await plugins.container_stopped(one)
    await plugins.sandbox_stopped(pod)
    assert plugins.known == {"p": Known.STOPPED, "c": Known.STOPPED}
    await plugins.container_removed(one)
    await plugins.sandbox_removed(pod)
    assert plugins.known == {}


def events(idle: bool) -> Any:
    return AsyncMock(idle=idle)


@pytest.mark.parametrize("method", ["container_stopped", "container_removed", "sandbox_stopped", "sandbox_removed"])
async def test_plugins_are_not_told_of_what_they_do_not_know(method: str) -> None:
    plugins = NodePlugins()
    plugins.events = events(idle=False)
    record = (
        sandbox("p", SandboxState.READY) if "sandbox" in method else container("c", sandbox("p"), ContainerState.EXITED)
    )
    await getattr(plugins, method)(record)
    getattr(plugins.events, method).assert_not_awaited()
    plugins.known[record.id] = Known.MADE
    await getattr(plugins, method)(record)
    getattr(plugins.events, method).assert_awaited_once_with(record)


async def test_idle_plugins_are_not_asked() -> None:
    plugins = NodePlugins()
    plugins.events = events(idle=True)
    one = container("c", sandbox("p"), ContainerState.CREATED)
    assert await plugins.create_container(one, {}) is None
    await plugins.start_container(one)
    plugins.events.create_container.assert_not_awaited()
    plugins.events.start_container.assert_not_awaited()


async def test_what_an_earlier_daemon_has_left_is_known_and_ends_are_seen() -> None:
    records = RecordStore(FakeStore())
    ready = sandbox("ready", SandboxState.READY)
    brought_to(records, ready)
    brought_to(records, sandbox("gone", SandboxState.NOT_READY))
    running = container("runs", ready, ContainerState.RUNNING)
    brought_to(records, running)
    brought_to(records, container("ended", ready, ContainerState.EXITED))
    brought_to(records, container("making", ready, ContainerState.CREATING))
    plugins, background = NodePlugins(), Mock()
    plugins.begin(records, background, lambda _: asyncio.Lock())
    assert plugins.known == {
        "ready": Known.MADE,
        "gone": Known.STOPPED,
        "runs": Known.MADE,
        "ended": Known.STOPPED,
    }
    await records.observe(running.ended(1, "Error"))
    background.assert_called_once()
    await background.call_args.args[0]
    assert plugins.known["runs"] is Known.STOPPED


async def test_a_container_that_ends_while_it_is_started_is_stopped_for_plugins_after_its_start() -> None:
    records, lock = RecordStore(FakeStore()), asyncio.Lock()
    pod = sandbox("p", SandboxState.READY)
    running = container("c", pod, ContainerState.RUNNING)
    brought_to(records, pod)
    brought_to(records, running)
    plugins, background = NodePlugins(), Mock()
    plugins.begin(records, background, lambda _: lock)
    plugins.events = events(idle=False)
    async with lock:  # as StartContainer
        await records.observe(running.ended(1, "Error"))
        ended = asyncio.create_task(background.call_args.args[0])
        await plugins.container_started(running)
        for _ in range(3):
            await asyncio.sleep(0)
        plugins.events.container_stopped.assert_not_awaited()
    await ended
    plugins.events.container_stopped.assert_awaited_once()
