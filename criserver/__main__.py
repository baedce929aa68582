"""``python -m criserver``, and the program ``criserver``."""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """Run the command line and return the process's exit code."""
    # A shell starts a program in the background with SIGINT ignored. Then it stays ignored.
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        # Imports take a while, and Ctrl-C would end them with a traceback.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from criserver import cli

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
