"""Images by CRI and by the operator's command: names, codes, and what a node has afterwards."""

from __future__ import annotations

import base64
import subprocess
import sys

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.e2e.conftest import import_image
from tests.e2e.imagebuilder import busybox_image, write_docker_archive
from tests.e2e.node import Node
from tests.e2e.registry import HTPASSWD, Registry, registry, running
from tests.e2e.test_bad_input import refused

__all__ = ["registry"]


def spec(name: str) -> cri.ImageSpec:
    return cri.ImageSpec(image=name)


def test_the_way_of_an_image(node: Node, registry: Registry):
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
        assert "chainID" in status.info["info"]
    assert image_id in {i.id for i in node.client.ListImages().images}
    assert [i.id for i in node.client.ListImages(filter=cri.ImageFilter(image=spec(name))).images] == [image_id]
    after = node.client.ImageFsInfo().image_filesystems[0]
    assert after.used_bytes.value > before.used_bytes.value
    assert after.fs_id.mountpoint == f"{node.root}/snapshots"
    for _ in range(2):
        node.client.RemoveImage(image=spec(name))
    assert not node.client.ImageStatus(image=spec(image_id)).HasField("image")
    assert node.client.ImageFsInfo().image_filesystems[0].used_bytes.value == before.used_bytes.value


def test_an_image_survives_the_daemon(node: Node, registry: Registry):
    name = registry.push(busybox_image(config={"Labels": {"survives": "yes"}}), "survivor:1")
    image_id = node.client.PullImage(image=spec(name)).image_ref
    node.kill()
    node.start()
    assert node.client.ImageStatus(image=spec(name)).image.id == image_id
    pod = node.run_pod("survivor")
    assert node.wait(node.run(pod, "c", ["true"], image=name)).exit_code == 0
    node.client.RemoveImage(image=spec(name))


def test_an_image_may_be_removed_under_a_running_container(node: Node, registry: Registry):
    unique = {"layers": [{"unique-file": b"only here"}]}
    name = registry.push(busybox_image(**unique), "used:1")
    before = node.client.ImageFsInfo().image_filesystems[0].used_bytes.value
    node.client.PullImage(image=spec(name))
    pod = node.run_pod("user")
    container = node.run(pod, "c", ["sleep", "1000"], image=name)
    node.client.RemoveImage(image=spec(name))
    assert node.sh(container, "cat /unique-file") == "only here"
    node.client.RemovePodSandbox(pod_sandbox_id=pod)
    for _ in range(100):
        if node.client.ImageFsInfo().image_filesystems[0].used_bytes.value == before:
            break
    assert node.client.ImageFsInfo().image_filesystems[0].used_bytes.value == before


def test_refusals(node: Node, registry: Registry):
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
    assert node.leftovers() == []


def test_a_pull_with_the_secret_of_a_pod(node: Node, registry: Registry, tmp_path):
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


def test_import_by_the_operators_command(node: Node, tmp_path):
    path = str(tmp_path / "saved.tar")
    write_docker_archive(busybox_image(config={"Labels": {"saved": "1"}}), path, ["localhost/saved:1"])
    import_image(node, path)
    assert node.client.ImageStatus(image=spec("localhost/saved:1")).image.repo_tags == ["localhost/saved:1"]
    node.client.RemoveImage(image=spec("localhost/saved:1"))


@pytest.mark.parametrize(("content", "words"), [(b"no archive at all", "no tar file"), (None, "No such file")])
def test_an_import_that_is_refused(node: Node, tmp_path, content, words):
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
    assert node.leftovers() == []


def test_an_import_without_a_daemon(tmp_path):
    (tmp_path / "c.toml").write_text(f'[grpc]\naddress = "{tmp_path}/none.sock"\n')
    (tmp_path / "x.tar").write_bytes(b"x")
    command = [sys.executable, "-m", "criserver", "image", "import", "--config", str(tmp_path / "c.toml")]
    done = subprocess.run([*command, str(tmp_path / "x.tar")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"no daemon answers at {tmp_path}/none.sock" in done.stderr
