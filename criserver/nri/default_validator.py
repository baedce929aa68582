"""The default validator: what an operator forbids to all plugins, and the plugins that a container needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from criserver.errors import FailedPreconditionError, InvalidArgumentError, PermissionDeniedError
from criserver.nri.ownership import Field, removed
from criserver.pb.nri.v1alpha1 import api_pb2 as nri
from criserver.text import quoted

REQUIRED_PLUGINS = "required-plugins.noderesource.dev"

# The words for yes and no in an annotation: those that Go's strconv.ParseBool takes.
_YES = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_NO = frozenset({"0", "f", "F", "FALSE", "false", "False"})


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
    name = f"{request.pod.namespace}/{request.pod.name}/{request.container.name}"
    for switch, what, plugins in _forbidden(settings, request):
        raise PermissionDeniedError(
            f"container {name}: NRI plugins may not adjust {what} ({switch}): {', '.join(plugins)} did"
        )
    missing = _missing_plugins(settings, request)
    if missing:
        raise FailedPreconditionError(f"container {name} needs NRI plugins that are not there: {', '.join(missing)}")


def _forbidden(
    settings: ValidatorSettings, request: nri.ValidateContainerAdjustmentRequest
) -> Iterator[tuple[str, str, list[str]]]:
    """What the settings forbid of the adjustment: the switch, the field, and the plugins that did it."""
    linux, owners = request.adjust.linux, request.owners.owners.get(request.container.id, nri.FieldOwners())
    hooks = owners.simple.get(Field.OciHooks, "")
    if hooks and settings.reject_oci_hook_adjustment:
        yield "reject_oci_hook_adjustment", "OCI hooks", hooks.split(",")
    seccomp = owners.simple.get(Field.SeccompPolicy, "")
    switch = _seccomp_switch(request.container.linux)
    if seccomp and getattr(settings, switch):
        yield switch, "the seccomp policy", [seccomp]
    if linux.namespaces and settings.reject_namespace_adjustment:
        yield "reject_namespace_adjustment", "namespaces", _names(owners, Field.Namespace)
    if linux.sysctl and settings.reject_sysctl_adjustment:
        yield "reject_sysctl_adjustment", "sysctls", _names(owners, Field.Sysctl)


def _seccomp_switch(linux: nri.LinuxContainer) -> str:
    """The switch for the profile that the pod has without plugins."""
    kind = linux.seccomp_profile.profile_type
    if not linux.HasField("seccomp_profile") or kind == nri.SecurityProfile.UNCONFINED:
        return "reject_unconfined_seccomp_adjustment"
    if kind == nri.SecurityProfile.LOCALHOST:
        return "reject_custom_seccomp_adjustment"
    return "reject_runtime_default_seccomp_adjustment"


def _names(owners: nri.FieldOwners, field: nri.Field) -> list[str]:
    """The plugins that have adjusted a key of the field. To remove what no plugin has set leaves no owner."""
    plugins = owners.compound[field].owners.values() if field in owners.compound else ()
    return sorted({removed(plugin) or plugin for plugin in plugins}) or ["a plugin that removes one"]


def _missing_plugins(settings: ValidatorSettings, request: nri.ValidateContainerAdjustmentRequest) -> list[str]:
    """The required plugins that have not seen the container. A plugin is named with its index or without."""
    pod, container = request.pod, request.container.name
    if settings.tolerate_missing_plugins_annotation:
        key, value = _annotation(pod, settings.tolerate_missing_plugins_annotation, container)
        if value is not None and value not in _YES | _NO:
            raise InvalidArgumentError(f"annotation {key}: {quoted(value)} is neither true nor false")
        if value in _YES:
            return []
    required = [*settings.required_plugins, *_asked_plugins(pod, container)]
    present = {name for one in request.plugins for name in (one.name, f"{one.index}-{one.name}")}
    return [name for name in dict.fromkeys(required) if name not in present]


def _asked_plugins(pod: nri.PodSandbox, container: str) -> list[str]:
    """The plugins that the pod requires itself: a list of YAML or JSON."""
    key, value = _annotation(pod, REQUIRED_PLUGINS, container)
    if value is None:
        return []
    import yaml  # for the few pods with the annotation

    try:
        listed = yaml.safe_load(value)
    except (yaml.YAMLError, RecursionError, ValueError) as e:
        raise InvalidArgumentError(f"annotation {key}: {quoted(value)} is no list of plugins: {e}") from e
    if listed is None:
        return []
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise InvalidArgumentError(f'annotation {key}: {quoted(value)} is no list of plugins, such as ["one"]')
    return listed


def _annotation(pod: nri.PodSandbox, name: str, container: str) -> tuple[str, str | None]:
    """The annotation for a container, with its key: its own is before the pod's. None without one."""
    for key in (f"{name}/container.{container}", f"{name}/pod", name):
        if key in pod.annotations:
            return key, pod.annotations[key]
    return name, None
