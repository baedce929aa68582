"""The daemon's configuration: one TOML file, which a JSON schema checks first."""

from __future__ import annotations

from criserver.config.load import Config, RuntimeHandler, default_text, load

__all__ = ["Config", "RuntimeHandler", "default_text", "load"]
