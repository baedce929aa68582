"""The daemon's process, without what it serves."""

from __future__ import annotations

import subprocess
import sys

# Three descriptors are open, and an event loop takes three more: one of the selector, and two that wake it.
_RUN = """
import os, resource
from criserver import daemon
os.geteuid = lambda: 0
resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))
os._exit(daemon.run(None, ""))
"""


def test_a_daemon_that_gets_no_event_loop_says_what_is_short() -> None:
    done = subprocess.run([sys.executable, "-c", _RUN], capture_output=True, text=True, check=False)
    assert done.stderr.startswith("criserver: the daemon cannot start: "), done.stderr
    assert "Too many open files" in done.stderr
    assert done.returncode == 1


def test_what_few_nodes_need_is_not_imported_at_the_start() -> None:
    needed_later = {
        "aiohttp",  # a pull
        "criserver.nri.plugins",
        "google.protobuf.json_format",  # `criserver inspect`
        "h11",  # exec, attach and port-forward
        "opentelemetry",
        "prometheus_client",
        "tarfile",  # an export or a checkpoint
        "wsproto",
        "yaml",
    }
    program = f"import sys, criserver.daemon; print(*sys.modules.keys() & {needed_later})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
