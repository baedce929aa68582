"""Debian's docker-registry on the loopback interface, and what pushes images to it."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_MEDIA = "application/vnd.oci.image"


class Registry:
    """Debian's docker-registry with its storage in ``directory``. ``address`` is where to pull from."""

    def __init__(self, directory: str) -> None:
        os.makedirs(directory)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        config = {
            "version": 0.1,
            "log": {"accesslog": {"disabled": True}, "level": "error"},
            "storage": {"filesystem": {"rootdirectory": f"{directory}/storage"}},
            "http": {"addr": self.address},
        }
        with open(f"{directory}/registry.json", "w") as f:
            json.dump(config, f)  # JSON is YAML
        self._process = subprocess.Popen(["docker-registry", "serve", f"{directory}/registry.json"])
        self._layers: dict[str, list[dict[str, Any]]] = {}

    def __enter__(self) -> Registry:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", int(self.address.rpartition(":")[2])), timeout=1).close()
                return self
            except OSError:
                if time.monotonic() > deadline:
                    raise RuntimeError("docker-registry does not start") from None
                time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)

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
        connection = http.client.HTTPConnection(self.address)
        connection.request(method, path.removeprefix(f"http://{self.address}"), body, {"Content-Type": kind})
        response = connection.getresponse()
        if response.status not in (201, 202):
            raise RuntimeError(f"{method} {path}: {response.status} {response.read().decode()}")
        connection.close()
        return response.headers.get("Location", "")


def digest(data: bytes) -> str:
    """A digest as registries write it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
