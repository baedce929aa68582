"""The images of the benchmark: busybox, a pause program, few large files, many small files."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from typing import Any

IMAGE = "localhost/bench:latest"
PAUSE = "localhost/pause:latest"

# How layers are packed: the command, and the suffix of the media type.
GZIP, ZSTD = (["gzip", "-6"], "gzip"), (["zstd", "-q", "-3"], "zstd")

_INFRA = "/usr/bin/catatonit"  # a very small program
_LARGE_FILES = 5  # of a layer
_SMALL_SIZES = (300, 900, 1800, 5000)
_SMALL_DIRECTORY = 20  # files


def build_images(directory: str) -> list[str]:
    """Paths of two docker-archives: IMAGE with the host's busybox, and PAUSE with its catatonit."""
    applets = subprocess.run(["busybox", "--list"], check=True, capture_output=True, text=True).stdout.split()
    busybox = shutil.which("busybox") or "/bin/busybox"
    links = [f"bin/{applet}" for applet in applets if applet != "busybox"]
    image = _archive(f"{directory}/bench.tar", IMAGE, {"bin/busybox": busybox}, links, {"Env": ["PATH=/bin"]})
    return [image, _archive(f"{directory}/pause.tar", PAUSE, {"infra": _INFRA}, [], {"Entrypoint": ["/infra", "-P"]})]


def _archive(path: str, tag: str, files: dict[str, str], links: list[str], config: dict[str, Any]) -> str:
    """Write an image of one layer: static programs, and links to busybox."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for name in ("bin", "proc", "sys", "dev", "etc", "tmp"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for name, source in files.items():
            tar.add(os.path.realpath(source), name)
        for name in links:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)
    document = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer.getvalue()).hexdigest()]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [tag], "Layers": ["layer.tar"]}]
    with tarfile.open(path, "w") as tar:
        for name, data in (
            ("config.json", json.dumps(document).encode()),
            ("layer.tar", layer.getvalue()),
            ("manifest.json", json.dumps(manifest).encode()),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def binary(seed: int, size: int) -> bytes:
    """What compresses to two fifths, about as programs do: words of uneven frequency, random bytes and zeros."""
    source = random.Random(seed)
    words = [source.randbytes(source.choice((4, 8, 12, 20, 40))) for _ in range(3000)]
    weights = list(itertools.accumulate(1 / (rank + 4) for rank in range(len(words))))
    made = bytearray()
    while len(made) < size:
        made += b"".join(source.choices(words, cum_weights=weights, k=4000)) + source.randbytes(4000) + bytes(4000)
    return bytes(made[:size])


def large_layer(number: int, megabytes: int) -> bytes:
    """A tar archive of a few large files."""
    size = (megabytes << 20) // _LARGE_FILES
    return archive((f"opt/large/{number}/{n}.bin", binary(100 * number + n, size)) for n in range(_LARGE_FILES))


def small_layer(number: int, files: int) -> bytes:
    """A tar archive of many small files, in directories as package managers of languages make them."""
    source = random.Random(number)
    text = binary(1000 + number, 1 << 20)

    def made() -> Iterator[tuple[str, bytes]]:
        for n in range(files):
            at, size = source.randrange(len(text) - _SMALL_SIZES[-1]), source.choice(_SMALL_SIZES)
            directory, name = divmod(n, _SMALL_DIRECTORY)
            yield f"usr/lib/modules{number}/package{directory // 8}/part{directory % 8}/file{name}.js", text[at:][:size]

    return archive(made())


def archive(files: Iterator[tuple[str, bytes]]) -> bytes:
    """A tar archive with the directories that its files are in."""
    stream, made = io.BytesIO(), set()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files:
            parts = name.split("/")
            for depth in range(1, len(parts)):
                directory = "/".join(parts[:depth])
                if directory not in made:
                    made.add(directory)
                    entry = tarfile.TarInfo(directory)
                    entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o755, 1_700_000_000
                    tar.addfile(entry)
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), 1_700_000_000
            tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()
