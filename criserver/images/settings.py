"""The configuration of registries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """The [registry] table; default.toml describes each field. Times are in seconds, "" means none."""

    config_path: str = ""
    auth_file: str = ""
    max_downloads: int = 10
    progress_timeout: float = 180.0
