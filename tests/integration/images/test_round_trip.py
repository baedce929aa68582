"""Images of other tools: we unpack the same bytes and attributes as umoci."""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from snapshotter import mounts
from tests.support.registry import Registry, registry
from tests.support.rooms import Rooms

__all__ = ["registry"]

CAPABILITY = struct.pack("<IIIII", 0x02000000, 1 << 10, 0, 0, 0)
# Directories whose time is not umoci's: buildah writes no entry for the root, which umoci then dates 1970.
WITHOUT_ENTRY: dict[str, set[str]] = {"umoci": set(), "buildah": {"."}}

for tool in ("umoci", "buildah"):
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed", allow_module_level=True)


@dataclass(frozen=True)
class Inode:
    """All that an inode has; ``links`` are the names that it has, ``content`` a link's target or a file's bytes."""

    mode: int
    uid: int
    gid: int
    rdev: int
    mtime: int
    size: int
    attributes: tuple[tuple[str, bytes], ...]
    links: tuple[str, ...]
    content: bytes


def tree_of(root: str) -> dict[str, Inode]:
    """What a directory has, by path."""
    paths = ["."]
    for path, directories, names in os.walk(root):
        paths += [os.path.relpath(f"{path}/{name}", root) for name in (*directories, *names)]
    status = {path: os.lstat(f"{root}/{path}") for path in paths}
    linked: dict[int, list[str]] = {}
    for path in sorted(paths):
        linked.setdefault(status[path].st_ino, []).append(path)
    return {path: inode_of(f"{root}/{path}", found, linked[found.st_ino]) for path, found in status.items()}


def inode_of(path: str, found: os.stat_result, links: list[str]) -> Inode:
    content = b""
    if stat.S_ISLNK(found.st_mode):
        content = os.fsencode(os.readlink(path))
    elif stat.S_ISREG(found.st_mode):
        with open(path, "rb") as file:
            content = file.read()
    names = [
        n for n in os.listxattr(path, follow_symlinks=False) if not n.startswith(("trusted.overlay.", "user.umoci"))
    ]
    attributes = tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in sorted(names))
    size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    numbers = (found.st_mode, found.st_uid, found.st_gid, found.st_rdev, found.st_mtime_ns, size)
    return Inode(*numbers, attributes, tuple(links), content)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


def fill(root: str) -> None:
    """Everything that a layer can hold."""
    for name in ("etc", "kept", "opaque", "gone", "many"):
        os.mkdir(f"{root}/{name}")
    for name in ("etc/passwd", "kept/old", "opaque/old", "gone/old", "removed"):
        write(f"{root}/{name}", name.encode() * 100)
    for number in range(300):
        write(f"{root}/many/{number}", b"%d" % number)
    write(f"{root}/suid", b"x", mode=0o4755, owner=(7, 8))
    write(f"{root}/sgid", b"x", mode=0o2711, owner=(0, 70_000))
    write(f"{root}/ping", b"x", mode=0o755)
    os.setxattr(f"{root}/ping", "security.capability", CAPABILITY)
    write(f"{root}/attributes", b"x")
    os.setxattr(f"{root}/attributes", "user.colour", b"red")
    os.mkdir(f"{root}/sticky")
    os.chmod(f"{root}/sticky", 0o1777)
    os.chown(f"{root}/sticky", 3_000_000_000, 65_534)
    os.makedirs(f"{root}/{'d' * 200}/{'e' * 200}")
    write(f"{root}/{'d' * 200}/{'e' * 200}/{'f' * 200}", b"long")
    write(f"{root}/n\u00e9 \u65e5\u672c", b"not ASCII")
    os.symlink("/etc/passwd", f"{root}/absolute")
    os.symlink("../" * 60 + "t" * 100, f"{root}/kept/long-link")
    os.link(f"{root}/etc/passwd", f"{root}/kept/hard")
    os.link(f"{root}/etc/passwd", f"{root}/hard")
    os.mkfifo(f"{root}/fifo", 0o622)
    os.mknod(f"{root}/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(f"{root}/disk", stat.S_IFBLK | 0o660, os.makedev(8, 1))
    with open(f"{root}/sparse", "wb") as file:
        file.seek(5 << 20)
        file.write(b"end")
    os.utime(f"{root}/etc/passwd", ns=(0, 1_234_567_890 * 10**9))
    os.utime(f"{root}/kept", ns=(0, 1_000_000_000 * 10**9))


def change(root: str) -> None:
    """What a second layer does to the first: removals, replacements, one of each kind by another."""
    os.unlink(f"{root}/removed")
    shutil.rmtree(f"{root}/gone")
    shutil.rmtree(f"{root}/opaque")
    os.mkdir(f"{root}/opaque", 0o700)
    write(f"{root}/opaque/new", b"new")
    os.unlink(f"{root}/absolute")
    os.mkdir(f"{root}/absolute")
    write(f"{root}/kept/old", b"changed", mode=0o600)
    os.unlink(f"{root}/hard")
    write(f"{root}/hard", b"alone")
    os.chmod(f"{root}/suid", 0o755)


def write(path: str, content: bytes, *, mode: int = 0o644, owner: tuple[int, int] = (0, 0)) -> None:
    with open(path, "wb") as file:
        file.write(content)
    os.chown(path, *owner)
    os.chmod(path, mode)


def made_by_umoci(directory: str) -> str:
    layout, bundle = f"{directory}/layout", f"{directory}/building"
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", f"{layout}:one")
    run("umoci", "unpack", "--image", f"{layout}:one", bundle)
    fill(f"{bundle}/rootfs")
    run("umoci", "repack", "--refresh-bundle", "--image", f"{layout}:one", bundle)
    change(f"{bundle}/rootfs")
    run("umoci", "repack", "--image", f"{layout}:one", bundle)
    return f"oci:{layout}:one"


def made_by_buildah(directory: str) -> str:
    storage = ("--root", f"{directory}/storage", "--runroot", f"{directory}/run", "--storage-driver", "vfs")
    name = "scratch"
    for step in (fill, change):
        container = run("buildah", *storage, "from", name)
        step(run("buildah", *storage, "mount", container))
        run("buildah", *storage, "umount", container)
        name = run("buildah", *storage, "commit", "--quiet", "--rm", "--disable-compression", container, "built")
    run("buildah", *storage, "push", "--quiet", "built", f"oci:{directory}/layout:one")
    return f"oci:{directory}/layout:one"


MAKERS = {"umoci": made_by_umoci, "buildah": made_by_buildah}
# What skopeo makes of it on the way to the registry.
COPIES = {
    "as it is": ["--preserve-digests"],
    "schema 2": ["--format", "v2s2"],
    "zstd": ["--dest-compress-format", "zstd", "--format", "oci"],
}


@pytest.fixture(params=MAKERS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The tool that made an image, and where skopeo finds it."""
    directory = str(tmp_path_factory.mktemp("built"))
    mounts.mount("tmpfs", directory, "tmpfs", 0, "mode=0755")
    try:
        yield request.param, MAKERS[request.param](directory)
    finally:
        for point in [*mounts.mounts_below(directory), directory]:
            mounts.umount2(point, mounts.MNT_DETACH)


@pytest.mark.parametrize("options", COPIES.values(), ids=COPIES)
async def test_a_pulled_image_is_what_umoci_unpacks(
    built: tuple[str, str], registry: Registry, tmp_path: object, options: list[str]
) -> None:
    base, (maker, source) = str(tmp_path), built
    name = f"{registry.address}/round/trip:1"
    skopeo = ("skopeo", "copy", "--quiet", "--insecure-policy")
    run(*skopeo, *options, "--dest-tls-verify=false", source, f"docker://{name}")
    layout = source.removeprefix("oci:")  # umoci knows no zstd
    if "zstd" not in options:
        layout = f"{base}/back:one"
        run(*skopeo, "--src-tls-verify=false", f"docker://{name}", f"oci:{layout}")
    run("umoci", "unpack", "--image", layout, f"{base}/theirs")
    expected = tree_of(f"{base}/theirs/rootfs")
    rooms = Rooms(f"{base}/ours")
    os.mkdir(f"{base}/root")
    try:
        image = await rooms.images.pull(name)
        await rooms.snapshotter.mount_layer(image.chain_id, f"{base}/root")
        try:
            found = tree_of(f"{base}/root")
        finally:
            await rooms.snapshotter.unmount(f"{base}/root")
    finally:
        rooms.close()
    assert sorted(found) == sorted(expected)
    for path in WITHOUT_ENTRY[maker]:
        found[path] = replace(found[path], mtime=expected[path].mtime)
    differences = {path: (found[path], expected[path]) for path in found if found[path] != expected[path]}
    assert not differences, json.dumps(
        {path: [repr(inode)[:300] for inode in pair] for path, pair in list(differences.items())[:5]}, indent=1
    )
    assert len(found["hard"].links) == 1
    assert found["kept/hard"].links == ("etc/passwd", "kept/hard")
    assert dict(found["ping"].attributes) == {"security.capability": CAPABILITY}
