"""Notifications to systemd about the daemon, and commands to systemd for scopes and slices.

All of this is optional. If the node does not use systemd, or systemd does not answer, the daemon works without it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
from collections.abc import Callable

import structlog

from criserver.runtime import command

log = structlog.get_logger(__name__)

# Seconds. systemd answers within milliseconds, but may be busy while the node boots.
_TIMEOUT = 15.0
# The exit code of systemctl for a unit that systemd does not know.
_NOT_LOADED = 5
# Seconds between two status reports if systemd has no watchdog for the daemon.
_REPORT_INTERVAL = 30.0
# The errors of notifying systemd that have been logged since it last worked.
_logged_errors: set[str] = set()


def notify(*states: str) -> None:
    """Notify systemd, if it started the daemon; ``states`` are assignments of sd_notify(3), such as "READY=1".

    Never raises. An error is logged once until notifying works again.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            # The daemon never waits here: it must go on even if systemd does not read the notification.
            sock.setblocking(False)
            notification = "\n".join(states).encode(errors="replace")
            sock.sendto(notification, "\0" + address[1:] if address[0] == "@" else address)
        _logged_errors.clear()
    except OSError as e:
        if str(e) not in _logged_errors:
            log.warning("the service manager cannot be notified", state=states[0], error=str(e))
        _logged_errors.add(str(e))


def watchdog_interval() -> float | None:
    """Seconds between two pings: half of the watchdog's timeout (sd_watchdog_enabled(3)). None without a watchdog."""
    pid, timeout = os.environ.get("WATCHDOG_PID", ""), os.environ.get("WATCHDOG_USEC", "")
    if not timeout.isdecimal() or int(timeout) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(timeout) / 2_000_000


def report_interval() -> float:
    """Seconds between two status reports."""
    return watchdog_interval() or _REPORT_INTERVAL


async def report(status: Callable[[], str]) -> None:
    """Ping the watchdog for as long as the event loop runs, and set the status line of ``systemctl status``.

    A ping only says that the event loop runs. Waiting for a plugin, a runtime or a registry has its own deadline, and a
    restart of the daemon would not help there. Returns at once if systemd has not started the daemon.
    """
    ping = [] if watchdog_interval() is None else ["WATCHDOG=1"]
    while os.environ.get("NOTIFY_SOCKET"):
        try:
            line = status()
        except Exception:
            notify(*ping)  # the event loop runs, even if the status line fails
            raise
        notify(f"STATUS={line}", *ping)
        await asyncio.sleep(report_interval())


def own_scope(name: str) -> list[str]:
    """The arguments before a command that run it in a scope of its own; none if systemd has not started the daemon.

    The command and all its children are in that scope, and not in the daemon's unit. So they go on when the daemon's
    unit is stopped, started again or removed. The properties of the scope:

    1. DefaultDependencies=no, as the scopes that runtimes make for containers have it: otherwise a shutdown of the node
       would stop the shims before their containers.
    2. Delegate=yes: otherwise systemd would stop the whole scope after the kernel has killed one process in it for
       lack of memory.
    """
    program = shutil.which("systemd-run")
    if program is None or "INVOCATION_ID" not in os.environ or not os.path.isdir("/run/systemd/system"):
        return []
    options = (f"--unit={name}-{secrets.token_hex(4)}", "--property=DefaultDependencies=no", "--property=Delegate=yes")
    return [program, "--scope", "--quiet", "--collect", *options, "--property=TasksMax=infinity", "--"]


async def stop_unit(name: str) -> None:
    """Stop a slice or scope and all units in it; it may be gone already. A failure is logged.

    systemd keeps a slice that it has made for a scope after the scope is gone, even if the slice's cgroup is removed.
    """
    program = shutil.which("systemctl")
    if program is None:
        log.warning("systemctl is not installed; systemd keeps a unit that is not needed", unit=name)
        return
    try:
        done = await command.run([program, "stop", name], _TIMEOUT)
    except TimeoutError:
        log.warning("systemd did not stop a unit in time", unit=name)
        return
    if done.code not in (0, _NOT_LOADED):
        log.warning("systemd cannot stop a unit", unit=name, error=done.message)
