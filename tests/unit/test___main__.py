"""The start of the program, before the command line is read."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Sends SIGINT while criserver.cli is imported.
INTERRUPTED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "criserver.cli":
            os.kill(os.getpid(), signal.SIGINT)
{before}
from criserver.__main__ import main
sys.meta_path.insert(0, Finder())
sys.argv = ["criserver", "--version"]
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("before", "code"), [("", 130), ("signal.signal(signal.SIGINT, signal.SIG_IGN)", 0)], ids=["front", "background"]
)
def test_ctrl_c_during_the_imports(before: str, code: int) -> None:
    program = [sys.executable, "-c", INTERRUPTED.format(before=before)]
    done = subprocess.run(program, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")
