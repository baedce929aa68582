"""The daemon's configuration: a TOML file and its drop-ins, which a JSON schema checks first."""

from __future__ import annotations

from criserver.config.load import Config, RuntimeHandler, config_of, load
from criserver.config.settings import Settings, default_text, dotted, read, text

__all__ = ["Config", "RuntimeHandler", "Settings", "config_of", "default_text", "dotted", "load", "read", "text"]
