"""Options that a container requests and this node does not have: they are accepted, and have no effect.

docs/cri-fields.md has the table of all that a node may lack, with the reason for each decision.
"""

from __future__ import annotations

from collections.abc import Iterable

import structlog

from criserver.model import ContainerConfig
from criserver.oci.capabilities import lacking
from criserver.oci.spec_resources import unenforced
from criserver.runtime import host, selinux

log = structlog.get_logger(__name__)

_EVENTS = {
    "selinux_options": "selinux_options have no effect: this node has no policy",
    "capabilities": "capabilities have no effect: the kernel or the daemon does not have them",
    "hugepage_limits": "hugepage_limits have no effect: this node cannot limit pages of this size",
    "memory_swap_limit_in_bytes": "memory_swap_limit_in_bytes has no effect: this node does not count swap",
}


def ignored(config: ContainerConfig) -> dict[str, str]:
    """The options that a container requests and that have no effect on this node, by the names of their CRI fields."""
    facts = host.facts()
    options = {
        "selinux_options": selinux.ignored(config.security),
        "capabilities": ", ".join(lacking(config, facts)),
        **unenforced(config.resources, facts),
    }
    return {field: text for field, text in options.items() if text}


def log_ignored(config: ContainerConfig, others: Iterable[ContainerConfig], sandbox_id: str) -> None:
    """Log the options that have no effect, each once a pod: ``others`` are the pod's earlier containers."""
    options = ignored(config)
    if not options:
        return
    known = {field for other in others for field in ignored(other)}
    for field, text in options.items():
        if field not in known:
            log.warning(_EVENTS[field], sandbox=sandbox_id, options=text)
