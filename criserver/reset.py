"""Removing all pods of a node without a daemon, for `criserver reset` and for the removal of the package.

A reset begins with recovery, as the daemon does, so it can start from any state that the last daemon left. A kubelet
cannot make new pods meanwhile, because nobody serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import structlog

from criserver.config import Config
from criserver.daemon import assemble, watch_children
from criserver.errors import CriError, NotFoundError, told_in_words
from criserver.own_directories import DATABASE, OF_THE_DISK, ROOT, STATE, Kind, foreign, hold, is_ours
from criserver.runtime import cgroups, service_manager
from criserver.runtime.container_stop import stop_container
from criserver.runtime.features import Features
from criserver.runtime.lifecycle import ContainerState
from criserver.runtime.node import Node
from criserver.runtime.records import Sandbox
from criserver.runtime.recovery import entries, recover
from criserver.runtime.sandbox_remove import remove_sandbox_by_force
from criserver.store import Store
from snapshotter import Snapshotter, mounts, removal

log = structlog.get_logger(__name__)

_ADVICE = "stop it first: `systemctl stop criserver`, or end that process"
# Pods that are removed at the same time. Each runs network plugins.
_AT_ONCE = 16
# How often a reset looks for things that are left, and the seconds between. A shim that could not write an exit code to
# a full disk checks only once a second whether it still has to.
_LOOKS = 20
_PAUSE = 0.1


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a reset: ``failures`` must be cleaned up elsewhere, ``left`` is still on this node."""

    pods: int
    containers: int
    failures: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def run(config: Config, *, grace: float, everything: bool, agreed: Callable[[int, int], bool]) -> Outcome | None:
    """Stop and remove all pods, then the state directory; with ``everything`` also images and records.

    1. ``agreed`` is called first, with the numbers of pods and containers. If it returns False, nothing is done and
       the result is None.
    2. Each container gets its stop signal and ``grace`` seconds.
    3. A network plugin that fails does not keep its pod from being removed.
    4. A record that cannot be read is deleted. Its pod or container is cleared like one without a record.
    5. Only what criserver has made is deleted. Other files in the directories stay, and the outcome names them.

    Raises FailedPreconditionError while a daemon runs and if one of the directories is not ours, and CriError if the
    database cannot be read.
    """
    watch_children()
    return asyncio.run(_reset(config, grace, everything, agreed))


async def _reset(config: Config, grace: float, everything: bool, agreed: Callable[[int, int], bool]) -> Outcome | None:
    directories = ((config.root, ROOT), (config.state, STATE))
    if not any(os.path.isdir(directory) and is_ours(directory, kind) for directory, kind in directories):
        # No daemon has used this configuration, so there are no pods of it.
        reasons = [foreign(directory, kind, config.grpc_address) for directory, kind in directories]
        return Outcome(0, 0, tuple(f"{words}; nothing was deleted there" for words in reasons if words))
    with contextlib.ExitStack() as held:
        for directory, kind in directories:
            held.callback(os.close, hold(directory, kind, config.grpc_address, _ADVICE))
        with told_in_words("the node cannot be reset"):
            outcome = await _take_down(config, grace, agreed)
        if outcome is not None and not outcome.left:
            deleted = [await asyncio.to_thread(_delete, config.state, STATE, _sockets(config))]
            if everything:
                deleted.append(await asyncio.to_thread(_delete, config.root, ROOT, ()))
            kept = tuple(words for foreign_names, _ in deleted for words in foreign_names)
            left = tuple(words for _, undeleted in deleted for words in undeleted)
            outcome = dataclasses.replace(outcome, failures=(*outcome.failures, *kept), left=left)
    return outcome


async def _take_down(config: Config, grace: float, agreed: Callable[[int, int], bool]) -> Outcome | None:
    # A reset serves no streams, so a missing certificate must not prevent it.
    config = dataclasses.replace(config, streaming=dataclasses.replace(config.streaming, tls_cert="", tls_key=""))
    store = Store(os.path.join(config.root, DATABASE), os.path.join(config.state, "records"))
    try:
        snapshotter = Snapshotter(os.path.join(config.root, "snapshots"))
        node = assemble(config, store, snapshotter, dict.fromkeys(config.runtimes, Features()), skip_unreadable=True)
        try:
            unread = Counter(table for table, _ in node.records.unreadable)
            pods = len(node.records.sandboxes) + unread["sandboxes"]
            containers = len(node.records.containers) + unread["containers"]
            if not agreed(pods, containers):
                return None
            found = {*entries(config.state, "ns"), *entries(config.state, "sandboxes")}
            unrecorded = found - node.records.sandboxes.keys()
            await recover(node, end_living=True)
            running = [c.id for c in node.records.containers.values() if c.state is ContainerState.RUNNING]
            # A container that does not end here is stopped again below, with its pod.
            await asyncio.gather(*(stop_container(node, c, grace) for c in running), return_exceptions=True)
            turn = asyncio.Semaphore(_AT_ONCE)
            told = await asyncio.gather(*(_remove(node, s, turn) for s in list(node.records.sandboxes.values())))
            await node.settle()
            unread_words = [
                words if table == "containers" else f"{words}; its network plugins did not clean up"
                for (table, _), words in node.records.unreadable.items()
            ]
            await node.records.delete_unreadable()
            for pod in unrecorded:
                try:
                    await cgroups.remove_pod(cgroups.own_parent(config.cgroup_driver, pod))
                except CriError as e:
                    told.append((True, str(e)))
            if config.cgroup_driver == "systemd" and (own := cgroups.own_slice()):
                await service_manager.stop_unit(own)
        finally:
            for process in node.processes.values():
                process.shim.abandon()
            node.stats.close()
            snapshotter.close()
    finally:
        store.close()
    left = [words for fatal, words in filter(None, told) if fatal]
    failures = [*unread_words, *(words for fatal, words in filter(None, told) if not fatal)]
    for _ in range(_LOOKS):
        if not (there := tuple(_left(config))):
            break
        await asyncio.sleep(_PAUSE)
    return Outcome(pods, containers, tuple(failures), (*left, *there))


async def _remove(node: Node, sandbox: Sandbox, turn: asyncio.Semaphore) -> tuple[bool, str] | None:
    """Remove one pod. Returns None, or whether the pod is still there and the reason."""
    name = f"pod {sandbox.config.namespace}/{sandbox.config.name} ({sandbox.id})"
    async with turn:
        try:
            left = await remove_sandbox_by_force(node, sandbox.id)
        except NotFoundError:
            return None  # its recovery has removed it
        except (CriError, OSError) as e:
            return True, f"{name}: {e}"
    return (False, f"{name}: its network plugins did not clean up: {'; '.join(left)}") if left else None


def _left(config: Config) -> Iterator[str]:
    """Mounts and shims of pods that are still on this node, whatever the records say."""
    for directory, kind in ((config.state, STATE), (config.root, ROOT)):
        ours = tuple(os.path.join(directory, name, "") for name in kind.names)
        for point in mounts.mounts_below(directory):
            if f"{point}/".startswith(ours):
                yield f"mount {point}"
    below = os.path.join(config.state, "containers", "")
    for name in os.listdir("/proc"):
        try:
            if name.isdecimal() and os.readlink(f"/proc/{name}/cwd").startswith(below):
                yield f"process {name}, a shim"
        except OSError:
            continue  # it has ended


def _sockets(config: Config) -> list[str]:
    """The sockets that a daemon which was killed may have left: its own, and others in its state directory."""
    others = (config.containerd_address, config.metrics_address.removeprefix("unix://"))
    below = os.path.join(config.state, "")
    paths = (os.path.normpath(path) for path in others if os.path.isabs(path))
    return [config.grpc_address, *(path for path in paths if _place(path).startswith(below))]


def _place(path: str) -> str:
    """The path of a file that may be a link itself, with its directory's real path."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def _delete(directory: str, kind: Kind, sockets: Iterable[str]) -> tuple[list[str], list[str]]:
    """Delete what we have made in a directory, and the directory itself if it is empty then and no mount point.

    Returns what is not ours and stays, and what cannot be deleted, both in words.
    """
    left = []
    for path in (*(os.path.join(directory, name) for name in kind.names), *sockets):
        try:
            removal.remove_path(path)
        except OSError as e:
            left.append(f"{path}, which cannot be deleted: {e}")
    if left:
        return [], left
    kept = [name for name in sorted(os.listdir(directory)) if name not in (kind.marker, OF_THE_DISK)]
    if kept:
        # With its marker, so that a later daemon can use it.
        return [f"{os.path.join(directory, name)} stays: criserver did not make it" for name in kept], []
    removal.remove_path(os.path.join(directory, kind.marker))
    try:
        os.rmdir(directory)
    except OSError as e:
        log.debug("the directory stays", path=directory, error=str(e))
    return [], []
