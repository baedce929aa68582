"""A plugin that the daemon starts: a process with an inherited socket, started again where it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable

import structlog

from criserver.nri.plugin_files import PluginFile

log = structlog.get_logger(__name__)

# Seconds before the next start: the first pause and the longest one. Each pause is twice the last one. After a run as
# long as the longest pause, the pauses begin again with the first.
_FIRST_PAUSE, _LAST_PAUSE = 1.0, 60.0

Serve = Callable[[PluginFile, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def keep_running(file: PluginFile, serve: Serve) -> None:
    """Start the plugin, and start it again whenever it has gone. Cancel it to end the plugin."""
    pause = _FIRST_PAUSE
    while True:
        began = time.monotonic()
        try:
            await _run(file, serve)
        except OSError as e:
            log.warning("an NRI plugin cannot be started", file=file.path, error=str(e))
        if time.monotonic() - began >= _LAST_PAUSE:
            pause = _FIRST_PAUSE
        log.info("NRI plugin is started again", file=file.path, pause=pause)
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LAST_PAUSE)


async def _run(file: PluginFile, serve: Serve) -> None:
    """Start the plugin and wait for its end. Raises OSError where it cannot be started."""
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            environment = {
                "PATH": os.environ.get("PATH", os.defpath),
                "NRI_PLUGIN_NAME": file.name,
                "NRI_PLUGIN_IDX": file.index,
                "NRI_PLUGIN_SOCKET": str(theirs.fileno()),
            }
            process = await asyncio.create_subprocess_exec(
                file.path,
                env=environment,
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
    except BaseException:
        ours.close()
        raise
    try:
        reader, writer = await asyncio.open_connection(sock=ours)
        await serve(file, reader, writer)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
