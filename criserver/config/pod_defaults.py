"""What the node gives to all pods and containers: the keys of [runtime] for which CRI has no field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from criserver.config.settings import Settings
from criserver.errors import InvalidArgumentError

# RLIM_INFINITY (getrlimit(2)), which a file writes as -1.
_UNLIMITED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class PodDefaults:
    """default.toml explains each field.

    ``ulimits``: the soft and the hard limit by the name of runtime-spec, such as RLIMIT_NOFILE. ``mounts``: pairs of a
    path of the node and a path of the container. ``shm_size`` is in bytes.
    """

    ulimits: Mapping[str, tuple[int, int]]
    sysctls: Mapping[str, str]
    env: tuple[str, ...]
    mounts: tuple[tuple[str, str], ...]
    hooks_dir: tuple[str, ...]
    shm_size: int
    device_ownership_from_security_context: bool
    ignore_image_defined_volumes: bool


def pod_defaults(settings: Settings) -> PodDefaults:
    """The values of the keys. Raises InvalidArgumentError for a soft limit above the hard one."""
    table = settings.tables["runtime"]
    return PodDefaults(
        ulimits=dict(_ulimit(settings, text) for text in table["default_ulimits"]),
        sysctls=dict(_pair(text, "=") for text in table["default_sysctls"]),
        env=tuple(table["default_env"]),
        mounts=tuple(_pair(text, ":") for text in table["default_mounts"]),
        hooks_dir=tuple(table["hooks_dir"]),
        shm_size=table["shm_size"],
        device_ownership_from_security_context=table["device_ownership_from_security_context"],
        ignore_image_defined_volumes=table["ignore_image_defined_volumes"],
    )


def _ulimit(settings: Settings, text: str) -> tuple[str, tuple[int, int]]:
    name, _, limits = text.partition("=")
    soft, _, hard = limits.partition(":")
    pair = _limit(soft), _limit(hard or soft)
    if pair[0] > pair[1]:
        raise InvalidArgumentError(
            f"configuration {settings.origin('runtime', 'default_ulimits')}: runtime.default_ulimits has {text!r}, "
            "whose soft limit is above the hard one; write NAME=SOFT:HARD"
        )
    return f"RLIMIT_{name.upper()}", pair


def _limit(text: str) -> int:
    return _UNLIMITED if text == "-1" else int(text)


def _pair(text: str, separator: str) -> tuple[str, str]:
    first, _, second = text.partition(separator)
    return first, second
