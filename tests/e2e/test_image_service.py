"""Images by CRI and by the operator's command: their names, the codes of errors, and what the node has afterwards."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from criserver.cli.client import method
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.fixtures import import_image
from tests.support.imagebuilder import Dir, Layer, Link, build_image, busybox_image, write_docker_archive
from tests.support.node import Node, filled, refused
from tests.support.registry import HTPASSWD, Registry, registry, running
from tests.support.waiting import SLOWNESS, eventually

__all__ = ["registry"]


def spec(name: str) -> cri.ImageSpec:
    return cri.ImageSpec(image=name)


def test_the_way_of_an_image(node: Node, registry: Registry) -> None:
    image = busybox_image(config={"User": "1000", "Labels": {"way": "whole"}})
    name = registry.push(image, "way:1")
    before = node.client.ImageFsInfo().image_filesystems[0]
    assert not node.client.ImageStatus(image=spec(name)).HasField("image")
    image_id = node.client.PullImage(image=spec(name)).image_ref
    assert image_id == image.id
    for given in (name, image_id, f"{name.rpartition(':')[0]}@{image.digest}"):
        status = node.client.ImageStatus(image=spec(given), verbose=True)
        assert status.image.id == image_id
        assert status.image.uid.value == 1000
        assert list(status.image.repo_tags) == [name]
        info = json.loads(status.info["info"])
        assert info["chainID"]
        assert info["imageSpec"]["config"]["Labels"] == {"way": "whole"}
    assert image_id in {i.id for i in node.client.ListImages().images}
    assert [i.id for i in node.client.ListImages(filter=cri.ImageFilter(image=spec(name))).images] == [image_id]
    after = node.client.ImageFsInfo().image_filesystems[0]
    assert after.used_bytes.value > before.used_bytes.value
    assert after.fs_id.mountpoint == f"{node.root}/snapshots"
    for _ in range(2):
        node.client.RemoveImage(image=spec(name))
    assert not node.client.ImageStatus(image=spec(image_id)).HasField("image")
    assert node.client.ImageFsInfo().image_filesystems[0].used_bytes.value == before.used_bytes.value


def test_an_image_survives_the_daemon(node: Node, registry: Registry) -> None:
    name = registry.push(busybox_image(config={"Labels": {"survives": "yes"}}), "survivor:1")
    image_id = node.client.PullImage(image=spec(name)).image_ref
    node.kill()
    node.start()
    assert node.client.ImageStatus(image=spec(name)).image.id == image_id
    pod = node.run_pod("survivor")
    assert node.wait(node.run(pod, "c", ["true"], image=name)).exit_code == 0
    node.client.RemoveImage(image=spec(name))


def test_an_image_may_be_removed_under_a_running_container(node: Node, registry: Registry) -> None:
    unique = [{"unique-file": b"only here"}]
    name = registry.push(busybox_image(layers=unique), "used:1")
    before = node.client.ImageFsInfo().image_filesystems[0].used_bytes.value
    node.client.PullImage(image=spec(name))
    pod = node.run_pod("user")
    container = node.run(pod, "c", ["sleep", "1000"], image=name)
    node.client.RemoveImage(image=spec(name))
    assert node.sh(container, "cat /unique-file") == "only here"
    node.client.RemovePodSandbox(pod_sandbox_id=pod)
    eventually(lambda: used_bytes(node) == before)


def test_images_can_be_removed_from_a_full_disk(node: Node, registry: Registry) -> None:
    name = registry.push(build_image([{"large": os.urandom(3_000_000)}]), "full:1")
    before = used_bytes(node)
    node.client.PullImage(image=spec(name))
    second = registry.push(build_image([{"a": os.urandom(9000)}]), "full:2")
    with filled(node.root):
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
            node.client.PullImage(image=spec(second))
        node.client.RemoveImage(image=spec(name))
    assert not node.client.ImageStatus(image=spec(name)).HasField("image")
    assert used_bytes(node) == before
    assert node.settled() == []


def test_the_layers_of_an_image_volume_go_with_its_container(node: Node, registry: Registry) -> None:
    before = used_bytes(node)
    name = registry.push(build_image([{"data": os.urandom(100_000)}]), "volume:1")
    node.client.PullImage(image=spec(name))
    pod = node.run_pod("user")
    mount = cri.Mount(container_path="/data", image=spec(name), readonly=True)
    container = node.run(pod, "c", ["sleep", "1000"], mounts=[mount])
    node.client.RemoveImage(image=spec(name))
    assert node.sh(container, "ls /data") == "data\n"
    node.remove_pods()
    eventually(lambda: used_bytes(node) == before)


def test_what_images_and_containers_occupy_is_told_apart(node: Node, registry: Registry) -> None:
    def container_inodes() -> int:
        return node.client.ImageFsInfo().container_filesystems[0].inodes_used.value

    before = used_bytes(node)
    assert container_inodes() == 0
    pod = node.run_pod("writer")
    container = node.run(pod, "c", ["sleep", "1000"])
    eventually(lambda: container_inodes() > 0)
    info = node.client.ImageFsInfo()
    (images,), (writable,) = info.image_filesystems, info.container_filesystems
    assert images.fs_id == writable.fs_id
    assert images.used_bytes.value == before
    assert 0 < writable.timestamp <= time.time_ns()
    node.client.RemoveContainer(container_id=container)
    assert container_inodes() == 0


def test_what_an_image_occupies_is_told_at_once(node: Node, registry: Registry) -> None:
    layers: list[Layer] = [
        {"d": Dir(), "d/a": os.urandom(5000), "d/b": b"1", "e": Link("d/a")},
        {"large": os.urandom(1_000_000)},
    ]
    image = build_image(layers)
    blobs = sum(-(-len(blob) // 4096) * 4096 for blob in image.blobs.values())
    # A directory and whole blocks of files; links fit into their inodes.
    files = 4096 + 8192 + 4096 + -(-1_000_000 // 4096) * 4096
    name = registry.push(image, "told:1")
    before = node.client.ImageFsInfo().image_filesystems[0]
    for _ in range(2):
        node.client.PullImage(image=spec(name))
        after = node.client.ImageFsInfo().image_filesystems[0]
        assert after.used_bytes.value - before.used_bytes.value == blobs + files
        assert after.inodes_used.value - before.inodes_used.value == len(image.blobs) + 5
        node.client.RemoveImage(image=spec(name))
        assert used_bytes(node) == before.used_bytes.value


def test_an_image_is_removed_with_all_its_names_by_any_of_them_at_once(node: Node, registry: Registry) -> None:
    image = build_image([{"a": os.urandom(1000)}])
    names = [registry.push(image, f"many{n}:{n}") for n in range(3)]
    before = used_bytes(node)
    for given in (names[0], image.id, image.id[7:], f"{names[1].rpartition(':')[0]}@{image.digest}"):
        for name in names:
            node.client.PullImage(image=spec(name))
        with ThreadPoolExecutor(8) as pool:
            for answer in [pool.submit(node.client.RemoveImage, image=spec(given)) for _ in range(8)]:
                answer.result()
        assert not [name for name in names if node.client.ImageStatus(image=spec(name)).HasField("image")]
        eventually(lambda: used_bytes(node) == before)


def test_pulls_removals_and_prunes_of_one_image_at_once(node: Node, registry: Registry) -> None:
    image = build_image([{f"{n}": os.urandom(500) for n in range(50)}, {"b": os.urandom(200_000)}])
    names = [registry.push(image, f"contended{n}:1") for n in range(2)]
    before, over = used_bytes(node), time.monotonic() + 4
    done = [0] * 5
    prune = method(node.client.channel, admin.DESCRIPTOR.services_by_name["AdminService"], "PruneImages")
    node.client.PullImage(image=spec(names[0]))  # so that what is not the tests' own is used, by a container
    pod = node.run_pod("user")
    node.create(pod, "c")

    def repeat(number: int, action: Callable[[], object]) -> None:
        """For four seconds, and on for a minute at most until each of all actions was done a few times."""
        while time.monotonic() < over or (min(done) <= 5 and time.monotonic() < over + 60 * SLOWNESS):
            action()
            done[number] += 1

    with ThreadPoolExecutor(5) as pool:
        work = [
            pool.submit(repeat, number, action)
            for number, action in enumerate(
                (
                    lambda: node.client.PullImage(image=spec(names[0])),
                    lambda: node.client.PullImage(image=spec(names[1])),
                    lambda: node.client.RemoveImage(image=spec(names[0])),
                    lambda: prune(admin.PruneImagesRequest(all=True)),
                    lambda: prune(admin.PruneImagesRequest()),
                )
            )
        ]
        for repeated in work:
            repeated.result()
    assert min(done) > 5
    for name in names:
        assert node.client.PullImage(image=spec(name)).image_ref == image.id
    verify = method(node.client.channel, admin.DESCRIPTOR.services_by_name["AdminService"], "VerifyImages")
    assert [damage for found in verify(admin.VerifyImagesRequest()) for damage in found.damage] == []
    node.client.RemoveImage(image=spec(names[0]))
    eventually(lambda: used_bytes(node) == before)
    assert node.client.ImageStatus(image=spec("localhost/busybox:latest")).HasField("image")


def used_bytes(node: Node) -> int:
    return node.client.ImageFsInfo().image_filesystems[0].used_bytes.value


def test_refusals(node: Node, registry: Registry) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "Not A Name"):
        node.client.PullImage(image=spec("Not A Name"))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "empty"):
        node.client.PullImage()
    with refused(grpc.StatusCode.NOT_FOUND, f"{registry.address}/absent:1"):
        node.client.PullImage(image=spec(f"{registry.address}/absent:1"))
    with refused(grpc.StatusCode.UNAVAILABLE, "127.0.0.1:1"):
        node.client.PullImage(image=spec("127.0.0.1:1/x:1"))
    for text in ("no base64", "bm8gY29sb24="):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "auth.auth is not base64 of a user name"):
            node.client.PullImage(image=spec("x"), auth=cri.AuthConfig(auth=text))
    assert node.settled() == []


def test_a_pull_with_the_secret_of_a_pod(node: Node, registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    image = busybox_image(config={"Labels": {"private": "yes"}})
    registry.push(image, "private/app:1")
    auth = {"htpasswd": {"realm": "here", "path": str(tmp_path / "htpasswd")}}
    with running(str(tmp_path), storage=registry, auth=auth) as private:
        name = f"{private.address}/private/app:1"
        for wrong in (None, cri.AuthConfig(), cri.AuthConfig(username="me", password="wrong")):
            with refused(grpc.StatusCode.UNAUTHENTICATED, "check the pull secret"):
                node.client.PullImage(image=spec(name), auth=wrong)
        for right in (
            cri.AuthConfig(username="me", password="secret"),
            cri.AuthConfig(auth=base64.b64encode(b"me:secret").decode()),
            cri.AuthConfig(username="me", password="secret", server_address=f"http://{private.address}"),
        ):
            assert node.client.PullImage(image=spec(name), auth=right).image_ref == image.id
            node.client.RemoveImage(image=spec(name))
    assert "secret" not in node.daemon_log().replace("pull secret", "")


def test_import_by_the_operators_command(node: Node, tmp_path: Path) -> None:
    path = str(tmp_path / "saved.tar")
    write_docker_archive(busybox_image(config={"Labels": {"saved": "1"}}), path, ["localhost/saved:1"])
    import_image(node, path)
    assert node.client.ImageStatus(image=spec("localhost/saved:1")).image.repo_tags == ["localhost/saved:1"]
    node.client.RemoveImage(image=spec("localhost/saved:1"))


@pytest.mark.parametrize(("content", "words"), [(b"no archive at all", "no tar file"), (None, "No such file")])
def test_an_import_that_is_refused(node: Node, tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "import.tar"
    if content is not None:
        path.write_bytes(content)
    command = [sys.executable, "-m", "criserver", "image", "import", "--config", node.config, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("criserver: ")
    assert "Traceback" not in done.stderr
    assert words in done.stderr
    assert str(path) in done.stderr
    assert node.settled() == []


def test_an_import_without_a_daemon(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(f'[grpc]\naddress = "{tmp_path}/none.sock"\n')
    (tmp_path / "x.tar").write_bytes(b"x")
    command = [sys.executable, "-m", "criserver", "image", "import", "--config", str(tmp_path / "c.toml")]
    done = subprocess.run([*command, str(tmp_path / "x.tar")], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert f"no daemon answers at {tmp_path}/none.sock" in done.stderr
