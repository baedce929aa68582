"""Registries that are busy, break off, stall or go away: what is retried, from which byte on, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path

import pytest
from aiohttp import web

from criserver.errors import NotFoundError, UnavailableError
from criserver.images import RegistrySettings
from tests.support.imagebuilder import BuiltImage, build_image
from tests.support.ownregistry import Answer, Server, image, offset, refused, rooms, server, serving
from tests.support.registry import Registry, free_port, registry
from tests.support.rooms import Rooms
from tests.support.waiting import until, within

__all__ = ["image", "registry", "rooms", "server"]

Write = Callable[[bytes], Awaitable[None]]


def part(request: web.Request, body: bytes) -> web.StreamResponse:
    """The beginning of a response with what ``request`` asks for of ``body``."""
    start = offset(request)
    response = web.StreamResponse(status=206 if start else 200)
    response.content_length = len(body) - start
    if start:
        response.headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
    return response


def breaking(body: bytes, after: int, times: int = 10**9) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """A response that breaks off ``after`` so many bytes more, so many times."""
    broken = count()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = part(request, body)
        await response.prepare(request)
        start = offset(request)
        if next(broken) >= times:
            await response.write(body[start:])
            return response
        await response.write(body[start : start + after])
        await asyncio.sleep(0.01)
        request.transport.abort()
        return response

    return answer


def first_layer(image: BuiltImage) -> tuple[str, bytes]:
    digest = image.manifest["layers"][0]["digest"]
    return digest, image.blobs[digest]


def statuses(*answers: int, **headers: str) -> Callable[[Server], Answer]:
    """Responses with these statuses, one after the other, and then what was asked for."""
    numbers = iter(answers)

    def make(server: Server) -> Answer:
        def answer(request: web.Request) -> web.Response:
            status = next(numbers, 200)
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return server.serve(request) if status == 200 else web.Response(status=status, headers=named)

        return answer

    return make


async def test_a_layer_that_breaks_off_goes_on_where_it_was(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    digest, body = first_layer(image)
    server.answers[digest] = breaking(body, 20_000)  # more often than a download without progress is tried
    assert (await rooms.images.pull(f"{server.address}/app:1")).id == image.id
    starts = [offset(request) for request in server.asked(digest)]
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert starts[-1] >= 180_000


async def test_a_server_without_ranges_sends_it_all_again(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    digest, body = first_layer(image)
    broken = breaking(body, 60_000, times=2)

    async def answer(request: web.Request) -> web.StreamResponse:
        if "Range" in request.headers:
            return web.Response(body=body)
        return await broken(request)

    server.answers[digest] = answer
    await rooms.images.pull(f"{server.address}/app:1")
    assert len(server.asked(digest)) == 2


@pytest.mark.parametrize("lie", ["bytes 0-9/10", "bytes 70000-80000/*", "nonsense", None])
async def test_a_server_that_sends_another_range_is_asked_for_the_whole(
    server: Server, rooms: Rooms, image: BuiltImage, lie: str | None
) -> None:
    digest, body = first_layer(image)
    broken = breaking(body, 60_000, times=1)

    async def answer(request: web.Request) -> web.StreamResponse:
        if "Range" in request.headers:
            return web.Response(status=206, body=body[70_000:], headers={"Content-Range": lie} if lie else {})
        return await broken(request)

    server.answers[digest] = answer
    await rooms.images.pull(f"{server.address}/app:1")
    assert ["Range" in request.headers for request in server.asked(digest)] == [False, True, False]


@pytest.mark.parametrize("status", [400, 416, 501])
async def test_a_server_that_refuses_ranges_is_asked_for_the_whole(
    server: Server, rooms: Rooms, image: BuiltImage, status: int
) -> None:
    digest, body = first_layer(image)
    broken = breaking(body, 60_000, times=1)

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status) if "Range" in request.headers else await broken(request)

    server.answers[digest] = answer
    await rooms.images.pull(f"{server.address}/app:1")
    assert ["Range" in request.headers for request in server.asked(digest)] == [False, True, False]


@pytest.mark.parametrize("right", [True, False])
async def test_a_response_that_breaks_off_behind_its_last_byte_brings_the_layer(
    server: Server, rooms: Rooms, image: BuiltImage, right: bool
) -> None:
    digest, body = first_layer(image)
    sent = body if right else bytes(len(body))

    async def unended(request: web.Request) -> web.StreamResponse:
        if len(server.asked(digest)) > 1:
            return web.Response(body=body)
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(sent)
        await until(lambda: rooms.content.arrived(digest) == len(body))
        request.transport.close()  # without the last chunk
        return response

    server.answers[digest] = unended
    assert (await rooms.images.pull(f"{server.address}/app:1")).id == image.id
    assert ["Range" in request.headers for request in server.asked(digest)] == [False] * (1 if right else 2)


@pytest.mark.parametrize("told", [True, False])
async def test_a_layer_that_always_ends_early(server: Server, rooms: Rooms, image: BuiltImage, told: bool) -> None:
    digest, body = first_layer(image)

    async def broken(request: web.Request) -> web.StreamResponse:
        response = part(request, body)
        if not told:
            response.content_length = None
        await response.prepare(request)
        await response.write(body[offset(request) : 20_000])
        if told:
            request.transport.close()
        return response

    server.answers[digest] = broken
    words = "the connection ended in the middle" if told else f"ended after 20000 of {len(body)} bytes"
    await refused(rooms, f"{server.address}/app:1", UnavailableError, digest, words)
    assert 2 < len(server.asked(digest)) < 10


async def test_a_mirror_that_dies_half_way_is_gone_on_from_at_the_registry(
    rooms: Rooms, registry: Registry, image: BuiltImage
) -> None:
    digest, body = first_layer(image)
    registry.push(image, "app:1")
    async with Server(image).running() as mirror:
        dead = asyncio.Event()
        broken = breaking(body, 100_000)

        async def dying(request: web.Request) -> web.StreamResponse:
            if dead.is_set():
                request.transport.abort()
            dead.set()
            return await broken(request)

        async def nothing(request: web.Request) -> web.StreamResponse:
            await dead.wait()
            request.transport.abort()
            return web.Response()

        for blob in image.blobs:
            if blob not in (image.digest, image.id):
                mirror.answers[blob] = dying if blob == digest else nothing
        rooms.configure("r.example", f'server = "http://{registry.address}"\n[host."http://{mirror.address}"]')
        found = await rooms.images.pull("r.example/app:1")
    assert found.id == image.id
    assert rooms.read(found, "b") == b"2"
    (line,) = [line for line in registry.lines() if f'"GET /v2/app/blobs/{digest}' in line]
    assert '" 206 ' in line


async def test_half_a_layer_from_a_mirror_that_lies_does_no_harm(
    server: Server, rooms: Rooms, image: BuiltImage
) -> None:
    digest, body = first_layer(image)
    async with Server(image).running() as mirror:
        mirror.answers[digest] = breaking(os.urandom(len(body)), 100_000)
        rooms.configure("r.example", f'server = "http://{server.address}"\n[host."http://{mirror.address}"]')
        found = await rooms.images.pull("r.example/app:1")
    assert found.id == image.id
    assert ["Range" in request.headers for request in server.asked(digest)] == [True, False]


async def test_a_registry_that_restarts_is_waited_for(
    rooms: Rooms, image: BuiltImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("criserver.images.retries._FIRST_WAIT", 0.1)
    digest, body = first_layer(image)
    gone = asyncio.Event()
    broken = breaking(body, 100_000)

    async def leaving(request: web.Request) -> web.StreamResponse:
        gone.set()
        return await broken(request)

    async with Server(image).running(port=free_port()) as first:
        first.answers[digest] = leaving
        rooms.configure(first.address, f'server = "http://{first.address}"')
        pull = asyncio.create_task(rooms.images.pull(f"{first.address}/app:1"))
        await gone.wait()
    await asyncio.sleep(0.1)  # the pull meets a port where nobody listens
    async with Server(image).running(port=int(first.address.rpartition(":")[2])) as second:
        assert (await pull).id == image.id
        assert [offset(request) for request in second.asked(digest)] == [100_000]


async def test_a_storage_that_cannot_be_connected_to_for_a_moment_is_waited_for(
    server: Server, rooms: Rooms, image: BuiltImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry redirects to it, and has answered just now."""
    monkeypatch.setattr("criserver.images.retries._FIRST_WAIT", 0.3)
    digest, _ = first_layer(image)
    port = free_port()

    def away(request: web.Request) -> web.StreamResponse:
        return web.Response(status=307, headers={"Location": f"http://127.0.0.1:{port}{request.path}"})

    server.answers[digest] = away
    pull = asyncio.create_task(rooms.images.pull(f"{server.address}/app:1"))
    await until(lambda: len(server.asked(digest)) > 1)  # the pull has met a port where nobody listens
    async with Server(image).running(port=port):
        assert (await pull).id == image.id


async def test_a_server_that_stalls_is_given_up(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    rooms.change(progress_timeout=2.4)
    for name in ("1", first_layer(image)[0]):
        ended = asyncio.Event()

        async def stalled(request: web.Request, ended: asyncio.Event = ended) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"{")
            await ended.wait()
            return response

        server.answers = {name: stalled}
        began = time.monotonic()
        with within(30):
            await refused(rooms, f"{server.address}/app:1", UnavailableError, name, "no progress")
        assert time.monotonic() - began > 1
        assert len(server.asked(name)) >= 2  # a connection may be dead where the server is not
        ended.set()


async def test_a_server_that_never_answers_is_given_up(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    rooms.change(progress_timeout=0.9)
    ended = asyncio.Event()

    async def silent(request: web.Request) -> web.StreamResponse:
        await ended.wait()
        return web.Response()

    server.answers["1"] = silent
    await refused(rooms, f"{server.address}/app:1", UnavailableError, "no progress")
    ended.set()


async def test_a_mirror_that_never_answers_is_waited_for_once(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    rooms.change(progress_timeout=15)  # a third of it is waited for the mirror, and may not be over for the registry
    ended = asyncio.Event()

    async def silent(_: web.BaseRequest) -> web.Response:
        asked.append(1)
        await ended.wait()
        return web.Response(status=408)

    asked: list[int] = []
    async with serving(silent) as mirror:
        rooms.configure("r.example", f'server = "http://{server.address}"\n[host."http://{mirror}"]')
        assert (await rooms.images.pull("r.example/app:1")).id == image.id
        ended.set()
    assert len(asked) == 1


async def test_a_registry_that_is_silent_once_is_asked_again(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    rooms.change(progress_timeout=15)  # a third of it is waited for the first answer
    ended = asyncio.Event()

    async def silent(request: web.Request) -> web.StreamResponse:
        if len(server.asked("1")) == 1:
            await ended.wait()
        return server.serve(request)

    server.answers["1"] = silent
    assert (await rooms.images.pull(f"{server.address}/app:1")).id == image.id
    ended.set()


async def test_a_server_that_trickles_makes_no_progress(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    rooms.change(progress_timeout=6)  # what comes before has a third of it, on a busy machine too
    digest, body = first_layer(image)

    async def trickle(request: web.Request) -> web.StreamResponse:
        response = part(request, body)
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for number in range(offset(request), len(body)):
                await response.write(body[number : number + 1])
                await asyncio.sleep(0.02)
        return response

    server.answers[digest] = trickle
    with within(30):
        await refused(rooms, f"{server.address}/app:1", UnavailableError, digest, "no progress")


async def test_a_slow_server_may_take_its_time(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    rooms.change(progress_timeout=6)  # an attempt has a third of it, which is several times a pause of the server
    digest, body = first_layer(image)

    async def slow(request: web.Request) -> web.StreamResponse:
        response = part(request, body)
        await response.prepare(request)
        for start in range(0, len(body), 9_000):
            await asyncio.sleep(0.3)
            await response.write(body[start : start + 9_000])
        return response

    server.answers[digest] = slow
    began = time.monotonic()
    await rooms.images.pull(f"{server.address}/app:1")
    assert time.monotonic() - began > 6
    assert len(server.asked(digest)) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 522])
@pytest.mark.parametrize("what", ["manifest", "layer"])
async def test_a_busy_registry_is_asked_again(
    server: Server, rooms: Rooms, image: BuiltImage, status: int, what: str
) -> None:
    name = "1" if what == "manifest" else first_layer(image)[0]
    server.answers[name] = statuses(status, status, status)(server)
    assert (await rooms.images.pull(f"{server.address}/app:1")).id == image.id
    assert len(server.asked(name)) == 4


async def test_a_registry_that_stays_busy_is_left_alone(server: Server, rooms: Rooms) -> None:
    server.answers["1"] = lambda _: web.Response(status=503)
    await refused(rooms, f"{server.address}/app:1", UnavailableError, "manifests/1: 503")
    assert len(server.requests) == 5


@pytest.mark.parametrize("status", [400, 404, 403, 410, 501])
async def test_a_refusal_is_final(server: Server, rooms: Rooms, status: int) -> None:
    server.answers["1"] = lambda _: web.Response(status=status)
    with pytest.raises(Exception, match=str(status)):
        await rooms.images.pull(f"{server.address}/app:1")
    assert len(server.requests) == 1


async def test_retry_after_is_kept_to(
    server: Server, rooms: Rooms, image: BuiltImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms.change(progress_timeout=30)
    server.answers["1"] = statuses(429, Retry_After="1")(server)
    began = time.monotonic()
    await rooms.images.pull(f"{server.address}/app:1")
    assert time.monotonic() - began > 1


async def test_a_registry_that_wants_to_be_left_alone_for_long_is(server: Server, rooms: Rooms) -> None:
    rooms.change(progress_timeout=10_000)
    server.answers["1"] = lambda _: web.Response(status=429, headers={"Retry-After": "3600"})
    await refused(rooms, f"{server.address}/app:1", UnavailableError, "429", "asks to wait 3600 s")
    assert len(server.requests) == 1


async def test_nobody_waits_for_a_busy_mirror(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    async with Server(image).running() as mirror:
        for name in ("1", *image.blobs):
            mirror.answers[name] = lambda _: web.Response(status=503, headers={"Retry-After": "20"})
        rooms.configure("r.example", f'server = "http://{server.address}"\n[host."http://{mirror.address}"]')
        await rooms.images.pull("r.example/app:1")
        assert len(mirror.requests) == len(image.blobs)


async def test_a_busy_mirror_is_asked_again_where_there_is_no_way_to_the_registry(
    rooms: Rooms, image: BuiltImage
) -> None:
    async with Server(image).running() as mirror:
        mirror.answers["1"] = statuses(503)(mirror)
        rooms.configure("r.example", f'server = "http://127.0.0.1:1"\n[host."http://{mirror.address}"]')
        assert (await rooms.images.pull("r.example/app:1")).id == image.id
        mirror.answers["2"] = lambda _: web.Response(status=404)
        with pytest.raises(UnavailableError, match="404"):
            await rooms.images.pull("r.example/app:2")


async def test_what_the_registry_itself_says_counts_though_a_mirror_is_busy(server: Server, rooms: Rooms) -> None:
    server.answers["1"] = lambda _: web.Response(status=404)
    async with Server(server.image).running() as mirror:
        mirror.answers["1"] = lambda _: web.Response(status=503)
        rooms.configure("r.example", f'server = "http://{server.address}"\n[host."http://{mirror.address}"]')
        await refused(rooms, "r.example/app:1", NotFoundError, "503", "404")
        assert len(mirror.requests) == len(server.requests) == 1


async def test_a_cancelled_pull_does_not_wait_on(
    server: Server, rooms: Rooms, image: BuiltImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("criserver.images.retries._FIRST_WAIT", 20)
    rooms.change(progress_timeout=100)
    server.answers[first_layer(image)[0]] = lambda _: web.Response(status=503)
    pull = asyncio.create_task(rooms.images.pull(f"{server.address}/app:1"))
    await until(lambda: server.asked(first_layer(image)[0]))
    await asyncio.sleep(0.1)
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(pull, 10)
    assert rooms.leftovers() == []


async def test_downloads_are_bounded_over_all_pulls(tmp_path: Path) -> None:
    images = [build_image([{f"{n}": os.urandom(1000)} for n in range(4)]) for _ in range(3)]
    rooms = Rooms(str(tmp_path), settings=RegistrySettings(max_downloads=2))
    now, most = 0, 0

    def counted(server: Server) -> Answer:
        async def answer(request: web.Request) -> web.Response:
            nonlocal now, most
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.02)
            now -= 1
            return server.serve(request)

        return answer

    async with contextlib.AsyncExitStack() as stack:
        names = []
        for built in images:
            server = await stack.enter_async_context(Server(built).running())
            server.answers = {layer["digest"]: counted(server) for layer in built.manifest["layers"]}
            rooms.configure(server.address, f'server = "http://{server.address}"')
            names.append(f"{server.address}/app:1")
        await asyncio.gather(*map(rooms.images.pull, names))
    assert most == 2
    rooms.close()


async def test_a_configuration_is_fetched_while_layers_of_other_pulls_wait(
    server: Server, tmp_path: Path, image: BuiltImage
) -> None:
    ended = asyncio.Event()

    async def silent(_: web.Request) -> web.StreamResponse:
        await ended.wait()
        return web.Response(status=404)

    rooms = Rooms(str(tmp_path), settings=RegistrySettings(max_downloads=1))
    rooms.configure(server.address, f'server = "http://{server.address}"')
    other = build_image([{"large": os.urandom(1000)}])
    async with Server(other).running() as stuck:
        stuck.answers = {layer["digest"]: silent for layer in other.manifest["layers"]}
        rooms.configure(stuck.address, f'server = "http://{stuck.address}"')
        first = asyncio.create_task(rooms.images.pull(f"{stuck.address}/app:1"))
        await until(lambda: stuck.asked(other.manifest["layers"][0]["digest"]))
        second = asyncio.create_task(rooms.images.pull(f"{server.address}/app:1"))
        await until(lambda: rooms.content.size(image.id) is not None)
        assert not server.asked(first_layer(image)[0])
        first.cancel()
        assert (await asyncio.wait_for(second, 30)).id == image.id
        await asyncio.wait([first])
        ended.set()
    rooms.close()


async def test_a_registry_that_stalls_does_not_hold_up_another(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    ended = asyncio.Event()

    async def silent(request: web.Request) -> web.StreamResponse:
        await ended.wait()
        return web.Response(status=404)

    rooms.change(progress_timeout=60)
    other = build_image([{f"{n}": os.urandom(1000)} for n in range(5)])
    async with Server(other).running() as stuck:
        stuck.answers = {layer["digest"]: silent for layer in other.manifest["layers"]}
        rooms.configure(stuck.address, f'server = "http://{stuck.address}"')
        waiting = asyncio.create_task(rooms.images.pull(f"{stuck.address}/app:1"))
        await until(lambda: len(stuck.requests) >= 5)
        assert (await asyncio.wait_for(rooms.images.pull(f"{server.address}/app:1"), 30)).id == image.id
        waiting.cancel()
        await asyncio.wait([waiting])
        ended.set()


@pytest.mark.parametrize("location", ["/v2/app/manifests/1", "/v2/app/manifests/1?again"])
async def test_redirects_in_a_circle_end(server: Server, rooms: Rooms, location: str) -> None:
    server.answers["1"] = lambda _: web.Response(status=307, headers={"Location": location})
    await refused(rooms, f"{server.address}/app:1", UnavailableError, "manifests/1: 307")
    assert len(server.requests) == 11
