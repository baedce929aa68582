"""``python -m tests.vm run -- COMMAND``: a command in a fresh virtual machine."""

from __future__ import annotations

import argparse
import sys
import time

from tests.vm.image import ImageError, image
from tests.vm.machine import PROJECT, MachineError, machine


def main() -> int:
    """Do what the command line says; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("image", help="make the disk, or find it made")
    run = commands.add_parser("run", help="run one command in a fresh machine")
    run.add_argument("--put", action="append", default=[], metavar="FILE:PATH", help="copy a file into the guest first")
    run.add_argument("--tree", action="store_true", help="put the work tree into the guest first; commands run in it")
    run.add_argument("--timeout", type=float, default=600.0)
    run.add_argument("words", nargs="+", metavar="COMMAND")
    options = parser.parse_args()
    try:
        start = time.monotonic()
        disk = image()
        print(f"image: {time.monotonic() - start:.1f} s", file=sys.stderr)
        if options.command == "image":
            print(disk.disk)
            return 0
        start = time.monotonic()
        with machine(disk) as guest:
            print(f"boot: {time.monotonic() - start:.1f} s", file=sys.stderr)
            for pair in options.put:
                source, _, target = pair.partition(":")
                with open(source, "rb") as f:
                    guest.put(target, f.read(), 0o755)
            if options.tree:
                guest.put_project()
            return guest.run(
                options.words,
                seconds=options.timeout,
                tee=_to_stdout,
                cwd=PROJECT if options.tree else "/root",
                env={"PYTHONPATH": PROJECT},
            ).status
    except (ImageError, MachineError) as error:
        print(error, file=sys.stderr)
        return 2


def _to_stdout(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
