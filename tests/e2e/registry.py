"""A real registry for tests: Debian's docker-registry on a free port of the loopback interface."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from tests.e2e.imagebuilder import BuiltImage, write_directory

_START_TIMEOUT = 20.0


class Registry:
    """A running registry; its storage is a directory below ``directory``, its log ``directory``/registry.log."""

    def __init__(self, directory: str) -> None:
        self.address = f"127.0.0.1:{_free_port()}"
        self._log = os.path.join(directory, "registry.log")
        config = {
            "version": 0.1,
            "storage": {"filesystem": {"rootdirectory": os.path.join(directory, "storage")}},
            "http": {"addr": self.address},
        }
        path = os.path.join(directory, "registry.json")  # JSON is YAML
        with open(path, "w") as f:
            json.dump(config, f)
        with open(self._log, "wb") as log:
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

    def blob_requests(self) -> list[str]:
        """The digests of blobs that were fetched from the registry, in order."""
        with open(self._log) as f:
            lines = [line for line in f if '"GET /v2/' in line and "/blobs/" in line]
        return [line.partition("/blobs/")[2].split()[0] for line in lines]

    def close(self) -> None:
        """End the registry."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            try:
                with urllib.request.urlopen(f"http://{self.address}/v2/", timeout=1):
                    return
            except (urllib.error.URLError, OSError):
                if time.monotonic() > deadline or self._process.poll() is not None:
                    self.close()
                    with open(self._log) as f:
                        raise AssertionError(f"docker-registry did not start:\n{f.read()}") from None
                time.sleep(0.05)


@contextlib.contextmanager
def running(directory: str) -> Iterator[Registry]:
    """A registry for a with block."""
    registry = Registry(directory)
    try:
        yield registry
    finally:
        registry.close()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry for the tests of a module, which imports this fixture."""
    with running(str(tmp_path_factory.mktemp("registry"))) as found:
        yield found


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
