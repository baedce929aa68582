"""A registry that serves one image and lies about it, for a daemon that pulls it."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator

import pytest

from tests.support.imagebuilder import BuiltImage, build_image
from tests.support.node import Node

IMAGE = build_image([{"file": b"content" * 1000}])


class Server(http.server.ThreadingHTTPServer):
    """A registry that serves one image, with the lies of a test: a body for a path's last part, and its length."""

    daemon_threads = True
    image: BuiltImage = IMAGE
    bodies: dict[str, bytes]
    lengths: dict[str, int]
    digest: str = ""  # what the registry says of every manifest


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.path.rpartition("/")[2]
        known = self.server.image.digest if wanted == "latest" else wanted
        body = self.server.bodies.get(wanted, self.server.image.blobs.get(known))
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        kind = "manifests" in self.path and self.server.image.manifest["mediaType"]
        self.send_header("Content-Type", kind or "application/octet-stream")
        if self.server.digest:
            self.send_header("Docker-Content-Digest", self.server.digest)
        self.send_header("Content-Length", str(self.server.lengths.get(wanted, len(body))))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.bodies, server.lengths = {}, {}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def stored(node: Node) -> set[str]:
    directories = [f"content/{place}" for place in ("blobs/sha256", "blobs/sha512", "ingest")]
    directories += ["snapshots/layers", "snapshots/staging"]
    return {f"{d}/{name}" for d in directories for name in os.listdir(f"{node.root}/{d}")}
