"""systemd, where it is the node's service manager: what is told to it of the daemon, and what is asked of it.

All of it is optional: without systemd, or where it does not answer, the daemon goes on without.
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

# Seconds. systemd answers in some milliseconds; it may be busy while a node starts.
_TIMEOUT = 15.0
# What systemctl exits with for a unit that systemd does not know.
_NOT_LOADED = 5
# Between two reports of how things are, where no watchdog sets the pace.
_REPORT_INTERVAL = 30.0
# Why it cannot be told, as the log has been told.
_trouble: set[str] = set()


def notify(*states: str) -> None:
    """Tell systemd, where it started us: assignments as sd_notify(3) has them, "READY=1".

    Never raises. What hinders it is logged once until it works again.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            # It is never waited for: a manager that does not read is not to stop the daemon.
            sock.setblocking(False)
            words = "\n".join(states).encode(errors="replace")
            sock.sendto(words, "\0" + address[1:] if address[0] == "@" else address)
        _trouble.clear()
    except OSError as e:
        if str(e) not in _trouble:
            log.warning("the service manager cannot be told", state=states[0], error=str(e))
        _trouble.add(str(e))


def watchdog_interval() -> float | None:
    """Seconds between two pings, half of what systemd waits for one (sd_watchdog_enabled(3)); None without one."""
    pid, given = os.environ.get("WATCHDOG_PID", ""), os.environ.get("WATCHDOG_USEC", "")
    if not given.isdecimal() or int(given) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(given) / 2_000_000


def report_interval() -> float:
    """Seconds between two reports of how things are."""
    return watchdog_interval() or _REPORT_INTERVAL


async def report(status: Callable[[], str]) -> None:
    """Ping the watchdog for as long as the event loop runs, and have a line for ``systemctl status``.

    That the loop runs is all that a ping says: what waits for a plugin, a runtime or a registry has its own deadline,
    and a restart would help none of them. Returns where systemd has not started us.
    """
    ping = [] if watchdog_interval() is None else ["WATCHDOG=1"]
    while os.environ.get("NOTIFY_SOCKET"):
        try:
            words = status()
        except Exception:
            notify(*ping)  # the loop runs, whatever becomes of the line
            raise
        notify(f"STATUS={words}", *ping)
        await asyncio.sleep(report_interval())


def apart(what: str) -> list[str]:
    """What comes before a command that is to outlive our unit; nothing where systemd has not started us.

    The command gets a scope of its own, in which whatever it forks stays: our unit then ends with us, and can be
    started again, stopped and taken away while that runs. Without dependencies, as runtimes make those of containers,
    or a shutdown would stop shims before what they watch. Delegated: that the kernel kills one process for want of
    memory is no reason to end the others.
    """
    program = shutil.which("systemd-run")
    if program is None or "INVOCATION_ID" not in os.environ or not os.path.isdir("/run/systemd/system"):
        return []
    options = (f"--unit={what}-{secrets.token_hex(4)}", "--property=DefaultDependencies=no", "--property=Delegate=yes")
    return [program, "--scope", "--quiet", "--collect", *options, "--property=TasksMax=infinity", "--"]


async def stop_unit(name: str) -> None:
    """Stop a slice or scope with all that is in it; one that is not there is no error. What fails is logged.

    systemd keeps a slice that was made for a scope when the scope is gone, and a directory that is taken away below
    it changes nothing of that.
    """
    program = shutil.which("systemctl")
    if program is None:
        log.warning("systemctl is not there; systemd keeps a unit that nobody needs", unit=name)
        return
    try:
        done = await command.run([program, "stop", name], _TIMEOUT)
    except TimeoutError:
        log.warning("systemd does not stop a unit in time", unit=name)
        return
    if done.code not in (0, _NOT_LOADED):
        log.warning("systemd does not stop a unit", unit=name, error=done.words)
