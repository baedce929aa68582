"""The command line: serve, check, config, image, pod, reset."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from criserver import __version__
from criserver.cli.options import add_config, config_path, configuration, settings
from criserver.config import config_of, default_text, text
from criserver.errors import CriError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code."""
    options = _parser().parse_args(argv)
    try:
        return int(options.run(options))
    except CriError as e:
        print(f"criserver: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="criserver", description="A container runtime daemon for Kubernetes nodes.")
    parser.add_argument("--version", action="version", version=f"criserver {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the daemon")
    add_config(serve)
    serve.set_defaults(run=_serve)

    check = commands.add_parser(
        "check", help="report what this node lacks before pods can run; exits with 1 if they cannot"
    )
    add_config(check)
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(run=_check)

    config = commands.add_parser("config", help="the configuration").add_subparsers(required=True, metavar="ACTION")
    default = config.add_parser("default", help="print every key with its default and its meaning")
    default.set_defaults(run=_config_default)
    show = config.add_parser("show", help="print every key with its value here, and the file that set it")
    add_config(show)
    show.set_defaults(run=_config_show)
    sound = config.add_parser("check", help="exit with 1 if the daemon would refuse the configuration, and say why")
    add_config(sound)
    sound.set_defaults(run=_config_check)

    _add_image(commands.add_parser("image", help="images of a running daemon"))

    pod = commands.add_parser("pod", help="pods of a running daemon").add_subparsers(required=True, metavar="ACTION")
    remove = pod.add_parser("remove", help="end and remove a pod with its containers")
    add_config(remove)
    remove.add_argument("--force", action="store_true", help="also if its network plugins fail; it says what is left")
    remove.add_argument("id", metavar="ID", help="the pod's ID, or the first characters of it")
    remove.set_defaults(run=_pod_remove)

    reset = commands.add_parser("reset", help="stop and remove all pods of a node whose daemon is stopped")
    add_config(reset)
    reset.add_argument("--yes", action="store_true", help="do not ask")
    reset.add_argument(
        "--grace", metavar="SECONDS", type=float, default=10, help="between stop signal and SIGKILL (10)"
    )
    reset.add_argument("--images", action="store_true", help="delete images and records too")
    reset.set_defaults(run=_reset)
    return parser


def _add_image(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def add(name: str, function: str, words: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.")
        add_config(action)
        action.set_defaults(run=_image, function=function)
        return action

    found = add("list", "list_images", "list the images, or those that IMAGE names")
    found.add_argument("image", metavar="IMAGE", nargs="?", help="a name, with or without a tag, or an ID")
    shape = found.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print JSON, with whole IDs and sizes in bytes")
    shape.add_argument("-q", "--quiet", action="store_true", help="print IDs alone")

    pull = add("pull", "pull", "pull an image from its registry")
    pull.add_argument("image", metavar="IMAGE")
    pull.add_argument("--pin", action="store_true", help="keep it from garbage collection")
    pull.add_argument("-q", "--quiet", action="store_true", help="print its ID alone")
    who = pull.add_mutually_exclusive_group()
    who.add_argument("--authfile", metavar="FILE", help="a docker config file with credentials")
    who.add_argument("--user", metavar="NAME", help="the user who pulls; the command asks for the password")
    pull.add_argument("--password-stdin", action="store_true", help="read the password from standard input")

    bring = add("import", "import_file", "add the images of an OCI layout or docker-archive tar")
    bring.add_argument("file", metavar="FILE", help='the archive, or "-" for standard input')
    bring.add_argument("--pin", action="store_true", help="keep them from garbage collection")

    export = add("export", "export", "write images to an OCI layout tar")
    export.add_argument("images", metavar="IMAGE", nargs="+")
    export.add_argument("file", metavar="FILE", help='the archive, or "-" for standard output')

    remove = add("remove", "remove", "remove images with all their names")
    remove.add_argument("images", metavar="IMAGE", nargs="+")
    remove.add_argument("--force", action="store_true", help="also if they are pinned")

    for name, pinned, words in (
        ("pin", True, "keep images from garbage collection, also from the kubelet's"),
        ("unpin", False, "let garbage collection remove images again"),
    ):
        action = add(name, "pin", words)
        action.add_argument("images", metavar="IMAGE", nargs="+")
        action.set_defaults(pinned=pinned)

    add("verify", "verify", "read all stored images and report damage")
    prune = add("prune", "prune", "remove data that no image, container or pull needs")
    prune.add_argument("--all", action="store_true", help="also images that no container uses and nobody has pinned")


def _serve(options: argparse.Namespace) -> int:
    given = settings(options)
    config = config_of(given)
    # gRPC reads this when it is imported. After a fork that fails because the node has no process left, gRPC's fork
    # handlers would leave its server unable to take calls. No child of the daemon uses gRPC, so it needs no handlers.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    # Imported here, so that the other commands start fast.
    from criserver import daemon, logs

    logs.set_up(config.log_level, config.log_format)
    return daemon.run(given, config_path(options))


def _check(options: argparse.Namespace) -> int:
    from criserver.cli.check import check

    return check(configuration(options), as_json=options.json)


def _config_default(_: argparse.Namespace) -> int:
    print(default_text(), end="")
    return 0


def _config_show(options: argparse.Namespace) -> int:
    print(text(settings(options)), end="")
    return 0


def _config_check(options: argparse.Namespace) -> int:
    configuration(options)
    return 0


def _image(options: argparse.Namespace) -> int:
    from criserver.cli import image_commands

    return int(getattr(image_commands, options.function)(options))


def _pod_remove(options: argparse.Namespace) -> int:
    from criserver.cli import pod_commands

    return pod_commands.remove(options)


def _reset(options: argparse.Namespace) -> int:
    from criserver.cli.reset import reset

    return reset(configuration(options), grace=options.grace, everything=options.images, yes=options.yes)
