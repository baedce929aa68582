"""Layers that are unpacked while their blobs arrive. Only a whole and correct layer is committed."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from criserver.errors import DataLossError, InvalidArgumentError
from criserver.images import pull
from snapshotter import Arrival, DiffMismatchError, LayerError, LayerLimits, Snapshotter, TruncatedLayerError
from tests.support.imagebuilder import BuiltImage, add_blob, build_image, digest
from tests.support.layers import Blob, item, write_blob
from tests.support.ownregistry import Server, refused, rooms, server
from tests.support.rooms import Rooms
from tests.support.waiting import until

__all__ = ["rooms", "server"]


FILES = {f"d/f{n}": os.urandom(10_000) for n in range(300)}


@pytest.fixture
def image() -> BuiltImage:
    """An image of one layer, which takes many reads."""
    return build_image([FILES])


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long is what takes a moment."""
    monkeypatch.setattr(pull, "_SOON", 0.05)


@pytest.fixture
async def snapshotter(tmp_path: Any) -> AsyncIterator[Snapshotter]:
    made = Snapshotter(f"{tmp_path}/snapshots")
    yield made
    made.close()


class Slow:
    """A blob of a layer that comes in pieces; ``path`` is the file it comes into."""

    def __init__(self, directory: str) -> None:
        files = [item(f"d/f{n}", os.urandom(10_000)) for n in range(100)]
        self.whole: Blob = write_blob(f"{directory}/whole", *files)
        with open(self.whole.path, "rb") as f:
            self.content = f.read()
        self.path = f"{directory}/arriving"
        self._file = open(self.path, "wb", buffering=0)  # noqa: SIM115 - it is written to until the test ends
        self.size = 0

    def add(self, size: int, arrival: Arrival | None = None) -> None:
        """The next ``size`` bytes come."""
        self._file.write(self.content[self.size : self.size + size])
        self.size = min(self.size + size, len(self.content))
        if arrival is not None:
            arrival.grown(self.size)

    def begin(self, snapshotter: Snapshotter) -> Arrival:
        arrival = snapshotter.arrival(self.path, compression="gzip", diff_id=self.whole.diff_id)
        assert arrival is not None
        return arrival

    async def commit(self, snapshotter: Snapshotter, arrival: Arrival | None) -> str:
        """The root of the layer, whose blob is whole by now."""
        layer = await snapshotter.unpack(
            self.path, compression="gzip", diff_id=self.whole.diff_id, chain_id="c", parent=None, arrival=arrival
        )
        return f"{layer.path}/fs"


@pytest.fixture
def slow(tmp_path: Any) -> Slow:
    return Slow(str(tmp_path))


def unpacked(root: str) -> int:
    """The number of files in staging."""
    return sum(name.startswith("f") for _, _, names in os.walk(f"{root}/snapshots/staging") for name in names)


async def test_files_are_there_before_the_blob_is_whole(snapshotter: Snapshotter, slow: Slow, tmp_path: Any) -> None:
    slow.add(400_000)
    arrival = slow.begin(snapshotter)
    await until(lambda: unpacked(tmp_path) > 30)
    slow.add(400_000, arrival)
    await until(lambda: unpacked(tmp_path) > 70)
    assert dict(snapshotter.layers()) == {}
    slow.add(10_000_000, arrival)
    assert len(os.listdir(f"{await slow.commit(snapshotter, arrival)}/d")) == 100
    assert os.listdir(f"{tmp_path}/snapshots/staging") == []


async def test_a_blob_may_begin_with_less_than_tells_its_compression(snapshotter: Snapshotter, slow: Slow) -> None:
    slow.add(3)
    arrival = slow.begin(snapshotter)
    await asyncio.sleep(0.2)  # the worker has read what there is and waits
    slow.add(10_000_000, arrival)
    assert len(os.listdir(f"{await slow.commit(snapshotter, arrival)}/d")) == 100


async def test_a_closed_arrival_leaves_nothing(snapshotter: Snapshotter, slow: Slow, tmp_path: Any) -> None:
    slow.add(400_000)
    arrival = slow.begin(snapshotter)
    await until(lambda: unpacked(tmp_path) > 0)
    await arrival.close()
    assert os.listdir(f"{tmp_path}/snapshots/staging") == []


async def test_an_arrival_that_is_done_leaves_nothing_when_it_is_closed(
    snapshotter: Snapshotter, slow: Slow, tmp_path: Any
) -> None:
    slow.add(10_000_000)
    arrival = slow.begin(snapshotter)
    assert await arrival.result() is not None
    assert unpacked(tmp_path) == 100
    await arrival.close()
    assert os.listdir(f"{tmp_path}/snapshots/staging") == []


async def test_an_arrival_is_not_needed_where_the_layer_came_otherwise(
    snapshotter: Snapshotter, slow: Slow, tmp_path: Any
) -> None:
    slow.add(400_000)
    arrival = slow.begin(snapshotter)
    slow.add(10_000_000)
    root = await slow.commit(snapshotter, None)
    assert await slow.commit(snapshotter, arrival) == root
    assert os.listdir(f"{tmp_path}/snapshots/staging") == []


async def test_an_arrival_that_was_given_up_is_unpacked_anew(snapshotter: Snapshotter, slow: Slow) -> None:
    slow.add(400_000)
    arrival = slow.begin(snapshotter)
    arrival.give_up()
    slow.add(10_000_000, arrival)
    assert len(os.listdir(f"{await slow.commit(snapshotter, arrival)}/d")) == 100


async def test_an_error_of_bytes_that_are_void_is_none(snapshotter: Snapshotter, slow: Slow, tmp_path: Any) -> None:
    """The worker has ended before the download knew that what a mirror sent was wrong."""
    with open(slow.path, "wb") as f:
        f.write(b"<html>" * 1000)
    arrival = slow.begin(snapshotter)
    await until(arrival._task.done)
    arrival.give_up()
    slow.add(10_000_000, arrival)
    assert len(os.listdir(f"{await slow.commit(snapshotter, arrival)}/d")) == 100
    assert os.listdir(f"{tmp_path}/snapshots/staging") == []


async def test_a_layer_of_bytes_that_are_void_is_discarded(snapshotter: Snapshotter, slow: Slow, tmp_path: Any) -> None:
    slow.add(10_000_000)
    arrival = slow.begin(snapshotter)
    arrival._hang_up()
    await until(arrival._task.done)
    arrival.give_up()
    assert await arrival.result() is None
    assert os.listdir(f"{tmp_path}/snapshots/staging") == []


async def test_a_wait_beyond_the_workers_deadline_costs_a_second_unpack_only(slow: Slow, tmp_path: Any) -> None:
    snapshotter = Snapshotter(f"{tmp_path}/snapshots", limits=LayerLimits(max_seconds=1))
    slow.add(400_000)
    arrival = slow.begin(snapshotter)
    await asyncio.sleep(1.3)  # beyond the worker's deadline
    snapshotter.limits = LayerLimits()
    slow.add(10_000_000, arrival)
    assert len(os.listdir(f"{await slow.commit(snapshotter, arrival)}/d")) == 100
    snapshotter.close()


async def test_no_more_than_three_wait_for_their_blobs(snapshotter: Snapshotter, slow: Slow) -> None:
    slow.add(400_000)
    arrivals = [slow.begin(snapshotter) for _ in range(3)]
    assert snapshotter.arrival(slow.path, compression="gzip", diff_id=slow.whole.diff_id) is None
    slow.add(10_000_000)
    # They do not hold up what is whole.
    await slow.commit(snapshotter, None)
    for arrival in arrivals:
        await arrival.close()
    await slow.begin(snapshotter).close()


async def test_a_blob_that_ends_early_is_told(snapshotter: Snapshotter, slow: Slow, tmp_path: Any) -> None:
    slow.add(400_000)
    with pytest.raises(TruncatedLayerError):
        await slow.commit(snapshotter, slow.begin(snapshotter))
    assert os.listdir(f"{tmp_path}/snapshots/staging") == []


@pytest.mark.parametrize(("said", "error"), [("sha256:" + "0" * 64, DiffMismatchError), (None, LayerError)])
async def test_bad_content_is_told(
    snapshotter: Snapshotter, slow: Slow, tmp_path: Any, said: str | None, error: type[LayerError]
) -> None:
    if said is None:
        slow.content = slow.content[:500_000] + bytes(500_000)
    slow.whole = Blob(slow.whole.path, said or slow.whole.diff_id)
    slow.add(400_000)
    arrival = slow.begin(snapshotter)
    slow.add(10_000_000, arrival)
    with pytest.raises(error):
        await slow.commit(snapshotter, arrival)
    assert (os.listdir(f"{tmp_path}/snapshots/staging"), dict(snapshotter.layers())) == ([], {})


async def test_cancelling_the_only_caller_leaves_nothing(snapshotter: Snapshotter, slow: Slow, tmp_path: Any) -> None:
    slow.add(10_000_000)
    caller = asyncio.create_task(slow.commit(snapshotter, slow.begin(snapshotter)))
    await until(lambda: unpacked(tmp_path) > 0)
    caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled()
    assert (os.listdir(f"{tmp_path}/snapshots/staging"), dict(snapshotter.layers())) == ([], {})


def in_parts(body: bytes, first: int, gate: asyncio.Event) -> Callable[[web.Request], Any]:
    """An answer that has its first bytes at once, and the others when the gate opens."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(request)
        await response.write(body[:first])
        await gate.wait()
        await response.write(body[first:])
        return response

    return answer


async def test_a_pull_unpacks_what_has_arrived(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    layer = image.manifest["layers"][0]["digest"]
    gate = asyncio.Event()
    server.answers[layer] = in_parts(image.blobs[layer], 2_000_000, gate)
    pulling = asyncio.create_task(rooms.images.pull(f"{server.address}/app:1"))
    await until(lambda: unpacked(rooms.root) > 150)
    assert dict(rooms.snapshotter.layers()) == {}
    gate.set()
    found = await pulling
    assert rooms.read(found, "d/f299") == FILES["d/f299"]
    assert os.listdir(f"{rooms.root}/snapshots/staging") == []


async def test_what_comes_at_once_is_not_begun_early(
    server: Server, rooms: Rooms, image: BuiltImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(pull, "_SOON", 1000)
    monkeypatch.setattr(rooms.snapshotter, "arrival", lambda path, **_: begun.append(path))
    await rooms.images.pull(f"{server.address}/app:1")
    assert begun == []


async def test_a_cancelled_pull_leaves_nothing_of_what_has_arrived(
    server: Server, rooms: Rooms, image: BuiltImage
) -> None:
    layer = image.manifest["layers"][0]["digest"]
    server.answers[layer] = in_parts(image.blobs[layer], 2_000_000, asyncio.Event())
    pulling = asyncio.create_task(rooms.images.pull(f"{server.address}/app:1"))
    await until(lambda: unpacked(rooms.root) > 150)
    pulling.cancel()
    await asyncio.wait([pulling])
    assert rooms.leftovers() == []


async def test_a_layer_of_a_wrong_blob_is_never_committed(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    """Its content is a whole layer, and even the one that the configuration names: the blob's digest decides."""
    layer = image.manifest["layers"][0]
    blobs = dict(image.blobs)
    wrong = {**layer, "digest": digest(b"another")}
    body = json.dumps({**image.manifest, "layers": [wrong]}).encode()
    server.image = BuiltImage(blobs, add_blob(blobs, str(image.descriptor["mediaType"]), body))
    gate = asyncio.Event()
    server.answers[wrong["digest"]] = in_parts(image.blobs[layer["digest"]], layer["size"] - 1, gate)
    seen = asyncio.create_task(until(lambda: unpacked(rooms.root) > 250))
    seen.add_done_callback(lambda _: gate.set())
    await refused(rooms, f"{server.address}/app:1", DataLossError, f"blob {wrong['digest']}")
    await seen


async def test_what_a_bad_mirror_sent_is_unpacked_anew(server: Server, rooms: Rooms, image: BuiltImage) -> None:
    """The mirror has a layer of other files, which are begun to be unpacked; the registry has the right one."""
    layer = image.manifest["layers"][0]
    other = build_image([{f"d/f{n}": os.urandom(10_000) for n in range(300)}])
    lie = other.blobs[other.manifest["layers"][0]["digest"]][: layer["size"]]
    gate = asyncio.Event()
    async with Server(image).running() as mirror:
        mirror.answers[layer["digest"]] = in_parts(lie.ljust(layer["size"], b"\0"), 2_000_000, gate)
        rooms.configure("r.example", f'server = "http://{server.address}"\n[host."http://{mirror.address}"]\n')
        pulling = asyncio.create_task(rooms.images.pull("r.example/app:1"))
        await until(lambda: unpacked(rooms.root) > 150)
        gate.set()
        found = await pulling
    assert server.asked(layer["digest"])
    for name in ("d/f0", "d/f299"):
        assert rooms.read(found, name) == FILES[name]
    assert os.listdir(f"{rooms.root}/snapshots/staging") == []


async def test_a_broken_layer_that_its_manifest_names_is_refused(
    server: Server, rooms: Rooms, image: BuiltImage
) -> None:
    layer = image.manifest["layers"][0]
    blobs = dict(image.blobs)
    broken = add_blob(blobs, layer["mediaType"], image.blobs[layer["digest"]][:-2_000_000] + bytes(2_000_000))
    body = json.dumps({**image.manifest, "layers": [broken]}).encode()
    server.image = BuiltImage(blobs, add_blob(blobs, str(image.descriptor["mediaType"]), body))
    await refused(rooms, f"{server.address}/app:1", InvalidArgumentError, broken["digest"])
