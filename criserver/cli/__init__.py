"""The command line: what `criserver --help` lists.

The exit codes are those of the manual page: 0, 1 for a failure, 2 for a wrong command line, 3 if no daemon can be
reached, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from criserver import __version__
from criserver.cli.options import add_address, add_config, config_path, configuration, settings
from criserver.config import config_of, default_text, text
from criserver.errors import CriError, os_words


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code."""
    options: argparse.Namespace | None = None
    try:
        options = parsed(argv)
        code = _run(options)
        sys.stdout.flush()
    except OSError as e:
        if options is not None and options.run is _serve:
            raise  # a fault of the daemon: its log needs the traceback
        # Standard output is a closed pipe or a full device, or a file of the operator's cannot be used.
        print(f"criserver: {os_words(e)}", file=sys.stderr)
        _give_up_output()
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def _run(options: argparse.Namespace) -> int:
    try:
        return int(options.run(options))
    except CriError as e:
        print(f"criserver: {e}", file=sys.stderr)
        # The class is in a module that imports gRPC, which takes a while.
        return 3 if type(e).__name__ == "NoAnswerError" else 1


def _give_up_output() -> None:
    """Redirect standard output, or the interpreter fails again at its end, when it writes what is left."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Ends the process with 2 if it is wrong."""
    known = parser()
    options = known.parse_args(argv)
    if options.address is not None and options.run is not _command:
        known.error("--address is for commands that ask a running daemon; the others have --config")
    return options


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="criserver", description="A container runtime daemon for Kubernetes nodes.")
    parser.add_argument("--version", action="version", version=f"criserver {__version__}")
    add_config(parser)
    add_address(parser)
    parser.set_defaults(config=None, address=None)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the daemon")
    add_config(serve)
    serve.set_defaults(run=_serve)

    _add_node(commands)

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

    reset = commands.add_parser("reset", help="stop and remove all pods of a node whose daemon is stopped")
    add_config(reset)
    reset.add_argument("--yes", action="store_true", help="do not ask")
    reset.add_argument(
        "--grace", metavar="SECONDS", type=float, default=10, help="between stop signal and SIGKILL (10)"
    )
    reset.add_argument("--images", action="store_true", help="delete images and records too")
    reset.set_defaults(run=_reset)

    completion = commands.add_parser("completion", help="print a script that completes commands and options in a shell")
    completion.add_argument("shell", choices=("bash", "fish", "zsh"))
    completion.set_defaults(run=_completion)
    return parser


def _add_node(commands: Any) -> None:
    """The commands that look at a running daemon, and those for its pods."""

    def add(name: str, function: str, words: str, *, under: Any = commands) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = under.add_parser(
            name, help=words, description=f"{words[0].upper()}{words[1:]}."
        )
        add_config(command)
        add_address(command)
        command.set_defaults(run=_command, function=function)
        return command

    status = add("status", "node_commands.status", "show how the daemon and the node are, and what is under way")
    status.add_argument("--json", action="store_true", help="print JSON")

    pods = add("pods", "pod_commands.pods", "list the pods")
    pods.add_argument("--namespace", metavar="NAMESPACE", help="only those of this Kubernetes namespace")
    _add_form(pods)

    ps = add("ps", "pod_commands.ps", "list the containers that run")
    ps.add_argument("-a", "--all", action="store_true", help="also those that do not run")
    ps.add_argument("--pod", metavar="POD", help="only those of this pod: NAMESPACE/NAME, or the beginning of its ID")
    _add_form(ps)

    inspect = add("inspect", "pod_commands.inspect", "print all that is known of a pod or container, as JSON")
    inspect.add_argument("id", metavar="ID", help="an ID, the first characters of it, or a pod's NAMESPACE/NAME")

    events = add("events", "node_commands.events", "print the events of pods and containers as they happen")
    events.add_argument("--json", action="store_true", help="print one JSON document a line")

    logs = add("logs", "log_reader.logs", "print what a container has written")
    logs.add_argument("id", metavar="ID", help="its ID, the first characters of it, or NAMESPACE/POD/NAME")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the container has exited")
    logs.add_argument("-n", "--tail", metavar="LINES", type=_count, help="only the last lines")
    logs.add_argument("-t", "--timestamps", action="store_true", help="put the time before each line")

    trace = add("trace", "trace.trace", "show what took the time of the last calls, part by part")
    subjects = "a pod's or container's ID or its first characters, NAMESPACE/POD, or an image's name"
    trace.add_argument("subject", metavar="ID", nargs="?", help=subjects)
    trace.add_argument("--json", action="store_true", help="print JSON, with times in seconds")

    top = add("top", "top.top", "show the pods that use the most CPU, drawn again and again until Ctrl-C")
    top.add_argument("-c", "--containers", action="store_true", help="show containers")
    top.add_argument("--sort", choices=("cpu", "memory", "name"), default="cpu", help="the order (cpu)")
    top.add_argument("--interval", metavar="SECONDS", type=_interval, default=2.0, help="between two measurements (2)")
    top.add_argument("--once", action="store_true", help="print one table, after one interval")
    top.add_argument("--json", action="store_true", help="print once, as JSON: millicores and bytes")

    du = add("du", "node_commands.du", "show what uses the disk, by image and container")
    du.add_argument("--json", action="store_true", help="print JSON, with sizes in bytes")

    debug = commands.add_parser("debug", help="for bug reports").add_subparsers(required=True, metavar="ACTION")
    bundle = add(
        "bundle", "debug_bundle.bundle", "write what a bug report needs to a tar.gz, without secrets", under=debug
    )
    bundle.add_argument("file", metavar="FILE", nargs="?", help="a new file; by default its name has the host and time")

    pod = commands.add_parser("pod", help="pods of a running daemon").add_subparsers(required=True, metavar="ACTION")
    remove = add("remove", "pod_commands.remove", "end and remove a pod with its containers", under=pod)
    remove.add_argument("--force", action="store_true", help="also if its network plugins fail; it says what is left")
    remove.add_argument("id", metavar="ID", help="the pod's ID, or the first characters of it")


def _add_form(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("-q", "--quiet", action="store_true", help="print whole IDs alone")


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def _interval(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 3600:
        raise ValueError
    return seconds


def _add_image(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def add(name: str, function: str, words: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.")
        add_config(action)
        add_address(action)
        action.set_defaults(run=_command, function=f"image_commands.{function}")
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
    bring.add_argument("--name", metavar="NAME", help="the name of an image that has a tag alone, or no name")
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
    careful = prune.add_mutually_exclusive_group()
    careful.add_argument("--yes", action="store_true", help="do not ask")
    careful.add_argument("--dry-run", action="store_true", help="remove nothing, and print what --all would remove")


def _completion(options: argparse.Namespace) -> int:
    from criserver.cli.completion import script

    print(script(parser(), options.shell), end="")
    return 0


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


def _command(options: argparse.Namespace) -> int:
    """Run a command of a module of this package. It is imported only now, as gRPC takes a while."""
    module, _, function = options.function.partition(".")
    return int(getattr(importlib.import_module(f"criserver.cli.{module}"), function)(options))


def _reset(options: argparse.Namespace) -> int:
    from criserver.cli.reset import reset

    return reset(configuration(options), grace=options.grace, everything=options.images, yes=options.yes)
