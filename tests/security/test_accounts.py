"""The user of a container, with an image whose account files and user are hostile."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.fixtures import import_image
from tests.support.imagebuilder import BuiltImage, Layer, busybox_image, write_archive
from tests.support.node import Node, refused
from tests.support.pods import secured
from tests.support.waiting import eventually

FAILED = grpc.StatusCode.FAILED_PRECONDITION
ROOTS = b"1000:x:0:0::/root:/bin/sh\nroot:x:0:0::/root:/bin/sh\nweb:x:33:44::/:/bin/sh\n"
GROUPS = b"2000:x:0:\nroot:x:0:\naudio:x:29:web\n"
SLEEP = ["sleep", "1000"]

Load = Callable[..., str]


@pytest.fixture
def load(node: Node, tmp_path: Path) -> Load:
    """Import a busybox image with a layer and a configuration of the test's own; its name."""

    def load(layer: Layer | bytes | None = None, **config: Any) -> str:
        base: BuiltImage = busybox_image(config=config, layers=[layer] if layer is not None else ())
        name = f"localhost/hostile:{base.id[7:19]}"
        path = str(tmp_path / "image.tar")
        write_archive(base, path, name)
        import_image(node, path)
        return name

    return load


@pytest.fixture
def pod(node: Node) -> str:
    return node.run_pod("pod")


def special(path: str, kind: bytes, major: int = 0, minor: int = 0) -> bytes:
    """A layer with one file that is no regular one."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(path)
        info.type, info.mode, info.devmajor, info.devminor = kind, 0o644, major, minor
        info.linkname = "/etc/elsewhere" if kind == tarfile.SYMTYPE else ""
        tar.addfile(info)
        if kind == tarfile.SYMTYPE:
            info = tarfile.TarInfo("etc/elsewhere")
            info.type = tarfile.FIFOTYPE
            tar.addfile(info)
    return stream.getvalue()


def ids(node: Node, container: str) -> tuple[int, int, list[int]]:
    """User, group and groups of the first process, as the kernel has them."""
    status = Path(f"/proc/{node.pid(container)}/status").read_text()
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in status.splitlines())}
    return int(fields["Uid"][1]), int(fields["Gid"][1]), [int(group) for group in fields["Groups"]]


def shown(node: Node, image: str) -> cri.Image:
    found: cri.Image = node.client.ImageStatus(image=cri.ImageSpec(image=image)).image
    return found


def test_a_number_is_never_a_name(node: Node, load: Load, pod: str) -> None:
    """CVE-2016-3697, CVE-2026-46680: an account of root's that is called "1000" is not the user 1000."""
    image = load({"etc/passwd": ROOTS, "etc/group": GROUPS}, User="1000:2000")
    found = shown(node, image)
    assert (found.uid.value, found.username) == (1000, "")
    by_image = node.run(pod, "image", SLEEP, image=image)
    # CVE-2016-3697 once more: runc before 1.3 would look the group 2000 up by its name, and give group 0.
    assert ids(node, by_image) == (1000, 2000, [])
    user, group = cri.Int64Value(value=1000), cri.Int64Value(value=2000)
    by_field = node.run(pod, "field", SLEEP, image=image, **secured(run_as_user=user, run_as_group=group))
    assert ids(node, by_field) == (1000, 2000, [])
    alone = node.run(pod, "alone", SLEEP, image=image, **secured(run_as_user=user))
    assert ids(node, alone) == (1000, 0, [0])
    with refused(FAILED, "'1000' is given as a name, but it is a number"):
        node.create(pod, "name", SLEEP, image=image, **secured(run_as_username="1000"))
    with refused(FAILED, "named '2000'"):
        node.create(pod, "groups", SLEEP, image=image, **secured(run_as_user=user, supplemental_groups=[2000]))


@pytest.mark.parametrize("user", ["4294967295", "4294967296", "9" * 4301, "0:4294967296", "u" * 300])
def test_a_user_that_no_image_can_have_is_refused_at_the_pull(node: Node, load: Load, user: str) -> None:
    """CVE-2024-40635: a number beyond the kernel's does not wrap round to root; ListImages goes on."""
    before = len(node.client.ListImages().images)
    with pytest.raises(Exception, match="non-zero exit status") as caught:
        load(User=user)
    assert b"the image's " in caught.value.stderr  # type: ignore[attr-defined]
    assert len(caught.value.stderr) < 1000  # type: ignore[attr-defined]
    assert len(node.client.ListImages().images) == before


def test_a_stop_signal_of_any_length(node: Node, load: Load, pod: str) -> None:
    image = load(StopSignal="1" * 5000)
    script = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done"
    container = node.run(pod, "c", ["sh", "-c", script], image=image)
    eventually(lambda: node.log(container) == "ready\n")
    node.client.StopContainer(container_id=container, timeout=20)
    assert node.status(container).exit_code == 7  # SIGTERM, as for all that cannot be read


@pytest.mark.parametrize("path", ["etc/passwd", "etc/group"])
@pytest.mark.parametrize(
    ("kind", "numbers", "words"),
    [
        (tarfile.CHRTYPE, (1, 11), "a character device"),  # /dev/kmsg
        (tarfile.CHRTYPE, (1, 5), "a character device"),  # /dev/zero
        (tarfile.BLKTYPE, (7, 0), "a block device"),
        (tarfile.FIFOTYPE, (0, 0), "a FIFO"),
        (tarfile.DIRTYPE, (0, 0), "a directory"),
        (tarfile.SYMTYPE, (0, 0), "a FIFO"),  # it leads to one
    ],
)
def test_what_is_no_file_is_not_opened(
    node: Node, load: Load, pod: str, path: str, kind: bytes, numbers: tuple[int, int], words: str
) -> None:
    image = load(special(path, kind, *numbers))
    before = len(node.descriptors())
    for number in range(5):
        with refused(FAILED, f"/{path}", words, "not a regular file"):
            node.create(pod, f"c{number}", SLEEP, image=image)
        # Also where nothing needs to be looked up: the OCI runtime would open it.
        user = {"run_as_user": cri.Int64Value(value=1), "run_as_group": cri.Int64Value(value=1)}
        with refused(FAILED, f"/{path}", words):
            node.create(pod, f"d{number}", SLEEP, image=image, **secured(**user))
    # It may be measuring a snapshot, which takes a few for a moment.
    eventually(lambda: len(node.descriptors()) <= before + 2)
    assert node.client.ListContainers().containers == []


@pytest.mark.parametrize(("kind", "words"), [(tarfile.FIFOTYPE, "a FIFO"), (tarfile.CHRTYPE, "a character device")])
def test_a_volume_that_is_no_directory_is_not_opened(node: Node, load: Load, pod: str, kind: bytes, words: str) -> None:
    image = load(special("data", kind, 1, 11), Volumes={"/data": {}})
    with refused(FAILED, "volume /data", words, "not a directory"):
        node.create(pod, "c", SLEEP, image=image)


def test_account_files_that_are_large(node: Node, load: Load, pod: str) -> None:
    """Time and memory of an image's making: neither does the daemon stand still, nor does it keep what it has read."""
    lines = b"".join(b"g%d:x:%d:web\n" % (number, number) for number in range(1, 180_000))
    image = load({"etc/passwd": ROOTS + b"a:x:5:5\n" * 500_000, "etc/group": lines}, User="web")
    larger = load({"etc/passwd": ROOTS + bytes(4 << 20)})
    assert node.process is not None

    def memory() -> int:
        status = Path(f"/proc/{node.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])

    before = memory()
    with refused(FAILED, "more than 65536 groups"):
        node.create(pod, "c", SLEEP, image=image)
    with refused(FAILED, "/etc/passwd", "larger than"):
        node.create(pod, "d", SLEEP, image=larger)
    eventually(lambda: memory() - before < 32 << 10)
    container = node.run(pod, "e", SLEEP, image=image, **secured(run_as_user=cri.Int64Value(value=7)))
    assert ids(node, container)[0] == 7


def test_the_kernels_number_of_groups(node: Node, pod: str) -> None:
    groups = list(range(1, 65_536))
    container = node.run(pod, "c", SLEEP, **secured(supplemental_groups=groups))
    assert ids(node, container)[2] == [0, *groups]
    assert list(node.status(container).user.linux.supplemental_groups) == [0, *groups]
    assert node.sh(container, "id -u") == "0\n"
    with refused(FAILED, "65537 groups"):
        node.create(pod, "d", SLEEP, **secured(supplemental_groups=[*groups, 65_536]))


def test_groups_that_would_keep_the_oci_runtime_busy(node: Node, load: Load, pod: str) -> None:
    lines = b"".join(b"g%d:x:%d:web\n" % (number, number) for number in range(1, 40_000))
    image = load({"etc/passwd": ROOTS, "etc/group": lines}, User="web")
    with refused(FAILED, "39999 lines", "39999 groups"):
        node.create(pod, "c", SLEEP, image=image)
