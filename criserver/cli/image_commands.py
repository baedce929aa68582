"""``criserver image``: the commands by which an operator manages the images of a running daemon.

Each function is one command. It gets the options and returns the exit code of the process. All raise CriError: with the
daemon's error if that refuses or does not answer, and InvalidArgumentError for a file that cannot be read or written.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import grpc

from criserver.cli.client import ADMIN, IMAGES, NoAnswerError, connected, failure, method
from criserver.cli.node_commands import users_words
from criserver.cli.options import address
from criserver.cli.progress_display import display, short, size_words
from criserver.cli.table import Cell, duration_words, print_table
from criserver.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from criserver.pb.criserver.v1 import admin_pb2 as admin
from criserver.pb.runtime.v1 import api_pb2 as cri

_PIECE = 1 << 20


def list_images(options: argparse.Namespace) -> int:
    """Print a table of the images, a line for each name; or their IDs; or JSON."""
    with connected(address(options)) as channel:
        wanted = cri.ImageFilter(image=cri.ImageSpec(image=options.image or ""))
        images = list(method(channel, IMAGES, "ListImages")(cri.ListImagesRequest(filter=wanted)).images)
        uses = {use.image.id: use for use in method(channel, ADMIN, "DiskUse")(admin.DiskUseRequest()).images}
    if options.json:
        print(json.dumps([_as_json(image, uses.get(image.id)) for image in images], indent=2))
    elif options.quiet:
        print(*(image.id for image in images), sep="\n", end="\n" if images else "")
    else:
        rows = sorted((name, image.id, image) for image in images for name in _shown_names(image))
        table: list[Sequence[str | Cell]] = [
            [Cell(h, "bold") for h in ("IMAGE", "ID", "SIZE", "ON DISK", "USED BY", "SINCE", "")]
        ]
        for name, _, image in rows:
            use = uses.get(image.id, admin.ImageUse())
            occupied = size_words(use.blobs + use.layers)
            since = duration_words(time.time() - use.used_since / 1e9) if use.used_since else "-"
            about = (size_words(image.size), occupied, users_words(use.users), since)
            table.append((name, short(image.id), *about, "pinned" if image.pinned else ""))
        print_table(table, keep=(1, 2, 3, 5, 6))
    return 0


def pull(options: argparse.Namespace) -> int:
    """Pull an image and show the progress; print its ID and names."""
    request = admin.PullImageRequest(name=options.image, pin=options.pin, **_credentials(options))
    with connected(address(options)) as channel:
        shown = None if options.quiet else display(sys.stderr)
        response = admin.PullImageResponse()
        for response in method(channel, ADMIN, "PullImage")(request):
            if shown and response.layers:
                shown.show(response.layers)
        _print_image(response.image, "", quiet=options.quiet)
    return 0


def import_file(options: argparse.Namespace) -> int:
    """Send an archive to the daemon, and print the images in it. If something was left out, the exit code is 1."""
    if options.file == "-":
        return _import(options, sys.stdin.buffer, "on standard input")
    try:
        with open(options.file, "rb") as f:
            return _import(options, f, options.file)
    except OSError as e:
        raise InvalidArgumentError(f"{options.file}: {e.strerror}") from e


def export(options: argparse.Namespace) -> int:
    """Write images to an archive. The file gets its name when it is complete."""
    if options.file == "-" and sys.stdout.isatty():
        raise InvalidArgumentError("an archive is not written to a terminal; give a file, or redirect standard output")
    with connected(address(options)) as channel, _output(options.file) as file:
        for piece in method(channel, ADMIN, "ExportImages")(admin.ExportImagesRequest(images=options.images)):
            file.write(piece.data)
    return 0


def remove(options: argparse.Namespace) -> int:
    """Remove images with all their names."""

    def one(channel: grpc.Channel, name: str) -> None:
        request = admin.RemoveImageRequest(image=name, force=options.force)
        removed = method(channel, ADMIN, "RemoveImage")(request)
        _print_image(removed.image, "removed ")
        if removed.snapshots:
            print(f"  its layers stay until the containers on them are removed ({removed.snapshots})")

    return _each(options, one)


def pin(options: argparse.Namespace) -> int:
    """Pin or unpin images."""

    def one(channel: grpc.Channel, name: str) -> None:
        request = admin.PinImageRequest(image=name, pinned=options.pinned)
        pinned = method(channel, ADMIN, "PinImage")(request)
        _print_image(pinned.image, "pinned " if options.pinned else "unpinned ")

    return _each(options, one)


def verify(options: argparse.Namespace) -> int:
    """Have the daemon verify all blobs and layers, and print the damage. With damage the exit code is 1."""
    damaged = 0
    told = sys.stderr.isatty()
    with connected(address(options)) as channel:
        found = admin.VerifyImagesResponse()
        for found in method(channel, ADMIN, "VerifyImages")(admin.VerifyImagesRequest()):
            if told:
                far = f"{size_words(found.bytes)} of {size_words(found.total_bytes)}, {found.layers} layers"
                print(f"\r\x1b[2K{far}", end="", file=sys.stderr, flush=True)
            for damage in found.damage:
                damaged += 1
                print("\r\x1b[2K" if told else "", end="", file=sys.stderr, flush=True)
                print(damage.what)
                for image in damage.images:
                    _print_image(image, "  ")
                print(f"  {damage.advice}")
    if told:
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
    blobs, layers = _count(found.blobs, "blob"), _count(found.layers, "layer")
    looked = f"{_count(found.images, 'image')}: {blobs} of {size_words(found.bytes)}, {layers}"
    print(f"{looked}; {damaged} damaged" if damaged else f"{looked}; no damage")
    return 1 if damaged else 0


def prune(options: argparse.Namespace) -> int:
    """Delete blobs and layers that nothing needs; with --all also unused images, after a question.

    Raises FailedPreconditionError without a terminal to ask at.
    """
    if options.dry_run and not options.all:
        raise InvalidArgumentError("--dry-run is for --all: without it no image is removed")
    with connected(address(options)) as channel:
        call = method(channel, ADMIN, "PruneImages")
        if options.all and not options.yes:
            unused = call(admin.PruneImagesRequest(all=True, dry_run=True)).images
            for image in unused:
                _print_image(image, "unused ")
            if options.dry_run:
                return 0
            if unused and not _agreed(len(unused)):
                print("nothing was removed")
                return 1
        pruned = call(admin.PruneImagesRequest(all=options.all))
    for image in pruned.images:
        _print_image(image, "removed ")
    print(f"freed {size_words(pruned.freed_bytes)} ({pruned.freed_bytes} bytes), {pruned.freed_inodes} inodes")
    return 0


def _agreed(images: int) -> bool:
    if not sys.stdin.isatty():
        raise FailedPreconditionError(
            "prune --all asks before it removes images, and there is no terminal to ask at; give --yes, or --dry-run"
        )
    return input(f"{_count(images, 'image')} will be removed. Go on? [y/N] ").strip().lower() in ("y", "yes")


def _each(options: argparse.Namespace, one: Callable[[grpc.Channel, str], None]) -> int:
    """Call ``one`` for each image in the options. A failure for one image does not stop the others."""
    code = 0
    socket = address(options)
    with connected(socket) as channel:
        for name in options.images:
            try:
                one(channel, name)
            except grpc.RpcError as e:
                error = failure(socket, e)
                if isinstance(error, NoAnswerError):
                    raise error from e
                print(f"criserver: {error}", file=sys.stderr)
                code = 1
    return code


def _credentials(options: argparse.Namespace) -> dict[str, str]:
    """The credentials of a pull request. A password is asked for or read, and is never an argument."""
    if options.authfile:
        # Imported here, as the import takes more time than the rest of the command.
        from criserver.images import parse
        from criserver.images.credentials import load_docker_config

        reference = parse(options.image)
        file = load_docker_config(options.authfile, "--authfile")
        found = file.find(reference.domain, reference.path)
        if found is None:
            reason = f"--authfile {options.authfile} has no entry for {reference.domain}"
            if file.leaves_to_helper(reference.domain):
                reason += ", and credential helpers are not run; use --user"
            raise NotFoundError(reason)
        return {
            "username": found.username,
            "password": found.password,
            "identity_token": found.identity_token,
            "registry_token": found.registry_token,
        }
    if not options.user:
        if options.password_stdin:
            raise InvalidArgumentError("--password-stdin needs --user")
        return {}
    if options.password_stdin:
        return {"username": options.user, "password": sys.stdin.readline().rstrip("\r\n")}
    if not sys.stdin.isatty():
        raise InvalidArgumentError("there is no terminal to ask for the password; give it with --password-stdin")
    return {"username": options.user, "password": getpass.getpass(f"Password of {options.user}: ")}


def _import(options: argparse.Namespace, archive: BinaryIO, name: str) -> int:
    def pieces() -> Iterator[admin.ImportImageRequest]:
        file = "" if options.file == "-" else options.file
        yield admin.ImportImageRequest(name=name, pin=options.pin, file=file, given_name=options.name or "")
        while piece := archive.read(_PIECE):
            yield admin.ImportImageRequest(data=piece)

    with connected(address(options)) as channel:
        response = method(channel, ADMIN, "ImportImage")(pieces())
    for image in response.images:
        _print_image(image, "")
    for left in response.left_out:
        print(f"criserver: left out {left.what}: {left.reason}", file=sys.stderr)
    return 1 if response.left_out else 0


@contextlib.contextmanager
def _output(path: str) -> Iterator[BinaryIO]:
    """The file ``path``, open for writing. A regular file is made or replaced at the end, and not after a failure."""
    try:
        if path == "-":
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
        elif os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "wb") as file:
                yield file
        else:
            with _replacing(os.path.realpath(path)) as file:
                yield file
    except OSError as e:
        raise InvalidArgumentError(f"{path}: {e.strerror}") from e


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    fd, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=f".{os.path.basename(path)}.")
    try:
        with open(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _print_image(image: admin.Image, before: str, *, quiet: bool = False) -> None:
    print(f"{before}{image.id}", *([] if quiet else image.names), flush=True)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _shown_names(image: cri.Image) -> Iterable[str]:
    return image.repo_tags or image.repo_digests or ["<none>"]


def _as_json(image: cri.Image, use: admin.ImageUse | None) -> dict[str, Any]:
    use = use or admin.ImageUse()
    return {
        "id": image.id,
        "repoTags": list(image.repo_tags),
        "repoDigests": list(image.repo_digests),
        "size": image.size,
        "onDisk": use.blobs + use.layers,
        "usedBy": list(use.users),
        "usedSince": use.used_since,
        "pinned": image.pinned,
    }
