"""Events for several plugins: one that ends or hangs at any of them holds up neither the others nor the operation."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
from google.protobuf.message import Message

from criserver.errors import FailedPreconditionError, UnavailableError
from criserver.nri.plugins import Plugins
from criserver.pb.nri.v1alpha1 import api_pb2 as nri
from tests.support.nri_peer import Peer, connected, settings
from tests.support.waiting import until

POD = nri.PodSandbox(id="p")
CONTAINER = nri.Container(id="c", pod_sandbox_id="p")
TOLD = [
    "RunPodSandbox",
    "UpdatePodSandbox",
    "PostUpdatePodSandbox",
    "StopPodSandbox",
    "RemovePodSandbox",
    "PostCreateContainer",
    "StartContainer",
    "PostStartContainer",
    "StopContainer",
    "RemoveContainer",
]
ASKED = ["CreateContainer", "UpdateContainer"]
VALIDATE = "ValidateContainerAdjustment"


def request_class(method: str) -> Any:
    return getattr(nri, f"{method}Request")


async def tell(plugins: Plugins, method: str) -> None:
    async with plugins.turn:
        if method in ("CreateContainer", VALIDATE):
            await plugins.create_container(nri.CreateContainerRequest(pod=POD, container=CONTAINER))
        elif method == "UpdateContainer":
            await plugins.update_container(nri.UpdateContainerRequest(pod=POD, container=CONTAINER))
        else:
            await plugins.tell(method, request_class(method)(pod=POD))


def ready(peer: Peer) -> None:
    """Answer each event with nothing."""
    for method in (*TOLD, *ASKED, VALIDATE):
        peer.answer(method, request_class(method), partial(_nothing, getattr(nri, f"{method}Response")()))


def _nothing(answer: Message, _request: Message) -> Message:
    return answer


@pytest.mark.parametrize("hangs", [False, True], ids=["ends", "hangs"])
@pytest.mark.parametrize("method", [*TOLD, *ASKED, VALIDATE])
async def test_a_plugin_that_is_gone_holds_up_no_event(method: str, hangs: bool) -> None:
    plugins = Plugins(settings(), None)  # type: ignore[arg-type]
    async with (
        connected(plugin_request_timeout=60) as (bad, wrong, serving, _),
        connected(plugin_request_timeout=60) as (good, right, _, started),
    ):
        for peer in (wrong, right):
            ready(peer)

        async def fail(_: bytes) -> bytes:
            if not hangs:
                wrong.multiplexer.close()
            return await asyncio.Future[bytes]()

        wrong.handlers["nri.pkg.api.v1alpha1.Plugin", method] = fail
        await wrong.register("10", "bad")
        await right.register("20", "good")
        await started.wait()
        await until(lambda: bad.subscribed(method))
        if hangs:  # not before: on a busy machine the registration takes longer than that
            bad._settings = settings(plugin_request_timeout=0.05)
        plugins._plugins = [bad, good]
        right.asked.clear()
        if method == VALIDATE:  # nobody has validated the container
            with pytest.raises(UnavailableError, match=f"NRI plugin 10-bad does not answer {VALIDATE}"):
                await tell(plugins, method)
        else:
            await tell(plugins, method)
            assert request_class(method) in {type(one) for one in right.asked}
        await serving
        assert bad.closed
        assert not good.closed
        await tell(plugins, method)


async def test_an_error_of_a_plugin_fails_what_begins_and_not_what_has_ended() -> None:
    plugins = Plugins(settings(), None)  # type: ignore[arg-type]
    async with connected() as (plugin, peer, _, started):
        ready(peer)
        peer.answer("StartContainer", nri.StartContainerRequest, lambda _: 1 / 0)
        peer.answer("StopContainer", nri.StopContainerRequest, lambda _: 1 / 0)
        await peer.register()
        await started.wait()
        plugins._plugins = [plugin]
        with pytest.raises(FailedPreconditionError, match="NRI plugin 10-peer fails StartContainer"):
            await tell(plugins, "StartContainer")
        await plugins.tell_all("StopContainer", nri.StopContainerRequest(pod=POD))
        assert not plugin.closed


@pytest.mark.parametrize("hangs", [False, True], ids=["ends", "hangs"])
async def test_a_plugin_that_goes_while_it_is_asked_has_not_seen_the_container(hangs: bool) -> None:
    """A container that needs the plugin is not made without its adjustments."""
    validator = {**settings().default_validator, "enable": True, "required_plugins": ["needed"]}
    plugins = Plugins(settings(default_validator=validator), None)  # type: ignore[arg-type]
    async with connected(plugin_request_timeout=60) as (plugin, peer, serving, started):
        ready(peer)
        await peer.register("10", "needed")
        await started.wait()
        plugins._plugins = [plugin]
        await tell(plugins, "CreateContainer")

        async def fail(_: bytes) -> bytes:
            if not hangs:
                peer.multiplexer.close()
            return await asyncio.Future[bytes]()

        peer.handlers["nri.pkg.api.v1alpha1.Plugin", "CreateContainer"] = fail
        if hangs:
            plugin._settings = settings(plugin_request_timeout=0.05)
        with pytest.raises(FailedPreconditionError, match="needs NRI plugins that are not there: needed"):
            await tell(plugins, "CreateContainer")
        await serving
