"""``criserver image``: the real command, the real daemon, real registries."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import glob
import gzip
import json
import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from criserver.images import Platform
from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.imagebuilder import (
    BuiltImage,
    Dir,
    File,
    Link,
    build_image,
    busybox_image,
    by_sha512,
    digest,
    tar_of,
    write_archive,
)
from tests.support.lyingregistry import Server as ImageServer
from tests.support.lyingregistry import server
from tests.support.node import Node
from tests.support.ownregistry import Server
from tests.support.registry import HTPASSWD, Registry, registry, running
from tests.support.screen import Screen
from tests.support.waiting import eventually

__all__ = ["registry", "server"]

MB = 1_000_000


def command(node: Node, action: str, *arguments: str, code: int = 0, **more: Any) -> subprocess.CompletedProcess[str]:
    """What ``criserver image ACTION`` prints, and says on standard error; it ends with ``code``."""
    words = [sys.executable, "-m", "criserver", "image", action, "--config", node.config, *arguments]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120, **more}
    done = subprocess.run(words, check=False, **options)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert b"Traceback" not in done.stderr if isinstance(done.stderr, bytes) else "Traceback" not in done.stderr
    return done


def made(*layers: int, label: str = "") -> BuiltImage:
    """An image like no other, with layers of so many bytes that do not compress."""
    label = label or os.urandom(4).hex()
    return build_image([{f"{n}": os.urandom(size)} for n, size in enumerate(layers)], {"Labels": {"label": label}})


def used_bytes(node: Node) -> int:
    return node.client.ImageFsInfo().image_filesystems[0].used_bytes.value


@pytest.fixture(autouse=True)
def only_busybox(node: Node) -> Iterator[None]:
    """After each test the node has the images that it had before."""
    before = {image.id for image in node.client.ListImages().images}
    used = used_bytes(node)
    yield
    if node.process is None or node.process.poll() is not None:
        node.start()
    node.remove_pods()
    for image in node.client.ListImages().images:
        if image.id not in before:
            node.client.RemoveImage(image=cri.ImageSpec(image=image.id))
    eventually(lambda: used_bytes(node) == used)


@dataclass
class Gated(Server):
    """A registry that sends half of each blob and the rest when ``gate`` is open; ``broken`` counts who left."""

    gate: threading.Event = field(default_factory=threading.Event)
    broken: int = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        name = request.path.rpartition("/")[2]
        body = self.image.blobs.get(name, b"")
        if len(body) < 10_000 or "Range" in request.headers:
            return await super().handle(request)
        self.requests.append(request)
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(request)
        try:
            await response.write(body[: len(body) // 2])
            while not self.gate.is_set():
                if request.transport is None or request.transport.is_closing():
                    self.broken += 1
                    return response
                await asyncio.sleep(0.01)
            await response.write(body[len(body) // 2 :])
        except ConnectionError:
            self.broken += 1
        return response


@contextlib.contextmanager
def gated(image: BuiltImage) -> Iterator[Gated]:
    """A :class:`Gated` registry of ``image`` as ``ADDRESS/app:1``, in a thread."""
    server = Gated(image)
    ready, over = threading.Event(), threading.Event()

    async def serve() -> None:
        async with server.running():
            ready.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(10)
        yield server
    finally:
        server.gate.set()
        over.set()
        thread.join()


def test_the_list_is_a_table_of_names(node: Node, registry: Registry) -> None:
    image = made(2 * MB)
    names = [registry.push(image, f"listed:{n}") for n in (1, 2)]
    for name in names:
        command(node, "pull", name, "--pin")
    title, *lines = command(node, "list").stdout.splitlines()
    assert title.split() == ["IMAGE", "ID", "SIZE", "ON", "DISK", "USED", "BY", "SINCE"]
    rows = [line.split() for line in lines]
    size = re.compile(r"2(\.0\d)?")
    for name in names:
        (row,) = [row for row in rows if row[0] == name]
        assert row[1] == image.id[7:19]
        assert size.fullmatch(row[2])
        # The blob and the unpacked layer.
        assert re.fullmatch(r"4(\.\d+)?", row[4])
        assert [row[3], *row[5:]] == ["MB", "MB", "-", "-", "pinned"]
    assert ["localhost/busybox:latest"] in [row[:1] for row in rows]
    assert not any("pinned" in row for row in rows if "busybox" in row[0])


def test_the_list_as_json_and_as_ids(node: Node, registry: Registry) -> None:
    image = made(1000)
    name = registry.push(image, "json:1")
    command(node, "pull", name)
    repository = name.rpartition(":")[0]
    for given in (name, repository, image.id, image.id[7:15]):
        (found,) = json.loads(command(node, "list", given, "--json").stdout)
        assert found.pop("onDisk") > found["size"]
        assert found == {
            "id": image.id,
            "usedBy": [],
            "usedSince": 0,
            "repoTags": [name],
            "repoDigests": [f"{repository}@{image.digest}"],
            "size": sum(len(blob) for digest, blob in image.blobs.items() if digest != image.digest),
            "pinned": False,
        }
        assert command(node, "list", given, "-q").stdout == f"{image.id}\n"
    assert command(node, "list", "absent:1", "-q").stdout == ""
    assert json.loads(command(node, "list", "absent:1", "--json").stdout) == []


def test_a_pull_says_what_becomes_of_each_layer(node: Node) -> None:
    image = made(300_000, 400_000)
    with gated(image) as server:
        server.gate.set()
        done = command(node, "pull", f"{server.address}/app:1")
    assert done.stdout.split()[0] == image.id
    assert f"{server.address}/app:1" in done.stdout.split()
    stages: dict[str, list[str]] = {}
    for line in done.stderr.splitlines():
        digest, stage, *_ = line.split()
        stages.setdefault(digest, []).append(stage)
    assert sorted(stages) == sorted(layer["digest"][7:19] for layer in image.manifest["layers"])
    order = ["downloading", "unpacking", "done"]
    for seen in stages.values():
        assert seen == sorted(seen, key=order.index)
        assert seen[-1] == "done"


def test_a_pull_on_a_terminal_has_a_bar_for_each_layer(node: Node) -> None:
    image = made(3 * MB, 5 * MB)
    short = [layer["digest"][7:19] for layer in image.manifest["layers"]]
    with (
        gated(image) as server,
        Screen("image", "pull", "--config", node.config, f"{server.address}/app:1", columns=60) as terminal,
    ):
        half = terminal.shows(lambda lines: "1.5 MB / 3 MB" in str(lines) and "2.5 MB / 5 MB" in str(lines))
        assert [line.split()[0] for line in half] == short
        for line in half:
            assert re.search(r"\[(=+)( +)\]", line)
            bar = line.partition("[")[2].partition("]")[0]
            assert len(bar) == 20
            assert bar.count("=") in (9, 10)
        server.gate.set()
        assert terminal.wait() == 0
    assert [part for line in half for part in line.split()[:1]] == short
    shown = [line for line in terminal.printed.splitlines() if "\x1b" not in line]
    assert all(len(line) < 60 for line in shown if "sha256" not in line)
    end = terminal.shows(lambda _: True)
    assert end[:2] == [f"{digest} done" for digest in short]
    assert end[2].startswith(image.id)


def test_an_image_of_more_layers_than_the_terminal_has_rows(node: Node) -> None:
    image = made(*[20_000] * 12)
    with (
        gated(image) as server,
        Screen("image", "pull", "--config", node.config, f"{server.address}/app:1", columns=50, rows=6) as terminal,
    ):
        lines = terminal.shows(lambda lines: str(lines).count("10.1 kB / 20.3 kB") == 3)
        assert len(lines) == 5
        assert lines[-1] == "and 8 more, of which 0 are done"
        assert all(len(line) < 50 for line in lines)
        server.gate.set()
        assert terminal.wait() == 0
    assert "and 8 more, of which 8 are done" in terminal.shows(lambda _: True)


def test_a_pull_ends_with_its_command(node: Node) -> None:
    before = used_bytes(node)
    with (
        gated(made(3 * MB)) as server,
        Screen("image", "pull", "--config", node.config, f"{server.address}/app:1") as terminal,
    ):
        terminal.shows(lambda lines: "1.5 MB / 3 MB" in str(lines))
        assert used_bytes(node) > before + MB, "what arrives counts at once"
        terminal.type("\x03")
        assert terminal.wait() == 130
        eventually(lambda: not node.leftovers() and used_bytes(node) == before and server.broken)
    assert "Traceback" not in terminal.printed


def test_who_waits_for_the_same_pull_sees_it_and_goes_on_without_the_other(node: Node) -> None:
    image = made(3 * MB)
    with gated(image) as server:
        arguments = ("image", "pull", "--config", node.config, f"{server.address}/app:1")
        with Screen(*arguments) as one, Screen(*arguments) as other:
            for terminal in (one, other):
                terminal.shows(lambda lines: "1.5 MB / 3 MB" in str(lines))
            one.type("\x03")
            assert one.wait() == 130
            server.gate.set()
            assert other.wait() == 0
        assert other.shows(lambda _: True)[-1].startswith(image.id)
        assert len(server.asked(image.manifest["layers"][0]["digest"])) == 1


def test_a_pull_with_credentials_that_are_no_arguments(node: Node, registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    image = made(1000)
    registry.push(image, "mine:1")
    auth = {"htpasswd": {"realm": "here", "path": str(tmp_path / "htpasswd")}}
    with running(str(tmp_path), storage=registry, auth=auth) as private:
        name = f"{private.address}/mine:1"
        assert "check the pull secret" in command(node, "pull", name, code=1).stderr
        done = command(node, "pull", name, "--user", "me", "--password-stdin", code=1, input="wrong\n")
        assert "check the pull secret" in done.stderr
        command(node, "pull", name, "--user", "me", "--password-stdin", input="secret\n")
        login = {"auths": {private.address: {"auth": base64.b64encode(b"me:secret").decode()}}}
        (tmp_path / "login.json").write_text(json.dumps(login))
        command(node, "pull", name, "--authfile", str(tmp_path / "login.json"))
        with Screen("image", "pull", "--config", node.config, name, "--user", "me") as terminal:
            terminal.shows(lambda lines: "Password of me:" in str(lines))
            terminal.type("secret\n")
            assert terminal.wait() == 0
        assert "secret" not in terminal.printed
        (tmp_path / "login.json").write_text('{"auths": {"elsewhere": {"auth": "bWU6c2VjcmV0"}}}')
        done = command(node, "pull", name, "--authfile", str(tmp_path / "login.json"), code=1)
        assert f"has no entry for {private.address}" in done.stderr
        (tmp_path / "login.json").write_text("{")
        done = command(node, "pull", name, "--authfile", str(tmp_path / "login.json"), code=1)
        assert f"--authfile {tmp_path}/login.json is no JSON object" in done.stderr
        done = command(node, "pull", name, "--user", "me", code=1, stdin=subprocess.DEVNULL)
        assert "--password-stdin" in done.stderr
    assert '"secret"' not in node.daemon_log()


def test_a_pull_that_fails(node: Node, registry: Registry) -> None:
    done = command(node, "pull", f"{registry.address}/absent:1", code=1)
    assert done.stderr.startswith(f"criserver: image {registry.address}/absent:1: ")
    assert done.stdout == ""
    assert "is not a repository name" in command(node, "pull", "a//b", code=1).stderr


def test_an_export_loads_with_skopeo_and_comes_back(node: Node, registry: Registry, tmp_path: Path) -> None:
    image = made(200_000, 1000)
    name = registry.push(image, "exported:1")
    command(node, "pull", name)
    path = str(tmp_path / "image.tar")
    assert command(node, "export", name, path).stdout == ""
    assert os.listdir(tmp_path) == ["image.tar"]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    for kind in (f"oci-archive:{path}", f"oci-archive:{path}:{name}", f"docker-archive:{path}:{name}"):
        target = tmp_path / kind.partition(":")[0]
        copy = ["skopeo", "--insecure-policy", "copy", "-q", kind, f"dir:{target}"]
        subprocess.run(copy, check=True, capture_output=True)
        blobs = set(os.listdir(target))
        assert image.id[7:] in blobs
    assert {digest[7:] for digest in image.blobs if digest != image.digest} <= set(os.listdir(tmp_path / "oci-archive"))
    command(node, "remove", name)
    assert command(node, "import", path).stdout.split() == [image.id, name, f"{name.rpartition(':')[0]}@{image.digest}"]


def test_an_import_tells_what_it_leaves_out(node: Node, tmp_path: Path) -> None:
    images = {"1": made(100), "2": made(100), "other": build_image([{"a": b"1"}], platform=Platform("linux", "s390x"))}
    entries = [
        {**image.descriptor, "annotations": {"org.opencontainers.image.ref.name": tag}} for tag, image in images.items()
    ]
    members: dict[str, bytes | File | Dir | Link] = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}
    members["index.json"] = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
    for image in images.values():
        members |= {f"blobs/{digest.replace(':', '/')}": blob for digest, blob in image.blobs.items()}
    path = tmp_path / "several.tar.gz"
    path.write_bytes(gzip.compress(tar_of(members)))
    for options, repository in ([], "docker.io/library/several"), (["--name", "localhost/mine"], "localhost/mine"):
        done = command(node, "import", str(path), *options, code=1)
        for line, tag in zip(done.stdout.splitlines(), ("1", "2"), strict=True):
            assert line.split()[:1] == [images[tag].id]
            assert {f"{repository}:{tag}", f"{repository}@{images[tag].digest}"} <= set(line.split())
        assert done.stderr.startswith("criserver: left out image other: ")
        assert "linux/s390x" in done.stderr
    assert "has a digest" in command(node, "import", str(path), "--name", f"a@{images['1'].digest}", code=1).stderr


def test_images_of_one_archive_share_their_blobs(node: Node, registry: Registry, tmp_path: Path) -> None:
    base = {"base": os.urandom(MB)}
    images = [build_image([base, {"own": os.urandom(9)}]) for _ in range(2)]
    names = [registry.push(image, f"several{n}:1") for n, image in enumerate(images)]
    for name in names:
        command(node, "pull", name)
    with open(tmp_path / "both.tar", "wb") as f:
        command(node, "export", names[0], images[1].id, "-", stdout=f, capture_output=False, stderr=subprocess.PIPE)
    assert MB < os.path.getsize(tmp_path / "both.tar") < 1.1 * MB
    copy = ["skopeo", "--insecure-policy", "copy", "-q", f"oci-archive:{tmp_path}/both.tar:{names[1]}"]
    subprocess.run([*copy, f"dir:{tmp_path}/second"], check=True, capture_output=True)
    assert images[1].id[7:] in os.listdir(tmp_path / "second")
    command(node, "export", *names, str(tmp_path / "again.tar"))
    assert (tmp_path / "again.tar").read_bytes() == (tmp_path / "both.tar").read_bytes()
    command(node, "remove", *names)
    with open(tmp_path / "both.tar", "rb") as f:
        lines = command(node, "import", "-", stdin=f).stdout.splitlines()
    assert {tuple(line.split()[:2]) for line in lines} == {(i.id, n) for i, n in zip(images, names, strict=True)}


def test_a_large_export_is_not_held_in_memory_and_keeps_what_it_reads(node: Node, tmp_path: Path) -> None:
    image = made(60 * MB)
    write_archive(image, str(tmp_path / "large.tar"), "localhost/large:1")
    command(node, "import", str(tmp_path / "large.tar"))
    before = peak(node)
    words = [sys.executable, "-m", "criserver", "image", "export", "--config", node.config, "localhost/large:1", "-"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        reader.stdout.read(MB)
        time.sleep(1)  # nobody reads on
        assert peak(node) - before < 30 * MB
        node.client.RemoveImage(image=cri.ImageSpec(image="localhost/large:1"))
        rest = reader.stdout.read()
    assert reader.returncode == 0
    assert len(rest) > 59 * MB
    assert peak(node) - before < 30 * MB


def peak(node: Node) -> int:
    """The most memory that the daemon has had so far, in bytes."""
    assert node.process is not None
    with open(f"/proc/{node.process.pid}/status") as f:
        return int(re.search(r"VmHWM:\s+(\d+) kB", f.read())[1]) * 1024  # type: ignore[index]


def test_an_export_that_fails_leaves_no_file(node: Node, registry: Registry, tmp_path: Path) -> None:
    image = made(3 * MB)
    name = registry.push(image, "failing:1")
    command(node, "pull", name)
    path = tmp_path / "out.tar"
    path.write_text("as it was")
    damage(node, image.manifest["layers"][0]["digest"])
    done = command(node, "export", name, str(path), code=1)
    assert "is damaged on disk; `criserver image verify` tells" in done.stderr
    assert os.listdir(tmp_path) == ["out.tar"]
    assert path.read_text() == "as it was"
    assert "image absent:1 is not on this node" in command(node, "export", name, "absent:1", str(path), code=1).stderr
    assert "No such file" in command(node, "export", name, str(tmp_path / "no/out.tar"), code=1).stderr
    assert path.read_text() == "as it was"


def damage(node: Node, digest: str) -> None:
    """Change one byte in the middle of a blob."""
    path = f"{node.root}/content/blobs/{digest.replace(':', '/')}"
    with open(path, "r+b") as f:
        f.seek(os.path.getsize(path) // 2)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 1]))


def test_removal_says_what_was_removed(node: Node, registry: Registry) -> None:
    images = [made(1000), made(2000)]
    names = [registry.push(image, f"removed{n}:1") for n, image in enumerate(images)]
    for name in names:
        command(node, "pull", name)
    done = command(node, "remove", names[0], "absent:1", images[1].id[7:19], code=1)
    first, second = done.stdout.splitlines()
    assert first.split()[:3] == ["removed", images[0].id, names[0]]
    assert second.split()[:3] == ["removed", images[1].id, names[1]]
    assert done.stderr == "criserver: image absent:1 is not on this node\n"


def test_removal_tells_of_containers(node: Node, registry: Registry) -> None:
    name = registry.push(busybox_image(layers=[{"unique": os.urandom(9)}]), "used:2")
    command(node, "pull", name)
    pod = node.run_pod("user")
    container = node.run(pod, "c", ["sleep", "1000"], image=name)
    done = command(node, "remove", name)
    assert "its layers stay until the containers on them are removed (1)" in done.stdout
    assert node.sh(container, "test -e /unique && echo there") == "there\n"


def test_what_is_pinned_stays(node: Node, registry: Registry, tmp_path: Path) -> None:
    image = made(1000)
    write_archive(image, str(tmp_path / "a.tar"), "localhost/pinned:1")
    command(node, "import", str(tmp_path / "a.tar"), "--pin")
    assert status(node, image.id).pinned
    node.kill()
    node.start()
    assert status(node, image.id).pinned
    with busybox_pinned(node):
        command(node, "prune", "--all", "--yes")
    assert "is pinned; unpin it first" in command(node, "remove", "localhost/pinned:1", code=1).stderr
    assert command(node, "unpin", "localhost/pinned:1").stdout.startswith(f"unpinned {image.id}")
    assert not status(node, image.id).pinned
    command(node, "pin", image.id)
    assert status(node, image.id).pinned
    assert "not on this node" in command(node, "pin", "absent:1", code=1).stderr
    command(node, "remove", "localhost/pinned:1", "--force")
    assert not status(node, image.id).id


def status(node: Node, name: str) -> cri.Image:
    return node.client.ImageStatus(image=cri.ImageSpec(image=name)).image


def test_a_prune_frees_what_no_container_uses(node: Node, registry: Registry) -> None:
    before = used_bytes(node)
    kept, gone = busybox_image(layers=[{"own": os.urandom(9)}]), made(3 * MB)
    names = [registry.push(image, f"pruned{n}:1") for n, image in enumerate((kept, gone))]
    for name in names:
        command(node, "pull", name)
    pod = node.run_pod("user")
    node.create(pod, "c", image=names[0])
    assert command(node, "prune").stdout == "freed 0 B (0 bytes), 0 inodes\n"
    between = used_bytes(node)
    with busybox_pinned(node):
        assert command(node, "prune", "--all", "--dry-run").stdout.split()[:3] == ["unused", gone.id, names[1]]
        refused = command(node, "prune", "--all", code=1, stdin=subprocess.DEVNULL)
        assert "give --yes" in refused.stderr
        assert used_bytes(node) == between
        removed, freed = command(node, "prune", "--all", "--yes").stdout.splitlines()
        assert removed.split()[:3] == ["removed", gone.id, names[1]]
        assert freed == f"freed 6.01 MB ({between - used_bytes(node)} bytes), 4 inodes"
        assert status(node, names[0]).id == kept.id
        node.remove_pods()
        assert command(node, "prune", "--all", "--yes").stdout.startswith(f"removed {kept.id} ")
    assert used_bytes(node) == before


@contextlib.contextmanager
def busybox_pinned(node: Node) -> Iterator[None]:
    """The image that all tests use stays."""
    command(node, "pin", "localhost/busybox:latest")
    yield
    command(node, "unpin", "localhost/busybox:latest")


def test_a_store_that_is_as_it_was(node: Node) -> None:
    done = command(node, "verify")
    assert re.fullmatch(r"1 image: 3 blobs of [\d.]+ [kM]B, 1 layer; no damage\n", done.stdout), done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("kind", ["changed", "cut", "missing"])
def test_a_damaged_blob_is_reported_with_its_images(node: Node, registry: Registry, kind: str) -> None:
    base = {"base": os.urandom(MB)}
    images = [build_image([base, {"own": os.urandom(9)}]) for _ in range(2)]
    names = [registry.push(image, f"damaged{n}:1") for n, image in enumerate(images)]
    for name in names:
        command(node, "pull", name)
    digest = images[0].manifest["layers"][0]["digest"]
    path = f"{node.root}/content/blobs/{digest.replace(':', '/')}"
    match kind:
        case "changed":
            damage(node, digest)
        case "cut":
            os.truncate(path, 1000)
        case "missing":
            os.unlink(path)
    done = command(node, "verify", code=1)
    reason = {"changed": "its content has digest sha256:", "cut": "it has 1000 bytes in place of", "missing": "No such"}
    what, *owners, advice, summary = done.stdout.splitlines()
    assert what.startswith(f"blob {digest}: ")
    assert reason[kind] in what
    assert {tuple(owner.split()[:2]) for owner in owners} == {(i.id, n) for i, n in zip(images, names, strict=True)}
    assert advice == "  remove the images that use it, and pull or import them again"
    assert summary.endswith("; 1 damaged")
    command(node, "remove", *names)
    for name in names:
        command(node, "pull", name)
    command(node, "verify")


def test_a_damaged_layer_is_reported_with_its_images(node: Node, registry: Registry) -> None:
    image = busybox_image(layers=[{"own": os.urandom(9)}])
    name = registry.push(image, "layers:1")
    command(node, "pull", name)
    (layer,) = [path for path in glob.glob(f"{node.root}/snapshots/layers/*/fs") if os.path.exists(f"{path}/own")]
    os.truncate(f"{layer}/own", 5)
    pod = node.run_pod("user")
    node.create(pod, "c", image=name)
    what, owner, advice, summary = command(node, "verify", code=1).stdout.splitlines()
    assert re.fullmatch(r"layer sha256:[0-9a-f]{64}: 'own' has 5 bytes in place of 9", what)
    assert owner.split()[:2] == [image.id, name]
    assert advice.endswith("pull or import them again, after the containers that use it are removed")
    assert summary.endswith("; 1 damaged")
    node.remove_pods()
    command(node, "remove", name)
    command(node, "pull", name)
    command(node, "verify")


def test_commands_without_a_daemon(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(f'[grpc]\naddress = "{tmp_path}/none.sock"\n')
    for words in (["list"], ["pull", "a"], ["export", "a", f"{tmp_path}/x"], ["remove", "a"], ["verify"], ["prune"]):
        arguments = [sys.executable, "-m", "criserver", "image", *words, "--config", str(tmp_path / "c.toml")]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (3, "")
        assert f"no daemon answers at {tmp_path}/none.sock" in done.stderr
    assert os.listdir(tmp_path) == ["c.toml"]


def test_an_image_whose_blobs_are_named_by_sha512(node: Node, server: ImageServer, tmp_path: Path) -> None:
    """Pulled by tag and by digest, run by its ID, exported, imported, verified and removed, as any other."""
    image = server.image = by_sha512(busybox_image(layers=[{"file": b"named by sha512"}]))
    repository = f"127.0.0.1:{server.server_port}/long"
    blobs = f"{node.root}/content/blobs/sha512"
    name = f"{repository}@{image.digest}"
    assert node.client.PullImage(image=cri.ImageSpec(image=name)).image_ref == image.id
    assert {f"sha512:{found}" for found in os.listdir(blobs)} == set(image.blobs)
    for given in (name, image.id, image.id[:20], image.id[7:19]):
        status = node.client.ImageStatus(image=cri.ImageSpec(image=given)).image
        assert (status.id, list(status.repo_digests)) == (image.id, [name])

    container = node.run(node.run_pod("long"), "c", ["sleep", "1000"], image=image.id)
    assert node.sh(container, "cat /file") == "named by sha512"
    told = node.client.ContainerStatus(container_id=container).status
    assert (told.image_id, told.image_ref) == (image.id, name)

    path = str(tmp_path / "image.tar")
    command(node, "export", name, path)
    node.remove_pods()
    command(node, "remove", name)
    assert os.listdir(blobs) == []
    command(node, "import", path)
    node.kill()
    node.start()
    assert node.client.ImageStatus(image=cri.ImageSpec(image=image.id)).image.id == image.id
    assert "no damage" in command(node, "verify").stdout

    layer = image.manifest["layers"][1]["digest"]
    with open(f"{blobs}/{layer[7:]}", "r+b") as file:
        file.write(b"damaged")
    assert layer in command(node, "verify", code=1).stdout
    command(node, "remove", image.id)
    # The registry says the digest of a tag's manifest, or does not: that is named by sha256 then.
    for said, named in ((image.digest, image.digest), ("", digest(image.blobs[image.digest]))):
        server.digest = said
        tag = cri.ImageSpec(image=f"{repository}:latest")
        assert node.client.PullImage(image=tag).image_ref == image.id
        assert list(node.client.ImageStatus(image=tag).image.repo_digests) == [f"{repository}@{named}"]
        command(node, "remove", image.id)
        assert os.listdir(blobs) == []
