"""How plugins of the node adjust the OCI spec of a container in its bundle."""

from __future__ import annotations

import asyncio
import dataclasses

from criserver.oci import cdi, spec_adjustment
from criserver.oci.adjustment_faults import cgroups_parent
from criserver.oci.spec_inputs import Spec
from criserver.runtime import host
from criserver.runtime.container_update import with_resources
from criserver.runtime.node import Node
from criserver.runtime.node_plugins import Adjusted
from criserver.runtime.records import Container, Sandbox
from criserver.runtime.spec_file import write_spec


async def adjust(node: Node, sandbox: Sandbox, container: Container, document: Spec, adjusted: Adjusted) -> Container:
    """Change the spec of a container as plugins ask for, and its record, which a status shows.

    Raises FailedPreconditionError for what this node or its OCI runtime cannot give, with the plugin's name.
    """
    if adjusted.spec.cdi_devices:
        node.cdi = await asyncio.to_thread(cdi.load, node.config.cdi_dirs, node.cdi)
    facts = node.features[sandbox.runtime].facts
    changed = spec_adjustment.adjust(document, adjusted.spec, host.facts(), facts, node.cdi)
    if changed != document:
        await asyncio.to_thread(write_spec, node, container.id, changed)
    container = with_resources(container, sandbox.config, adjusted.resources)
    if not adjusted.spec.cgroups_path:
        return container
    return dataclasses.replace(container, cgroup_parent=cgroups_parent(adjusted.spec.cgroups_path))
