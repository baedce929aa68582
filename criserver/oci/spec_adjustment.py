"""An adjustment of an OCI spec that plugins of the node ask for (NRI), and how it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from criserver.oci.cdi import CdiCatalog
from criserver.oci.spec_inputs import HostFacts, Spec


@dataclass(frozen=True, slots=True)
class SpecAdjustment:
    """Changes of a spec, in the shapes of the OCI runtime specification. A value of None removes what has the key.

    ``owners``: the plugin that asked, by (NAME of the NRI field, key or ""), for errors.
    """

    annotations: Mapping[str, str | None] = field(default_factory=dict)
    cdi_devices: tuple[str, ...] = ()
    owners: Mapping[tuple[str, str], str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RuntimeFacts:
    """What an OCI runtime can do of what an adjustment may ask (runtime specification, features.md)."""


def runtime_facts(features: Mapping[str, Any] | None) -> RuntimeFacts:
    """The facts of what a runtime reports; None for a runtime that does not report."""
    raise NotImplementedError


def adjust(
    spec: Spec, adjustment: SpecAdjustment, host: HostFacts, runtime: RuntimeFacts, catalog: CdiCatalog | None = None
) -> Spec:
    """A copy of ``spec`` with the adjustment. ``catalog`` is needed where it has CDI devices (``cdi.load``).

    Raises FailedPreconditionError, with the plugin's name, for what this node or its OCI runtime cannot give.
    """
    raise NotImplementedError
