"""The default validator: what an operator forbids to all plugins, and the plugins that a container needs."""

from __future__ import annotations

from dataclasses import dataclass

from criserver.pb.nri.v1alpha1 import api_pb2 as nri


@dataclass(frozen=True, slots=True)
class ValidatorSettings:
    """The switches, by the names that NRI's own default validator has in a TOML file."""

    reject_oci_hook_adjustment: bool = False
    reject_runtime_default_seccomp_adjustment: bool = False
    reject_unconfined_seccomp_adjustment: bool = False
    reject_custom_seccomp_adjustment: bool = False
    reject_namespace_adjustment: bool = False
    reject_sysctl_adjustment: bool = False
    required_plugins: tuple[str, ...] = ()
    tolerate_missing_plugins_annotation: str = ""


def validate(settings: ValidatorSettings, request: nri.ValidateContainerAdjustmentRequest) -> None:
    """Raises PermissionDeniedError for what the settings forbid, FailedPreconditionError for a missing plugin.

    Raises InvalidArgumentError for an annotation that cannot be read.
    """
    raise NotImplementedError
