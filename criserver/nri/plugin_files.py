"""The rules of a plugin's index and name, and the plugins and configurations that are on the node as files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import structlog

from criserver.errors import InvalidArgumentError
from criserver.text import quoted

log = structlog.get_logger(__name__)

_INDEX = re.compile(r"[0-9]{2}", re.ASCII)
_NAME = re.compile(r"[a-zA-Z0-9_.+-]+")


@dataclass(frozen=True, slots=True)
class PluginFile:
    """A plugin that the daemon starts: INDEX-NAME in the directory of plugins, and its configuration."""

    path: str
    index: str
    name: str
    config: str


def check_name(index: str, name: str) -> None:
    """Raises InvalidArgumentError unless the index is two digits, and the name letters, digits and ``_.+-``."""
    if not _INDEX.fullmatch(index):
        raise InvalidArgumentError(f"the index {quoted(index)} of an NRI plugin is not two digits")
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(f"the name {quoted(name)} of an NRI plugin is not of letters, digits and _.+-")


def find(plugin_path: str, config_path: str) -> list[PluginFile]:
    """The executable files of the directory ``plugin_path``, by name. A file that cannot be used is logged. Blocks."""
    try:
        names = sorted(os.listdir(plugin_path))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        log.warning("the directory of NRI plugins cannot be read", directory=plugin_path, error=str(e))
        return []
    found = []
    for file in names:
        path = os.path.join(plugin_path, file)
        if not os.path.isfile(path) or not os.access(path, os.X_OK):
            continue
        index, _, name = file.partition("-")
        try:
            check_name(index, name)
            found.append(PluginFile(path, index, name, _config(config_path, index, name)))
        except (InvalidArgumentError, OSError, UnicodeDecodeError) as e:
            log.warning("an NRI plugin is not started", file=path, error=str(e))
    return found


def _config(directory: str, index: str, name: str) -> str:
    """The text of INDEX-NAME.conf, else of NAME.conf, else ""."""
    for file in (f"{index}-{name}.conf", f"{name}.conf"):
        try:
            with open(os.path.join(directory, file), encoding="utf-8") as f:
                return f.read()
        except (FileNotFoundError, NotADirectoryError):
            continue
    return ""
