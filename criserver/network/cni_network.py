"""Attaches pods to the node's CNI network, and detaches them (CNI specification 1.1, section 3).

runtime/ plans an attachment, records it, adds it and records the outcome. A recorded attachment has everything that DEL
needs. So it can be undone after a crash at any line, and after any change of the configuration.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import structlog

from criserver.errors import CriError, DeadlineExceededError, FailedPreconditionError, UnavailableError
from criserver.network import cni_plugin
from criserver.network.attachment import Attachment
from criserver.network.cni_config import CniConfigDirectory, NetworkConfig
from criserver.network.cni_result import CniResult, decode, excerpt, parse
from criserver.network.namespace_calls import is_pinned
from criserver.network.pod_network import PodNetwork
from criserver.telemetry import operations
from snapshotter.tasks import outlive

# Seconds for the plugins' answers to the kubelet's Status call: the kubelet's node status waits for them.
_PROBE_TIMEOUT = 5.0

# Error codes of the specification, section 5.
_UNKNOWN_CONTAINER = 3
_ERRORS: Mapping[int, type[CriError]] = {
    0: UnavailableError,  # none: it was killed, or it crashed
    1: FailedPreconditionError,  # incompatible CNI version
    2: FailedPreconditionError,  # unsupported field
    7: FailedPreconditionError,  # invalid network configuration
    11: UnavailableError,  # try again later
    50: UnavailableError,  # plugin not available
    51: UnavailableError,  # not available, and existing pods may suffer
}

_log = structlog.get_logger()


class Network:
    """The network in the node's CNI configuration.

    Plugins are searched in ``bin_dirs``, in this order. One plugin may take ``timeout`` seconds.
    """

    def __init__(self, *, conf_dir: str, bin_dirs: Sequence[str], timeout: float = 60.0) -> None:
        self._conf_dir = conf_dir
        self._directories = {conf_dir: CniConfigDirectory(conf_dir)}
        self.configure(bin_dirs=bin_dirs, timeout=timeout)
        # By plugin path: the file's identity, and the versions that the plugin supports (None if it tells none).
        self._versions: dict[str, tuple[tuple[int, int, int], frozenset[str] | None]] = {}
        self._undoing: set[asyncio.Task[None]] = set()

    def configure(self, *, bin_dirs: Sequence[str], timeout: float) -> None:
        """Take over settings for the plugins that are started from now on."""
        self._bin_dirs = tuple(bin_dirs)
        self._timeout = timeout

    def config(self, conf_dir: str = "") -> NetworkConfig:
        """The network of the node now, or that of another directory. Raises FailedPreconditionError without one."""
        conf_dir = conf_dir or self._conf_dir
        if conf_dir not in self._directories:
            self._directories[conf_dir] = CniConfigDirectory(conf_dir)
        return self._directories[conf_dir].current()

    async def ready(self) -> str | None:
        """None if pods can be attached, otherwise the reason for the node's status."""
        try:
            config = self.config()
            for plugin in config.plugins:
                await self._check_version(config, plugin)
            if config.has_version("1.1.0"):
                for plugin in config.plugins:
                    await self._call("STATUS", config, plugin)
        except (CriError, OSError) as e:
            return str(e)
        return None

    def attach_plan(self, pod: PodNetwork, conf_dir: str = "") -> Attachment:
        """The attachment for :meth:`add`, to the network of ``conf_dir``, or of the node. This call changes nothing.

        Raises FailedPreconditionError without a network or one of its plugins, and InvalidArgumentError for a pod whose
        values cannot be passed to the plugins.
        """
        config = self.config(conf_dir)
        for plugin in config.plugins:
            self._find(config, plugin)
        declared = {name for plugin in config.plugins for name in plugin.get("capabilities", {})}
        return Attachment(
            network=config,
            container_id=pod.sandbox_id,
            netns=pod.netns,
            ifname=pod.ifname,
            args=pod.cni_args(),
            capabilities={k: v for k, v in pod.capability_args().items() if k in declared},
        )

    async def add(self, attachment: Attachment, left: Callable[[Attachment], object] = lambda _: None) -> Attachment:
        """Run ADD of all plugins, and return the attachment with its result.

        Raises UnavailableError where a plugin asks to try later, DeadlineExceededError, FailedPreconditionError or
        CriError. When it raises, also when it is cancelled:

        1. DEL of the plugins whose ADD has begun has run. A failed DEL is logged.
        2. ``left`` was called with the attachment that is still to be given to :meth:`delete`. It has only the plugins
           whose DEL has failed.
        3. A plugin that refused ADD is not among them if it refuses DEL too: it may refuse it for ever, as where its
           configuration has a mistake. It is among them if it may succeed later.
        """
        result: CniResult | None = None
        begun: list[Mapping[str, Any]] = []
        refused = False
        try:
            for plugin in attachment.network.plugins:
                begun.append(plugin)
                try:
                    output = await self._call("ADD", attachment.network, plugin, attachment, result)
                except CriError as e:
                    refused = not isinstance(e, DeadlineExceededError)
                    raise
                result = _parse_result(output, attachment, plugin)
            _require_address(attachment, result)
        except BaseException:
            # A task of its own: a second cancellation must not stop the clean-up in the middle.
            undo = asyncio.create_task(self._undo(replace(attachment, result=result), begun, refused, left))
            self._undoing.add(undo)
            undo.add_done_callback(self._undoing.discard)
            await outlive(undo)
            raise
        return replace(attachment, result=result)

    async def delete(self, attachment: Attachment) -> None:
        """Run DEL of all plugins, in reverse order. It is allowed for an attachment whose ADD may not have ended.

        1. Does nothing where nothing is left.
        2. A plugin that fails is run again with the present configuration of the network, if that is another one: it
           may have been repaired.
        3. It stops at the first plugin that fails, and raises as :meth:`add` does: an address must not be given to
           another pod while rules of another plugin still lead to it. Call it again then.
        """
        for plugin in reversed(attachment.network.plugins):
            await self._delete_from(plugin, attachment)

    async def delete_by_force(self, attachment: Attachment) -> list[str]:
        """As :meth:`delete`, and goes on after a plugin that fails. Returns the failures, in words."""
        failures = []
        for plugin in reversed(attachment.network.plugins):
            try:
                await self._delete_from(plugin, attachment)
            except (CriError, OSError) as e:
                failures.append(str(e))
        return failures

    async def check(self, attachment: Attachment) -> None:
        """Run CHECK of all plugins. Does nothing where the network's version has no CHECK, or its file disables it.

        Raises FailedPreconditionError for an attachment that was not added, and as :meth:`add` does where a plugin
        finds an error.
        """
        if attachment.result is None:
            raise FailedPreconditionError(f"sandbox {attachment.container_id} is not attached to a network")
        if attachment.network.disable_check or not attachment.network.has_version("0.4.0"):
            return
        for plugin in attachment.network.plugins:
            await self._call("CHECK", attachment.network, plugin, attachment, attachment.result)

    async def _undo(
        self,
        attachment: Attachment,
        begun: Sequence[Mapping[str, Any]],
        refused: bool,
        left: Callable[[Attachment], object],
    ) -> None:
        """Run DEL after a failed ADD. ``refused`` says that the last one of the plugins ``begun`` refused ADD."""
        owed: list[Mapping[str, Any]] = []
        for plugin in reversed(begun):
            try:
                await self._delete_from(plugin, attachment)
            except Exception as e:  # noqa: BLE001 - DEL of the other plugins must run too
                _log.exception("CNI DEL after a failed ADD", sandbox=attachment.container_id, error=str(e))
                for_ever = isinstance(e, CriError) and not isinstance(e, DeadlineExceededError | UnavailableError)
                if not (refused and plugin is begun[-1] and for_ever):
                    owed.insert(0, plugin)
        left(replace(attachment, network=replace(attachment.network, plugins=tuple(owed))))

    async def _delete_from(self, plugin: Mapping[str, Any], attachment: Attachment) -> None:
        try:
            await self._delete_as(plugin, attachment)
        except CriError as e:
            present = self._present(plugin, attachment.network)
            if present is None:
                raise
            try:
                await self._delete_as(present, attachment)
            except CriError as again:
                raise type(e)(f"{e}; and with the present configuration of the network: {again}") from e
            _log.warning("CNI DEL needed the present configuration", sandbox=attachment.container_id, error=str(e))

    def _present(self, plugin: Mapping[str, Any], recorded: NetworkConfig) -> Mapping[str, Any] | None:
        """A plugin as the network's configuration has it now; None if it is not another one, or cannot be told.

        A plugin is known by its type. If its type is not installed (a misspelt one), it is known by its place.
        """
        try:
            # A handler may have a directory of its own.
            now = self.config(os.path.dirname(recorded.source))
        except CriError:
            return None
        if now.name != recorded.name:
            return None
        found = [other for other in now.plugins if other["type"] == plugin["type"]]
        if not found and self._program(plugin) is None and len(now.plugins) == len(recorded.plugins):
            found = [now.plugins[recorded.plugins.index(plugin)]]
        return found[0] if len(found) == 1 and found[0] != plugin else None

    async def _delete_as(self, plugin: Mapping[str, Any], attachment: Attachment) -> None:
        # An empty CNI_NETNS means "already gone". For some plugins a path that does not exist is an error.
        netns = attachment.netns if is_pinned(attachment.netns) else ""
        prev = attachment.result if attachment.network.has_version("0.4.0") else None
        await self._call("DEL", attachment.network, plugin, replace(attachment, netns=netns), prev)

    async def _call(
        self,
        verb: str,
        config: NetworkConfig,
        plugin: Mapping[str, Any],
        attachment: Attachment | None = None,
        prev: CniResult | None = None,
    ) -> bytes:
        """Run ``verb`` of a plugin and return its output. Raises the error class for the plugin's error code."""
        path = self._find(config, plugin)
        run_name = f"CNI plugin {plugin['type']} ({verb}, network {config.name})"
        env = {
            "PATH": os.environ.get("PATH", os.defpath),
            "CNI_COMMAND": verb,
            "CNI_PATH": ":".join(self._bin_dirs),
        }
        if attachment is not None:
            env["CNI_CONTAINERID"] = attachment.container_id
            env["CNI_NETNS"] = attachment.netns
            env["CNI_IFNAME"] = attachment.ifname
            env["CNI_ARGS"] = attachment.args
        with operations.CNI.timed(plugin["type"], verb) as timed:
            reply = await cni_plugin.run(
                path,
                run_name=run_name,
                env=env,
                request=_request(config, plugin, attachment, prev),
                timeout=min(self._timeout, _PROBE_TIMEOUT) if attachment is None else self._timeout,
            )
            _log.debug(
                "CNI plugin done",
                plugin=plugin["type"],
                verb=verb,
                network=config.name,
                code=reply.returncode,
                stderr=excerpt(reply.stderr),
                seconds=timed.elapsed(),
            )
            if reply.returncode == 0:
                return reply.stdout
            code, message = cni_plugin.failure(reply)
            if verb == "DEL" and code == _UNKNOWN_CONTAINER:
                return b""
            raise _ERRORS.get(code, CriError)(f"{run_name}: {message}")

    def _program(self, plugin: Mapping[str, Any]) -> str | None:
        for directory in self._bin_dirs:
            path = os.path.join(directory, plugin["type"])
            if os.path.isfile(path) and os.access(path, os.X_OK):
                return path
        return None

    def _find(self, config: NetworkConfig, plugin: Mapping[str, Any]) -> str:
        path = self._program(plugin)
        if path is not None:
            return path
        raise FailedPreconditionError(
            f"CNI plugin {plugin['type']} of network {config.name} ({config.source}) is not in "
            f"{', '.join(self._bin_dirs)}: install it there, or name its directory in the daemon's [cni] bin_dirs"
        )

    async def _check_version(self, config: NetworkConfig, plugin: Mapping[str, Any]) -> None:
        """Raises FailedPreconditionError if the plugin does not support the network's version."""
        path = self._find(config, plugin)
        stat = os.stat(path)
        identity = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._versions.get(path, (None,))[0] != identity:
            self._versions[path] = (identity, await self._ask_versions(config, plugin))
        versions = self._versions[path][1]
        if versions is not None and config.cni_version not in versions:
            raise FailedPreconditionError(
                f"CNI plugin {path} does not support cniVersion {config.cni_version} of network {config.name} "
                f"({config.source}), but {', '.join(sorted(versions))}: upgrade it, or lower cniVersion"
            )

    async def _ask_versions(self, config: NetworkConfig, plugin: Mapping[str, Any]) -> frozenset[str] | None:
        """The versions that the plugin supports; None where it has no VERSION, as some scripts."""
        try:
            versions = decode(await self._call("VERSION", config, plugin)).get("supportedVersions")
        except CriError as e:
            _log.warning("CNI plugin does not tell its versions", error=str(e))
            return None
        return frozenset(v for v in versions if isinstance(v, str)) if isinstance(versions, list) else None


def _request(
    config: NetworkConfig, plugin: Mapping[str, Any], attachment: Attachment | None, prev: CniResult | None
) -> bytes:
    """The plugin's standard input (section 3, "Deriving request configuration from plugin configuration")."""
    request = {key: value for key, value in plugin.items() if key != "capabilities"}
    request |= {"name": config.name, "cniVersion": config.cni_version}
    if attachment is not None:
        enabled = [name for name, on in plugin.get("capabilities", {}).items() if on]
        runtime = {name: attachment.capabilities[name] for name in enabled if name in attachment.capabilities}
        if runtime:
            request["runtimeConfig"] = runtime
    if prev is not None:
        request["prevResult"] = prev.raw
    return json.dumps(request).encode()


def _require_address(attachment: Attachment, result: CniResult | None) -> None:
    if result is None or not result.ips:
        raise CriError(
            f"CNI network {attachment.network.name} gave interface {attachment.ifname} of sandbox "
            f"{attachment.container_id} no address; see the ipam section of {attachment.network.source}"
        )


def _parse_result(output: bytes, attachment: Attachment, plugin: Mapping[str, Any]) -> CniResult:
    config = attachment.network
    try:
        return parse(decode(output), ifname=attachment.ifname, version=config.cni_version)
    except CriError as e:
        raise CriError(f"CNI plugin {plugin['type']} (ADD, network {config.name}) printed no result: {e}") from e
