"""The command line: serve, check, config, image, reset."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from criserver import __version__
from criserver.config import default_text, load
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
    serve.add_argument("--config", metavar="FILE", help="TOML file; without it the defaults are used")
    serve.set_defaults(run=_serve)

    check = commands.add_parser("check", help="tell what this node lacks before pods can run; fails where they cannot")
    check.add_argument("--config", metavar="FILE", help="the configuration that the daemon is to have")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(run=_check)

    config = commands.add_parser("config", help="the configuration").add_subparsers(required=True, metavar="ACTION")
    default = config.add_parser("default", help="print every key with its default and what it means")
    default.set_defaults(run=_config_default)

    image = commands.add_parser("image", help="images of a running daemon").add_subparsers(
        required=True, metavar="ACTION"
    )
    add = image.add_parser("import", help="add the images of an OCI layout or docker-archive tar")
    add.add_argument("file", metavar="FILE", help='the archive, or "-" for standard input')
    add.add_argument("--config", metavar="FILE", help="the daemon's configuration, for its address")
    add.set_defaults(run=_image_import)

    reset = commands.add_parser("reset", help="stop and remove all pods of a node whose daemon is stopped")
    reset.add_argument("--config", metavar="FILE", help="the daemon's configuration")
    reset.add_argument("--yes", action="store_true", help="do not ask")
    reset.add_argument(
        "--grace", metavar="SECONDS", type=float, default=10, help="between stop signal and SIGKILL (10)"
    )
    reset.add_argument("--images", action="store_true", help="delete images and records too")
    reset.set_defaults(run=_reset)
    return parser


def _serve(options: argparse.Namespace) -> int:
    config = load(options.config)
    # Imported here: the other commands are to answer at once.
    from criserver import daemon, logs

    logs.set_up(config.log_level, config.log_format)
    return daemon.run(config)


def _check(options: argparse.Namespace) -> int:
    from criserver.cli.check import check

    return check(load(options.config), as_json=options.json)


def _config_default(_: argparse.Namespace) -> int:
    print(default_text(), end="")
    return 0


def _image_import(options: argparse.Namespace) -> int:
    from criserver.cli.image import import_file

    return import_file(load(options.config).grpc_address, options.file)


def _reset(options: argparse.Namespace) -> int:
    from criserver.cli.reset import reset

    return reset(load(options.config), grace=options.grace, everything=options.images, yes=options.yes)
