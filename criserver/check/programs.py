"""The programs that run containers: the OCI runtimes of the handlers, and the program that holds PID namespaces."""

from __future__ import annotations

import os
from collections.abc import Iterator

from criserver.check import advisories
from criserver.check.examined_node import ExaminedNode
from criserver.check.finding import Finding, missing, ok, warning
from criserver.config import Config, RuntimeHandler
from criserver.runtime.shim_v2 import program_name

_OLDEST_RUNC = advisories.version("1.1")


def check(host: ExaminedNode, config: Config) -> Iterator[Finding]:
    """Each runtime handler, and the infra program."""
    for runtime in config.runtimes.values():
        yield from _handler(host, runtime, default=runtime.name == config.default_runtime)
    if os.access(host.path(config.infra), os.X_OK):
        yield ok(f"{config.infra} holds shared PID namespaces")
    else:
        # A handler that runs sandbox containers runs it in each pod.
        grave = missing if config.runtimes[config.default_runtime].sandbox == "container" else warning
        yield grave(
            f"{config.infra} is not an executable: pods that share a PID namespace cannot run",
            "install catatonit (apt-get install catatonit), or name it as infra below [runtime]",
        )


def _handler(host: ExaminedNode, runtime: RuntimeHandler, *, default: bool) -> Iterator[Finding]:
    # Only pods whose RuntimeClass names another handler need that handler.
    grave = missing if default else warning
    what = f"runtime handler {runtime.name}"
    name = program_name(runtime.shim) if runtime.shim else runtime.path
    path = host.which(name)
    if path is None:
        package = "the runtime that it belongs to" if runtime.shim else f"it (apt-get install {os.path.basename(name)})"
        key = "shim" if runtime.shim else "path"
        yield grave(
            f"{what}: the program {name} is not there",
            f"install {package}, or change {key} below [runtimes.{runtime.name}]",
        )
        return
    if runtime.shim:
        yield ok(f"{what}: {path}, a shim of containerd's kind")
        return
    told = host.version(path)
    if told is None:
        yield grave(f"{what}: {path} --version fails", "install it again; it may be built for another kind of machine")
        return
    if (found := advisories.parse(told)) and found[0] == "runc" and found[1] < _OLDEST_RUNC:
        yield grave(f"{what}: {told} is too old", "install runc 1.1 or newer")
        return
    features = host.features(runtime)
    if features is None:
        yield warning(
            f"{what}: {path}, {told}; it does not report its features, so pods cannot have user namespaces or "
            "recursive read-only mounts with it",
            "install a newer version if pods need these",
        )
    else:
        yield ok(f"{what}: {path}, {told}{'; it has ' if features else ''}{', '.join(features)}")
    for advisory in advisories.of(told):
        yield warning(f"{what}: {told} may have {', '.join(advisory.ids)}: {advisory.words}", advisory.advice)
