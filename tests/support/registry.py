"""A real registry for tests: Debian's docker-registry on a free port of the loopback interface."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.imagebuilder import BuiltImage, write_directory
from tests.support.waiting import SLOWNESS, end, eventually

# User "me", password "secret", by bcrypt.
HTPASSWD = "me:$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW\n"

_START_TIMEOUT = 60.0 * SLOWNESS  # seconds
_given: set[int] = set()  # the ports of free_port
_WORKERS = 16  # the largest number of workers with ports of their own
# The lines of a registry's log, of a request that it has begun with and of one that it has answered.
_BEGUN = 'msg="authorizing request"'
_ANSWERED = re.compile(r'\S+ - \S+ \[[^]]*\] "[A-Z]+ /.* HTTP/1.1" [0-9]+ ')


class Registry:
    """A running registry; its log is ``directory``/registry.log, its storage below ``directory`` or another's.

    ``auth`` and ``tls`` are the sections of its configuration.
    """

    def __init__(
        self,
        directory: str,
        *,
        storage: Registry | None = None,
        auth: Mapping[str, Any] | None = None,
        tls: Mapping[str, Any] | None = None,
    ) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.log = os.path.join(directory, "registry.log")
        self._storage: str = storage._storage if storage else os.path.join(directory, "storage")
        config: dict[str, Any] = {
            "version": 0.1,
            "log": {"level": "debug"},
            "storage": {"filesystem": {"rootdirectory": self._storage}},
            "http": {"addr": self.address, **({"tls": tls} if tls else {})},
            **({"auth": auth} if auth else {}),
        }
        path = os.path.join(directory, "registry.json")  # JSON is YAML
        with open(path, "w") as f:
            json.dump(config, f)
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(["docker-registry", "serve", path], stdout=log, stderr=log)
        self._wait()

    def push(self, image: BuiltImage, name: str) -> str:
        """Push under ``name`` (path:tag) and return the whole reference. The bytes stay as built."""
        target = f"{self.address}/{name}"
        with tempfile.TemporaryDirectory() as directory:
            write_directory(image, directory)
            command = ["skopeo", "copy", "--quiet", "--all", "--preserve-digests", "--insecure-policy"]
            command += ["--dest-tls-verify=false", f"dir:{directory}", f"docker://{target}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return target

    def lines(self) -> list[str]:
        """The line of the log for each request. The registry writes it a while after the client has the answer.

        So this waits until there is one for each request that the registry has begun with.
        """
        answered: list[str] = []

        def told() -> bool:
            lines = Path(self.log).read_text().splitlines()
            answered[:] = [line for line in lines if _ANSWERED.match(line)]
            return len(answered) >= sum(_BEGUN in line for line in lines)

        eventually(told)
        return answered

    def requests(self) -> list[str]:
        """What was asked of the registry, in order: ``GET /v2/… HTTP/1.1``."""
        return [
            line.split('"')[1]
            for line in self.lines()
            if '" ' in line and line.partition('"')[2].startswith(("GET /", "HEAD /"))
        ]

    def blob_requests(self) -> list[str]:
        """The digests of blobs that were fetched from the registry, in order."""
        lines = [line for line in self.lines() if '"GET /v2/' in line and "/blobs/" in line]
        return [line.partition("/blobs/")[2].split()[0] for line in lines]

    def close(self) -> None:
        """End the registry."""
        end(self._process, 10)

    def _wait(self) -> None:
        host, _, port = self.address.partition(":")
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            try:
                socket.create_connection((host, int(port)), timeout=1).close()
                return
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    self.close()
                    with open(self.log) as f:
                        raise AssertionError(f"docker-registry did not start:\n{f.read()}") from None
                time.sleep(0.05)


@contextlib.contextmanager
def running(directory: str, **options: Any) -> Iterator[Registry]:
    """A registry for a with block; ``options`` as Registry has them."""
    os.makedirs(directory, exist_ok=True)
    registry = Registry(directory, **options)
    try:
        yield registry
    finally:
        registry.close()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry for the tests of a module, which imports this fixture."""
    with running(str(tmp_path_factory.mktemp("registry"))) as found:
        yield found


def free_port() -> int:
    """A port of 127.0.0.1 for a server that is started later. No connection gets it, and no other call of this run."""
    with open("/proc/sys/net/ipv4/ip_local_port_range") as f:
        first = int(f.read().split()[0])
    # Each worker of pytest-xdist has ports of its own.
    ports = range(first // 2 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")), first, _WORKERS)
    for port in random.sample(ports, len(ports)):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port
    raise AssertionError(f"no port below {first} is free")
