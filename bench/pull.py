"""Pulling images beside containerd: how long, with how much memory and CPU, from a registry on the loopback interface.

usage: python bench/pull.py [--rounds 5] [--images large,small,zstd] [--mbit N] [--containerd PATH] [--json FILE]

Root, Debian's docker-registry, containerd, curl, gzip, zstd and e2fsprogs. README.md says what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from bench.node import Containerd, Criserver, Node, descendants, memory, scratch
from criserver.pb.runtime.v1 import api_pb2 as cri

LAYERS = 4
LARGE_FILES, LARGE_SIZE = 6, 20 << 20  # of one layer
SMALL_FILES, SMALL_SIZES = 20_000, (300, 900, 1800, 5000)
SMALL_DIRECTORY = 20  # files
DISK = 6 << 30
CLOCK = os.sysconf("SC_CLK_TCK")
SAMPLED_EVERY = 0.03
DEADLINE = 300.0

_MEDIA = "application/vnd.oci.image"


@dataclass(frozen=True)
class Sample:
    """One pull: seconds, CPU seconds, and in MiB of PSS above an idle daemon what it took of memory at its peak."""

    seconds: float
    cpu: float
    daemon: float | None = None
    workers: float | None = None
    both: float | None = None


def binary(seed: int, size: int) -> bytes:
    """What compresses to two fifths, about as programs do: words of uneven frequency, random bytes and zeros."""
    source = random.Random(seed)
    words = [source.randbytes(source.choice((4, 8, 12, 20, 40))) for _ in range(3000)]
    weights = list(itertools.accumulate(1 / (rank + 4) for rank in range(len(words))))
    made = bytearray()
    while len(made) < size:
        made += b"".join(source.choices(words, cum_weights=weights, k=4000)) + source.randbytes(4000) + bytes(4000)
    return bytes(made[:size])


def large_layer(number: int) -> bytes:
    """A tar archive of a few large files."""
    return archive((f"opt/large/{number}/{n}.bin", binary(100 * number + n, LARGE_SIZE)) for n in range(LARGE_FILES))


def small_layer(number: int) -> bytes:
    """A tar archive of many small files, in directories as package managers of languages make them."""
    source = random.Random(number)
    text = binary(1000 + number, 1 << 20)

    def files() -> Iterator[tuple[str, bytes]]:
        for n in range(SMALL_FILES):
            at, size = source.randrange(len(text) - SMALL_SIZES[-1]), source.choice(SMALL_SIZES)
            directory, name = divmod(n, SMALL_DIRECTORY)
            yield f"usr/lib/modules{number}/package{directory // 8}/part{directory % 8}/file{name}.js", text[at:][:size]

    return archive(files())


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


class Network:
    """A way to a port of the loopback interface that lets ``rate`` bytes through in a second, over all connections."""

    def __init__(self, port: int, rate: float) -> None:
        self._port = port
        self._rate = rate
        self._free = 0.0
        self._lock = threading.Lock()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"

    def serve(self) -> None:
        """For ever, in a process of its own."""
        while True:
            client = self._server.accept()[0]
            server = socket.create_connection(("127.0.0.1", self._port))
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, slowed: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(64 << 10):
                if slowed:
                    self._wait(len(data))
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _wait(self, size: int) -> None:
        with self._lock:
            self._free = max(self._free, time.monotonic() - 0.005) + size / self._rate
            rest = self._free - time.monotonic()
        time.sleep(max(0, rest))


class Registry:
    """Debian's docker-registry with its storage in ``directory``. ``address`` is where to pull from, over a network of
    ``rate`` bytes a second where that is not 0.
    """

    def __init__(self, directory: str, rate: float = 0) -> None:
        os.makedirs(directory)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self._own = self.address = f"127.0.0.1:{port}"
        self._relay = None
        if rate:
            network = Network(port, rate)
            self.address = network.address
            self._relay = multiprocessing.get_context("fork").Process(target=network.serve, daemon=True)
            self._relay.start()
        config = {
            "version": 0.1,
            "log": {"accesslog": {"disabled": True}, "level": "error"},
            "storage": {"filesystem": {"rootdirectory": f"{directory}/storage"}},
            "http": {"addr": self._own},
        }
        with open(f"{directory}/registry.json", "w") as f:
            json.dump(config, f)  # JSON is YAML
        self._process = subprocess.Popen(["docker-registry", "serve", f"{directory}/registry.json"])
        self._layers: dict[str, list[dict[str, Any]]] = {}

    def __enter__(self) -> Registry:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", int(self._own.rpartition(":")[2])), timeout=1).close()
                return self
            except OSError:
                if time.monotonic() > deadline:
                    raise RuntimeError("docker-registry does not start") from None
                time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)
        if self._relay is not None:
            self._relay.kill()
            self._relay.join()

    def push(self, name: str, layers: Callable[[int], bytes], count: int, pack: list[str], suffix: str) -> None:
        """Build an image, its layers packed by a command, and push it."""
        with ThreadPoolExecutor(2) as threads:
            made = list(threads.map(lambda n: self._layer(name, layers(n), pack, suffix), range(count)))
        document = {
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [diff_id for diff_id, _, _ in made]},
        }
        config = self._blob(name, json.dumps(document).encode(), f"{_MEDIA}.config.v1+json")
        self._layers[name] = [layer for _, layer, _ in made]
        manifest = {"schemaVersion": 2, "mediaType": f"{_MEDIA}.manifest.v1+json", "config": config}
        body = json.dumps({**manifest, "layers": self._layers[name]}).encode()
        self._ask("PUT", f"/v2/{name}/manifests/latest", body, str(manifest["mediaType"]))
        told = (
            sum(size for _, _, size in made) / (1 << 20),
            sum(layer["size"] for layer in self._layers[name]) / (1 << 20),
        )
        print(f"{name}: {told[0]:.0f} MiB in {count} layers, {told[1]:.0f} MiB packed", file=sys.stderr)

    def layer_urls(self, name: str) -> list[str]:
        """Where the blobs of an image's layers are."""
        return [f"http://{self.address}/v2/{name}/blobs/{layer['digest']}" for layer in self._layers[name]]

    def _layer(self, name: str, tar: bytes, pack: list[str], suffix: str) -> tuple[str, dict[str, Any], int]:
        packed = subprocess.run(pack, input=tar, stdout=subprocess.PIPE, check=True).stdout
        return digest(tar), self._blob(name, packed, f"{_MEDIA}.layer.v1.tar+{suffix}"), len(tar)

    def _blob(self, name: str, data: bytes, media_type: str) -> dict[str, Any]:
        place = self._ask("POST", f"/v2/{name}/blobs/uploads/", b"", media_type)
        mark = "&" if "?" in place else "?"
        self._ask("PUT", f"{place}{mark}digest={digest(data)}", data, "application/octet-stream")
        return {"mediaType": media_type, "digest": digest(data), "size": len(data)}

    def _ask(self, method: str, path: str, body: bytes, kind: str) -> str:
        connection = http.client.HTTPConnection(self._own)
        connection.request(method, path.removeprefix(f"http://{self._own}"), body, {"Content-Type": kind})
        response = connection.getresponse()
        if response.status not in (201, 202):
            raise RuntimeError(f"{method} {path}: {response.status} {response.read().decode()}")
        connection.close()
        return response.headers.get("Location", "")


def digest(data: bytes) -> str:
    """A digest as registries write it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Bench:
    """Pulls, each by a fresh daemon with its root on a fresh ext4."""

    def __init__(self, base: str, registry: Registry, containerd: str) -> None:
        self._base = base
        self._registry = registry
        self._containerd = containerd
        self._turn = 0
        self.versions: dict[str, str] = {}

    def pull(self, who: str, image: str, *, sampled: bool = False) -> Sample:
        """One pull of an image by one contender."""
        self._turn += 1
        place = f"{self._base}/turn{self._turn}"
        with disk(place) as root:
            if who == "floor":
                return self._floor(image, root)
            node: Node = (
                Criserver(place, 1, root=root)
                if who == "criserver"
                else Containerd(place, 2, self._containerd, root=root)
            )
            with node:
                self.versions.setdefault(who, node.version())
                idle = memory(node.process.pid)
                # A node has pulled before: the code of the first pull is loaded, and counts as memory only.
                node.client.PullImage(image=cri.ImageSpec(image=f"{self._registry.address}/tiny:latest"))
                time.sleep(0.3)
                with peaks(node.process.pid, idle) if sampled else contextlib.nullcontext() as found:
                    cpu, began = cpu_of(node.process.pid), time.monotonic()
                    node.client.PullImage(
                        deadline=DEADLINE, image=cri.ImageSpec(image=f"{self._registry.address}/{image}:latest")
                    )
                    seconds = time.monotonic() - began
                    cpu = cpu_of(node.process.pid) - cpu
                return Sample(seconds, cpu, *(found or ()))

    def _floor(self, image: str, root: str) -> Sample:
        """The same by hand: fetch, keep, decompress, digest twice and unpack all layers at once, by tools of C."""
        unpack = "zstd -dc" if image == "zstd" else f"{sys.executable} -I -m isal.igzip -dc"
        began, before = time.monotonic(), os.times()
        running = []
        for number, url in enumerate(self._registry.layer_urls(image)):
            os.mkdir(f"{root}/{number}")
            line = f"""curl -fsS {url} | tee {root}/{number}.blob >(sha256sum >/dev/null) | {unpack} |
                tee >(sha256sum >/dev/null) | tar -x --numeric-owner -C {root}/{number}"""
            running.append(subprocess.Popen(["bash", "-o", "pipefail", "-c", line]))
        if any(status != 0 for status in [process.wait() for process in running]):
            raise RuntimeError("the floor failed")
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return Sample(time.monotonic() - began, cpu)


@contextlib.contextmanager
def disk(place: str) -> Iterator[str]:
    """An empty ext4 in a file in memory, mounted on a directory."""
    root, image = f"{place}/root", f"{place}/disk"
    os.makedirs(root)
    with open(image, "wb") as f:
        f.truncate(DISK)
    # All tables are written now, and not by a kernel thread beside what is measured.
    options = ["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"]
    subprocess.run(["mkfs.ext4", *options, image], check=True)
    subprocess.run(["mount", "-o", "loop", image, root], check=True)
    try:
        yield root
    finally:
        subprocess.run(["umount", root], check=True)
        shutil.rmtree(place)


def cpu_of(pid: int) -> float:
    """CPU seconds of a process and of its children that have ended."""
    with open(f"/proc/{pid}/stat") as f:
        return sum(map(int, f.read().rpartition(")")[2].split()[11:15])) / CLOCK


@contextlib.contextmanager
def peaks(daemon: int, idle: float) -> Iterator[list[float]]:
    """What the daemon, all its descendants, and both together take at most during the block, in MiB of PSS, less what
    the idle daemon and the descendants that it had before took.
    """
    old = set(descendants(daemon))
    found = [0.0, 0.0, 0.0]
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLED_EVERY):
            own, others = memory(daemon) - idle, 0.0
            for pid in descendants(daemon):
                with contextlib.suppress(OSError, KeyError):
                    others += 0 if pid in old else memory(pid)
            found[:] = map(max, found, (own, others, own + others))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[Sample]]]:
    """One run; whatever ends it, nothing of it stays on the machine."""
    samples: dict[str, dict[str, list[Sample]]] = {}
    makers = {
        "large": (large_layer, ["gzip", "-6"], "gzip"),
        "small": (small_layer, ["gzip", "-6"], "gzip"),
        "zstd": (large_layer, ["zstd", "-q", "-3"], "zstd"),
    }
    contenders = options.only.split(",")
    with scratch() as base, Registry(f"{base}/registry", options.mbit * 125e3) as registry:
        tiny = lambda _: archive(iter([("hello", b"hello\n")]))  # noqa: E731
        registry.push("tiny", tiny, 1, ["gzip", "-6"], "gzip")
        bench = Bench(base, registry, options.containerd)
        for image in options.images.split(","):
            layers, pack, suffix = makers[image]
            registry.push(image, layers, LAYERS, pack, suffix)
            found = samples[image] = {who: [] for who in contenders}
            for number in range(options.rounds + 1):
                for who in contenders if number % 2 else contenders[::-1]:
                    sample = bench.pull(who, image)
                    print(f"{image} {number} {who}: {sample.seconds:.2f} s", file=sys.stderr)
                    if number:
                        found[who].append(sample)
            # Sampling costs time, so it has rounds of its own.
            for _ in range(options.memory_rounds):
                for who in contenders:
                    if who != "floor":
                        found[who].append(bench.pull(who, image, sampled=True))
            print(table(image, found), flush=True)
    print(", ".join(bench.versions.values()))
    return samples


def table(image: str, found: dict[str, list[Sample]]) -> str:
    """Medians with minimum and maximum by contender, and the ratio of times to containerd's."""
    columns = ("seconds", "CPU seconds", "PSS MiB: daemon", "workers", "both", "to containerd")
    lines = [f"{image + f', load {os.getloadavg()[0]:.1f}':18}" + "".join(f"{column:>20}" for column in columns)]
    timed = {who: [s for s in samples if s.both is None] for who, samples in found.items()}
    peer = [s.seconds for s in timed.get("containerd", ())]
    for who, samples in found.items():
        seconds = [s.seconds for s in timed[who]]
        cells = [cell(seconds, 2), cell([s.cpu for s in timed[who]], 2)]
        cells += [
            cell([value for s in samples if (value := getattr(s, name)) is not None], 1)
            for name in ("daemon", "workers", "both")
        ]
        cells.append(f"{statistics.median(seconds) / statistics.median(peer):.2f}" if peer else "-")
        lines.append(f"{who:18}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def cell(values: list[float], digits: int) -> str:
    """Median, minimum and maximum."""
    if not values:
        return "-"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure pulls by this runtime and by containerd.")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed pulls of each (5)")
    parser.add_argument("--memory-rounds", type=int, default=2, metavar="N", help="pulls for memory of each (2)")
    parser.add_argument("--images", default="large,small,zstd", help="which images (large,small,zstd)")
    parser.add_argument("--containerd", default="containerd", metavar="PATH", help="another build of containerd")
    parser.add_argument("--mbit", type=float, default=0, metavar="N", help="over a network of N Mbit/s (no limit)")
    parser.add_argument("--only", default="floor,criserver,containerd", help="which contenders")
    parser.add_argument("--json", metavar="FILE", help="write every sample there")
    options = parser.parse_args()
    try:
        samples = measure(options)
    except RuntimeError as e:
        sys.exit(f"pull.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
    if options.json:
        with open(options.json, "w") as f:
            json.dump({i: {w: [vars(s) for s in ss] for w, ss in by.items()} for i, by in samples.items()}, f, indent=1)


if __name__ == "__main__":
    main()
