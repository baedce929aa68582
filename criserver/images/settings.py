"""How registries are reached: what the configuration says of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """The [registry] table; default.toml says what each field means. Times are seconds, "" stands for none."""

    config_path: str = ""
    auth_file: str = ""
    max_downloads: int = 10
    progress_timeout: float = 180.0
