"""What a case of tests/field needs: registries that answer as the case says, and a runtime that pulls and runs.

A case is done with a :class:`Field`, and its outcome is a short text. The same case runs with criserver and with
containerd.
"""

from __future__ import annotations

import http.server
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from criserver.pb.runtime.v1 import api_pb2 as cri
from tests.support.containerd import import_here, names
from tests.support.imagebuilder import BuiltImage, busybox_image, write_archive
from tests.support.node import BRIDGE, Node
from tests.support.waiting import eventually

REFUSED = "refused"
BUSYBOX = "localhost/busybox:latest"


class FieldServer(http.server.ThreadingHTTPServer):
    """A registry on the loopback interface. ``answers`` has other answers for the last parts of paths."""

    daemon_threads = True
    images: dict[str, BuiltImage]
    answers: dict[str, FieldAnswer]
    asked: list[tuple[str, str]]  # paths, and what the requests had to authorise them

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FieldHandler)
        self.images, self.answers, self.asked = {}, {}, []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class FieldHandler(http.server.BaseHTTPRequestHandler):
    """A request. ``answer`` and ``serve`` are for the answers of cases."""

    server: FieldServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.close_connection = True
        path = self.path.partition("?")[0]
        self.server.asked.append((path, self.headers.get("Authorization", "")))
        answer = self.server.answers.get(path.rpartition("/")[2])
        if answer is not None:
            answer(self)
        else:
            self.serve()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """A client that sends a form for a token is told to use GET, as most registries do."""
        self.close_connection = True
        form = self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode()
        self.server.asked.append((self.path, f"{self.headers.get('Authorization', '')} {form}"))
        self.answer(405, b"", [])

    def serve(self, status: int = 200, kind: str = "", more: Sequence[tuple[str, str]] = ()) -> None:
        """What was asked for, with another status, media type or more headers."""
        name, _, wanted = self.path.partition("?")[0].removeprefix("/v2/").rpartition("/")
        image = self.server.images.get(name.rpartition("/")[0])
        body = image.blobs.get(image.digest if wanted == "1" else wanted) if image else None
        if image is None or body is None:
            self.answer(404, b"", [])
            return
        if name.endswith("/manifests"):
            media_type = image.descriptor["mediaType"] if wanted in ("1", image.digest) else self._type(image, wanted)
            more = [("Docker-Content-Digest", image.digest if wanted == "1" else wanted), *more]
        else:
            media_type = "application/octet-stream"
        self.answer(status, body, [("Content-Type", kind or media_type), *more])

    def answer(self, status: int, body: bytes, headers: Sequence[tuple[str, str]]) -> None:
        """An answer of these headers, with a Content-Length if they have no other length."""
        self.send_response(status)
        for key, value in headers:
            self.send_header(key, value)
        chunked = any(key == "Transfer-Encoding" for key, _ in headers)
        if not any(key == "Content-Length" for key, _ in headers) and not chunked:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked and body else body)

    def log_message(self, *_: object) -> None:
        pass

    @staticmethod
    def _type(image: BuiltImage, wanted: str) -> str:
        return next(entry["mediaType"] for entry in image.manifest["manifests"] if entry["digest"] == wanted)


FieldAnswer = Callable[[FieldHandler], None]


@dataclass
class Field:
    """A runtime, two registries and a directory of files for the cases."""

    node: Node
    registry: FieldServer
    other: FieldServer
    said: str = ""  # by the runtime, about the last case
    _number: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _pod: str = ""

    @property
    def file(self) -> str:
        """A path for a new file."""
        return f"{self.node.base}/field-{next(self._number)}"

    @property
    def name(self) -> str:
        return f"case-{next(self._number)}"

    def hosts(self, domain: str, text: str) -> None:
        """The hosts.toml of a registry."""
        os.makedirs(f"{self.node.certs}/{domain}", exist_ok=True)
        with open(f"{self.node.certs}/{domain}/hosts.toml", "w") as f:
            f.write(text)

    def pull(self, image: BuiltImage, **more: Any) -> str:
        """Pull an image from the registry; its whole name."""
        name = self.name
        self.registry.images[name] = image
        return self.pull_name(f"{self.registry.address}/{name}:1", **more)

    def pull_name(self, name: str, **more: Any) -> str:
        self.node.client.PullImage(image=cri.ImageSpec(image=name), **more)
        return name

    def run(self, image: str = BUSYBOX, command: Sequence[str] = (), **more: Any) -> str:
        """What a container prints, in a pod that all cases share unless there is a ``pod``."""
        if not (pod := more.pop("pod", "")):
            self._pod = self._pod or self.node.run_pod(self.name)
            pod = self._pod
        container = self.node.run(pod, self.name, list(command), image=image, **more)
        status = self.node.wait(container)
        printed = self.node.log(container).strip()
        return printed if status.exit_code == 0 else f"exit code {status.exit_code}: {printed}"

    def runs(self, image: BuiltImage, expected: str = "", command: Sequence[str] = ("echo", "ran")) -> str:
        """ "runs" if a container of the image does, after a pull."""
        printed = self.run(self.pull(image), command)
        return "runs" if printed == (expected or "ran") else printed

    def imported(self, path: str) -> str:
        """The names that an import has added, and what it told."""
        before = names(self.node)
        done = import_here(self.node, path)
        self.said = done.stdout + done.stderr
        added = sorted(names(self.node) - before)
        return f"{', '.join(added) or 'no name'}; exit code {done.returncode}"


@dataclass(frozen=True)
class FieldCase:
    """A line of what runs on other runtimes.

    ``report`` is of the upstream project, such as ``containerd/containerd#7229``. ``here`` and ``containerd`` are the
    outcomes with criserver and with the containerd of docs/field.md. ``differs`` is the row of the docs that says why
    the outcome here is another on purpose.
    """

    item: int
    name: str
    do: Callable[[Field], str]
    here: str
    containerd: str
    report: str = ""
    differs: str = ""

    @property
    def verdict(self) -> str:
        if self.differs:
            return f"differs on purpose: {self.differs}"
        return "as containerd" if self.here == self.containerd else "holds"

    def outcome(self, found: Field) -> str:
        """What happens; "refused" if the runtime says no."""
        found.registry.answers.clear()
        found.other.answers.clear()
        found.other.asked.clear()
        found.said = ""
        try:
            return self.do(found)
        except grpc.RpcError as error:
            found.said = error.details() or ""
            return REFUSED


@contextmanager
def field_of(node: Node) -> Iterator[Field]:
    """A field with a node that has not been started. The node is closed at the end."""
    servers = [FieldServer(), FieldServer()]
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        _tune(node)
        node.start()
        found = Field(node, servers[0], servers[1])
        for server in servers:
            found.hosts(server.address, f'server = "http://{server.address}"\n')
        archive = found.file
        write_archive(busybox_image(), archive, BUSYBOX)
        assert import_here(node, archive).returncode == 0
        # containerd tells its CRI service of an import by an event.
        eventually(lambda: node.client.ImageStatus(image=cri.ImageSpec(image=BUSYBOX)).image.id)
        yield found
    finally:
        node.close()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def _tune(node: Node) -> None:
    """Let a plugin set a sysctl of each pod that a case sets too."""
    path = f"{node.cni}/10-e2e.conflist"
    with open(path) as f:
        network: dict[str, Any] = json.load(f)
    assert network["plugins"][0]["bridge"] == BRIDGE
    network["plugins"].append({"type": "tuning", "sysctl": {"net.core.somaxconn": "500"}})
    with open(path, "w") as f:
        json.dump(network, f)


def security(
    options: cri.NamespaceOption | None = None, sysctls: Mapping[str, str] | None = None
) -> cri.LinuxPodSandboxConfig:
    """The linux section of a pod."""
    options = options or cri.NamespaceOption(pid=cri.CONTAINER)
    context = cri.LinuxSandboxSecurityContext(namespace_options=options)
    return cri.LinuxPodSandboxConfig(security_context=context, sysctls=sysctls)
