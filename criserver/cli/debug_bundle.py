"""``criserver debug bundle``: a tar.gz of all that a bug report needs, without secrets.

It is made also without a daemon, and of a daemon that does not answer. The file ``errors.txt`` in it says what is
missing, and why.
"""

from __future__ import annotations

import argparse
import glob
import io
import json
import os
import platform
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from criserver import __version__
from criserver.cli.client import ADMIN, RUNTIME, as_json, connected, method
from criserver.cli.node_commands import status_document
from criserver.cli.options import address, config_path, configuration, settings
from criserver.cli.pod_commands import listed
from criserver.cli.redaction import text_without_secrets, without_secrets
from criserver.config import Config, text
from criserver.errors import CriError, InvalidArgumentError, os_words
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.pb.runtime.v1 import api_pb2 as cri

_UNIT = "criserver.service"
_JOURNAL_LINES = "5000"
# Seconds that a program or a call of the daemon may take.
_PATIENCE = 30


class _Bundle:
    """The archive, and what could not be put into it."""

    def __init__(self, archive: tarfile.TarFile, top: str) -> None:
        self._archive = archive
        self._top = top
        self.errors: list[str] = []

    def add(self, name: str, content: str) -> None:
        data = content.encode(errors="replace")
        entry = tarfile.TarInfo(f"{self._top}/{name}")
        entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
        self._archive.addfile(entry, io.BytesIO(data))

    def add_document(self, name: str, document: Any) -> None:
        self.add(name, json.dumps(without_secrets(document), indent=2) + "\n")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Note an error of the block, and go on."""
        try:
            yield
        except grpc.RpcError as e:
            self.errors.append(f"{name}: {e.details() if isinstance(e, grpc.Call) else e}")
        except OSError as e:
            self.errors.append(f"{name}: {os_words(e)}")
        except (CriError, subprocess.SubprocessError) as e:
            self.errors.append(f"{name}: {e}")


class _Deadline(grpc.UnaryUnaryClientInterceptor):
    """All calls together may take :data:`_PATIENCE` seconds, and each of the last ones another second."""

    def __init__(self) -> None:
        self._end = time.monotonic() + _PATIENCE

    @property
    def has_passed(self) -> bool:
        return time.monotonic() > self._end

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        left = max(1.0, self._end - time.monotonic())
        return continuation(details._replace(timeout=left), request)


def bundle(options: argparse.Namespace) -> int:
    """Write the archive and print its name. Raises InvalidArgumentError if the file exists."""
    host = socket.gethostname()
    top = f"criserver-debug-{host}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = options.file or f"{top}.tar.gz"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as e:
        raise InvalidArgumentError(f"{path} exists already; give the name of a new file") from e
    with open(fd, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        made = _Bundle(archive, top)
        _fill(made, options)
        made.add("errors.txt", "".join(f"{line}\n" for line in made.errors))
    for line in made.errors:
        print(f"left out: {line}", file=sys.stderr)
    print(f"{path}: read it before you send it; values of variables and known kinds of secrets are removed")
    return 0


def _fill(bundle: _Bundle, options: argparse.Namespace) -> None:
    config: Config | None = None
    with bundle.part("configuration"):
        config = configuration(options)
        bundle.add("config/effective.toml", text_without_secrets(text(settings(options))))
    main = config_path(options)
    for file in (main, *sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(main)), "conf.d", "*.toml")))):
        with bundle.part(file):
            _add_file(bundle, f"config/{os.path.basename(file)}", file)
    with bundle.part("versions"):
        bundle.add("versions.txt", _versions(config))
    if config is not None:
        for file in sorted(glob.glob(os.path.join(glob.escape(config.cni_conf_dir), "*.conf*"))):
            with bundle.part(file):
                _add_cni(bundle, file)
    with bundle.part("daemon"):
        _ask(bundle, address(options))
    if os.path.isdir("/run/systemd/system"):
        with bundle.part("journal"):
            command = ["journalctl", "--no-pager", f"--unit={_UNIT}", f"--lines={_JOURNAL_LINES}", "--output=short-iso"]
            bundle.add("journal.txt", text_without_secrets(_output(command)))


def _ask(bundle: _Bundle, address: str) -> None:
    with connected(address) as unlimited:
        deadline = _Deadline()
        channel = grpc.intercept_channel(unlimited, deadline)
        method(channel, RUNTIME, "Version")(cri.VersionRequest())
        with bundle.part("status"):
            bundle.add_document("status.json", status_document(channel, address, stacks=True))
        with bundle.part("disk use"):
            bundle.add_document("disk.json", as_json(method(channel, ADMIN, "DiskUse")(admin.DiskUseRequest())))
        with bundle.part("traces"):
            bundle.add_document("trace.json", as_json(method(channel, ADMIN, "Trace")(admin.TraceRequest())))
        pods, containers = listed(channel)
        for kind, found in (("pods", pods), ("containers", containers)):
            for item in found:
                if deadline.has_passed:
                    bundle.errors.append(f"{kind}/{item.id} and more: the daemon did not answer in time")
                    return
                with bundle.part(f"{kind}/{item.id}"):
                    answer = method(channel, ADMIN, "Inspect")(admin.InspectRequest(id=item.id))
                    bundle.add_document(f"{kind}/{item.id}.json", json.loads(answer.document))


def _add_file(bundle: _Bundle, name: str, path: str) -> None:
    with open(path, errors="replace") as f:
        bundle.add(name, text_without_secrets(f.read()))


def _add_cni(bundle: _Bundle, path: str) -> None:
    name = f"cni/{os.path.basename(path)}"
    try:
        with open(path) as f:
            bundle.add_document(name, json.load(f))
    except ValueError:
        _add_file(bundle, name, path)


def _versions(config: Config | None) -> str:
    """The versions of all that takes part, one program after the other."""
    lines = [f"criserver {__version__}", f"Python {platform.python_version()}", f"kernel {platform.platform()}"]
    programs = [handler.path for handler in config.runtimes.values()] if config is not None else []
    for command in (["cat", "/etc/os-release"], *([program, "--version"] for program in programs)):
        try:
            lines.append(f"\n{' '.join(command)}:\n{_output(command).strip()}")
        except (OSError, subprocess.SubprocessError) as e:
            lines.append(f"\n{' '.join(command)}: {e}")
    return "\n".join(lines) + "\n"


def _output(command: list[str]) -> str:
    done = subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_PATIENCE,
    )
    return done.stdout.decode(errors="replace")
