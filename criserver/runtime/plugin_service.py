"""How plugins of the node (NRI) come to the daemon: by its socket, or because the daemon starts them.

What plugins need is imported when the first one comes, so a node without plugins has only a listening socket.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import structlog

from criserver.nri.plugin_socket import PluginSocket
from criserver.runtime.node import Node

if TYPE_CHECKING:
    from criserver.nri.plugin_files import PluginFile
    from criserver.nri.plugins import Plugins

log = structlog.get_logger(__name__)


class PluginService:
    """The plugins of a daemon, from its start to its stop."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._settings = node.config.nri
        self._socket = PluginSocket(self._settings.socket_path, self._connected)
        self._plugins: Plugins | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen, and start the plugins of the plugin directory.

        It waits until these are told of everything, so that no container is made without them, but not longer than
        they may take. Nothing here keeps the daemon from serving.
        """
        settings = self._settings
        if settings.disable:
            return
        self._node.plugins.begin(self._node.records, self._node.background, self._node.lock)
        if settings.default_validator["enable"]:
            self._with_plugins()
        if not settings.disable_connections:
            await self._socket.listen()
        files = await asyncio.to_thread(self._find)
        if not files:
            return
        self._launch(files)
        limit = settings.plugin_registration_timeout + 2 * settings.plugin_request_timeout
        if not await self._with_plugins().wait_for(files, limit):
            log.warning("the daemon serves without an NRI plugin that it has started", seconds=limit)

    async def stop(self) -> None:
        """Close the socket, tell the plugins, and end those that were started here."""
        self._socket.close()
        if self._plugins is not None:
            await self._plugins.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _find(self) -> list[PluginFile]:
        from criserver.nri.plugin_files import find

        return find(self._settings.plugin_path, self._settings.plugin_config_path)

    def _launch(self, files: list[PluginFile]) -> None:
        from criserver.nri.plugin_process import keep_running

        for file in files:
            self._keep(asyncio.create_task(keep_running(file, self._with_plugins().serve), name="nri plugin"))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a plugin that has connected."""
        self._keep(asyncio.create_task(self._with_plugins().serve(None, reader, writer), name="nri connection"))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(partial(_log_failure))

    def _with_plugins(self) -> Plugins:
        if self._plugins is None:
            # Imported here: a node without plugins saves its memory.
            from criserver.runtime.plugin_events import PluginCalls

            calls = PluginCalls(self._node)
            self._plugins, self._node.plugins.events = calls.plugins, calls
        return self._plugins


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the connection of an NRI plugin failed", error=str(error), exc_info=error)
