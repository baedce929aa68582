"""SIGHUP: the daemon reads its configuration anew, and takes over what can change while it runs."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import structlog

from criserver import logs
from criserver.config import Settings, config_of, dotted, read
from criserver.config.changes import changes, reloaded
from criserver.errors import CriError
from criserver.images import RegistrySettings
from criserver.runtime.features import probe_all
from criserver.runtime.node import Node
from criserver.runtime.runtime_choice import runtime_of
from criserver.runtime.service_manager import notify
from snapshotter import LayerLimits

if TYPE_CHECKING:
    from criserver.telemetry.trace_export import TraceExport

log = structlog.get_logger(__name__)


async def reload_at(hangup: asyncio.Event, reloads: Reloads) -> None:
    """Reload each time that ``hangup`` is set, until this is cancelled."""
    while True:
        await hangup.wait()
        hangup.clear()
        await reloads.reload()


class Reloads:
    """The reloads of a daemon. ``settings`` are those that it has begun with, ``path`` is the configuration file."""

    def __init__(self, node: Node, settings: Settings, path: str, tracing: TraceExport | None = None) -> None:
        self._node = node
        self._tracing = tracing
        self._settings = settings
        self._path = path

    async def reload(self) -> None:
        """Take over the configuration, and log each key that differs. A wrong configuration is logged and not used."""
        notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            given = await asyncio.to_thread(read, self._path, optional=True)
            config_of(given)
            await self._take_over(given)
        except CriError as e:
            log.error(  # noqa: TRY400 - the words say all
                "the configuration is not reloaded; the daemon goes on with the last one", error=str(e)
            )
        finally:
            notify("READY=1")

    async def _take_over(self, new_settings: Settings) -> None:
        settings = reloaded(self._settings, new_settings)
        found = list(changes(self._settings, new_settings))
        node = self._node
        # A link on the way to these directories may lead elsewhere by now.
        config = replace(config_of(settings), root=node.config.root, state=node.config.state)
        new = [handler for name, handler in config.runtimes.items() if node.config.runtimes.get(name) != handler]
        runtimes = [runtime_of(handler, config.state) for handler in new]
        node.features = {**node.features, **await probe_all(runtimes, node.snapshotter)}
        node.config = config
        node.images.configure(RegistrySettings.of(config))
        node.images.pin_matching(config.pinned_images)
        node.network.configure(bin_dirs=config.cni_bin_dirs, timeout=config.cni_timeout)
        node.snapshotter.limits = LayerLimits(**asdict(config.images))
        logs.set_level(config.log_level)
        if self._tracing is not None:
            self._tracing.configure(config.tracing_rate)
        self._settings = settings
        for change in found:
            words = "configuration changed" if change.reloaded else "a configuration change waits for a restart"
            log.info(words, key=dotted(change.key), old=change.old, new=change.new, file=change.file)
        log.info("configuration reloaded", changed=sum(change.reloaded for change in found))
