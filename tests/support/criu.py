"""The criu of the tests: that of CRISERVER_TEST_CRIU, the one that ``make test`` unpacks, or the node's."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

_UNPACKED = Path(__file__).parents[2] / ".venv/criu/criu"
REAL_CRIU = os.environ.get("CRISERVER_TEST_CRIU") or (str(_UNPACKED) if _UNPACKED.exists() else shutil.which("criu"))


def criu_trouble() -> str:
    """Why it cannot dump; "" if it can."""
    if REAL_CRIU is None:
        return "no criu: install the package criu"
    checked = subprocess.run([REAL_CRIU, "check"], capture_output=True, text=True)
    if checked.returncode:
        return (
            f"{REAL_CRIU} cannot work with this kernel; CRISERVER_TEST_CRIU may name a newer one: "
            f"{checked.stderr.strip().splitlines()[0]}"
        )
    return ""
