"""A plugin's connection against a peer in the same process: registration, the split of Synchronize, and how it ends."""

from __future__ import annotations

import pytest

from criserver.errors import FailedPreconditionError
from criserver.nri.multiplexer import PLUGIN_SERVICE, RUNTIME_SERVICE
from criserver.nri.plugin import PluginGoneError
from criserver.pb.nri.v1alpha1 import api_pb2 as nri
from criserver.ttrpc import CallError
from criserver.ttrpc.message_frames import MessageType, message_frame
from tests.support.nri_peer import connected


async def test_registration_and_configuration() -> None:
    async with connected(plugin_registration_timeout=7, plugin_request_timeout=3) as (plugin, peer, _, started):
        await peer.register()
        await started.wait()
        (request,) = peer.asked
        assert plugin.name == "10-peer"
        assert (request.registration_timeout, request.request_timeout) == (7000, 3000)
        assert request.runtime_name == "criserver"
        assert plugin.subscribed("CreateContainer"), "no events mean all"
        with pytest.raises(CallError, match="registered already"):
            await peer.register()


async def test_only_events_that_were_subscribed() -> None:
    async with connected() as (plugin, peer, _, started):
        events = 1 << (nri.STOP_CONTAINER - 1)
        peer.answer("Configure", nri.ConfigureRequest, lambda _: nri.ConfigureResponse(events=events))
        await peer.register()
        await started.wait()
        assert plugin.subscribed("StopContainer")
        assert not plugin.subscribed("CreateContainer")


async def test_a_plugin_that_does_not_register_is_disconnected() -> None:
    async with connected(plugin_registration_timeout=0.01) as (plugin, _, serving, _started):
        await serving
        assert plugin.closed
        assert "did not register within" in plugin._reason


async def test_a_wrong_name_is_answered_and_disconnected() -> None:
    async with connected() as (plugin, peer, serving, _started):
        with pytest.raises(CallError, match="not two digits"):
            await peer.register(index="1")
        await serving
        assert plugin.closed


def objects() -> tuple[list[nri.PodSandbox], list[nri.Container]]:
    """More than one message can have."""
    pods = [nri.PodSandbox(id=str(number)) for number in range(3)]
    return pods, [nri.Container(id=str(number), args=["x" * 300_000]) for number in range(30)]


async def test_a_large_synchronize_is_split() -> None:
    async with connected() as (plugin, peer, _, started):
        peer.answer("Synchronize", nri.SynchronizeRequest, lambda r: nri.SynchronizeResponse(more=r.more))
        await peer.register()
        await started.wait()
        peer.asked.clear()
        pods, containers = objects()
        await plugin.synchronize(pods, containers)
        assert len(peer.asked) > 2
        assert [request.more for request in peer.asked] == [True] * (len(peer.asked) - 1) + [False]
        assert [c.id for request in peer.asked for c in request.containers] == [c.id for c in containers]
        assert [p.id for request in peer.asked for p in request.pods] == [p.id for p in pods]


async def test_a_plugin_that_cannot_take_parts_is_disconnected() -> None:
    async with connected() as (plugin, peer, serving, started):
        peer.answer("Synchronize", nri.SynchronizeRequest, lambda r: nri.SynchronizeResponse())
        await peer.register()
        await started.wait()
        with pytest.raises(FailedPreconditionError, match="several messages"):
            await plugin.synchronize(*objects())
        await serving


async def test_an_answer_that_is_no_message_disconnects_the_plugin() -> None:
    async with connected() as (plugin, peer, serving, started):
        peer.answer("CreateContainer", nri.CreateContainerRequest, lambda r: b"\xff")
        await peer.register()
        await started.wait()
        with pytest.raises(PluginGoneError, match="bytes that are no message"):
            await plugin.call("CreateContainer", nri.CreateContainerRequest(), nri.CreateContainerResponse)
        await serving


@pytest.mark.parametrize(
    ("connection", "frame", "reason"),
    [
        (RUNTIME_SERVICE, message_frame(MessageType.REQUEST, 2, b""), "the client broke the protocol: stream 2 cannot"),
        (PLUGIN_SERVICE, message_frame(MessageType.REQUEST, 2, b""), "the server broke the protocol: a request of a"),
    ],
)
async def test_the_reason_of_an_end_says_how_the_plugin_broke_the_protocol(
    connection: int, frame: bytes, reason: str
) -> None:
    async with connected() as (plugin, peer, serving, started):
        await peer.register()
        await started.wait()
        peer.multiplexer.send(connection, frame)
        await serving
        assert plugin._reason.startswith(reason)


async def test_a_plugin_that_goes_fails_the_call_under_way() -> None:
    async with connected() as (plugin, peer, serving, started):
        peer.answer("StopContainer", nri.StopContainerRequest, lambda r: peer.multiplexer.close() or b"")
        await peer.register()
        await started.wait()
        with pytest.raises(PluginGoneError, match="10-peer"):
            await plugin.call("StopContainer", nri.StopContainerRequest(), nri.StopContainerResponse)
        await serving
        assert not plugin.subscribed("StopContainer")
