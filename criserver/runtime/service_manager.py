"""systemd, where it is the node's service manager: what is told to it of the daemon, and what is asked of it.

All of it is optional: without systemd, or where it does not answer, the daemon goes on without.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket

import structlog

log = structlog.get_logger(__name__)

# Seconds. systemd answers in some milliseconds; it may be busy while a node starts.
_TIMEOUT = 15.0


def notify(*states: str) -> None:
    """Tell systemd, where it started us: assignments as sd_notify(3) has them, "READY=1"."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        # It is never waited for: a manager that does not read is not to stop the daemon.
        sock.setblocking(False)
        try:
            sock.sendto("\n".join(states).encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError as e:
            log.warning("the service manager cannot be told", state=states[0], error=str(e))


async def stop_slice(name: str) -> None:
    """Stop a slice with all that is in it; one that is not there is no error. What fails is logged.

    systemd keeps a slice that was made for a scope when the scope is gone, and a directory that is taken away below
    it changes nothing of that.
    """
    program = shutil.which("systemctl")
    if program is None:
        log.warning("systemctl is not there; systemd keeps a slice that nobody needs", slice=name)
        return
    process = await asyncio.create_subprocess_exec(
        program,
        "stop",
        name,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_TIMEOUT):
            _, stderr = await process.communicate()
        if process.returncode:
            log.warning("systemd does not stop a slice", slice=name, error=stderr.decode(errors="replace").strip())
    except TimeoutError:
        process.kill()  # asyncio reaps it
        log.warning("systemd does not stop a slice in time", slice=name)
