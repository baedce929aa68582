"""The configuration of registries."""

from __future__ import annotations

from dataclasses import dataclass

from criserver.config import Config


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """The [registry] table; default.toml describes each field. Times are in seconds, "" means none."""

    config_path: str = ""
    auth_file: str = ""
    max_downloads: int = 10
    progress_timeout: float = 180.0

    @classmethod
    def of(cls, config: Config) -> RegistrySettings:
        """The table in the daemon's configuration."""
        return cls(
            config.registry_config_path,
            config.registry_auth_file,
            config.registry_max_downloads,
            config.registry_progress_timeout,
        )
