"""The changed keys that a running daemon takes over, and those that wait for its next start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from criserver.config.settings import Key, Settings

# Keys, and tables with all their keys. Pods that are there keep what they were made with.
_RELOADED: tuple[Key, ...] = (
    ("cdi",),
    ("cni", "bin_dirs"),
    ("cni", "timeout"),
    ("images",),
    ("log", "level"),
    ("registry",),
    ("runtime", "ctr_stop_timeout"),
    ("runtime", "default"),
    ("runtime", "default_env"),
    ("runtime", "default_mounts"),
    ("runtime", "default_sysctls"),
    ("runtime", "default_ulimits"),
    ("runtime", "device_ownership_from_security_context"),
    ("runtime", "enable_unprivileged_icmp"),
    ("runtime", "enable_unprivileged_ports"),
    ("runtime", "hooks_dir"),
    ("runtime", "ignore_image_defined_volumes"),
    ("runtime", "max_container_log_line_size"),
    ("runtime", "shm_size"),
    ("runtimes",),
    ("tracing", "sampling_rate_per_million"),
)


@dataclass(frozen=True, slots=True)
class KeyChange:
    """A key whose value differs. ``old`` or ``new`` is None where the key is not there. ``file`` set the new value."""

    key: Key
    old: Any
    new: Any
    file: str

    @property
    def reloaded(self) -> bool:
        """Whether a running daemon takes it over."""
        return any(self.key[: len(known)] == known for known in _RELOADED)


def changes(old: Settings, new: Settings) -> Iterator[KeyChange]:
    """The keys whose values differ."""
    before, after = old.flat(), new.flat()
    for key in dict.fromkeys((*before, *after)):
        if before.get(key) != after.get(key):
            yield KeyChange(key, before.get(key), after.get(key), new.origin(*key))


def reloaded(old: Settings, new: Settings) -> Settings:
    """The old settings with the changes that a running daemon takes over."""
    flat, origins = old.flat(), dict(old.origins)
    for change in changes(old, new):
        if change.reloaded:
            flat.pop(change.key, None)
            origins.pop(change.key, None)
            if change.new is not None:
                flat[change.key] = change.new
            if change.key in new.origins:
                origins[change.key] = new.origins[change.key]
    return Settings(_tables(flat), origins)


def _tables(flat: dict[Key, Any]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for key, value in flat.items():
        table = tables
        for name in key[:-1]:
            table = table.setdefault(name, {})
        table[key[-1]] = value
    return tables
