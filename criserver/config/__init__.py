"""The daemon's configuration: one TOML file, checked by a JSON schema before anything else happens."""

from __future__ import annotations

from criserver.config.load import Config, RuntimeHandler, default_text, load

__all__ = ["Config", "RuntimeHandler", "default_text", "load"]
