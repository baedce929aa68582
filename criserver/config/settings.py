"""The keys of the configuration with their values: the defaults, the configuration file, and drop-ins.

Drop-ins are the files ``conf.d/*.toml`` beside the configuration file. They are merged over it in the order of their
names:

1. A table is merged key by key. So a drop-in with a table ``[runtimes.nvidia]`` adds a handler.
2. A list, a text, a number or a boolean replaces the earlier value.
3. The configuration file's own ``[runtimes]`` replaces the default one, so a node can leave runc out.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from criserver.errors import InvalidArgumentError

DROP_INS = "conf.d"

_ADVICE = "`criserver config default` prints every key with its default"
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+\Z")

# The names of a key, from the top level down: ("runtimes", "runc", "path").
Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Settings:
    """``tables`` has the value of every key. ``origins`` has the file of each key that is not at its default."""

    tables: Mapping[str, Any]
    origins: Mapping[Key, str]

    def origin(self, *key: str) -> str:
        """The file that set a key, or the words "the defaults"."""
        return self.origins.get(key, "the defaults")

    def flat(self) -> dict[Key, Any]:
        """The value of each key. A list is one value."""
        return dict(_flat(self.tables))


def read(path: str | None, *, optional: bool = False) -> Settings:
    """The defaults, with the file ``path`` and its drop-ins over them; the defaults alone for None.

    An ``optional`` file need not exist; its drop-ins are read all the same. Raises :class:`InvalidArgumentError`, which
    names the file, the key, its value and the allowed values.
    """
    tables: dict[str, Any] = tomllib.loads(default_text())
    origins: dict[Key, str] = {}
    if path is not None:
        if not optional or os.path.exists(path):
            given = _read(path)
            _check(path, given)
            if "runtimes" in given:
                tables["runtimes"] = {}
            _merge(tables, given, origins, path)
        for drop_in in _drop_ins(os.path.join(os.path.dirname(path), DROP_INS)):
            given = _read(drop_in)
            # The table of a handler may be in several files. So it is checked when it is complete.
            _check(drop_in, given, complete=False)
            _merge(tables, given, origins, drop_in)
        _check(path, {"runtimes": tables["runtimes"]})
    return Settings(tables, origins)


def default_text() -> str:
    """The commented default configuration, as ``criserver config default`` prints it."""
    return files("criserver.config").joinpath("default.toml").read_text()


def dotted(key: Key) -> str:
    """A key as TOML writes it: ``runtimes.runc.path``."""
    return ".".join(part if _BARE_KEY.match(part) else json.dumps(part, ensure_ascii=False) for part in key)


def toml_value(value: Any) -> str:
    """A value as TOML writes it: a text, a number, a boolean, a list of these, or an inline table."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            # JSON escapes all characters but DEL that TOML wants escaped, in the same way.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list():
            return f"[{', '.join(map(toml_value, value))}]"
        case dict():
            return "{" + ", ".join(f"{dotted((key,))} = {toml_value(item)}" for key, item in value.items()) + "}"
        case _:
            return str(value)


def text(settings: Settings) -> str:
    """All keys as a TOML file. A comment behind each key that is not at its default names the file that set it."""
    lines: list[str] = []
    table: Key = ()
    for key, value in settings.flat().items():
        if key[:-1] != table:
            table = key[:-1]
            lines += ["", f"[{dotted(table)}]"]
        origin = f"  # {settings.origins[key]}" if key in settings.origins else ""
        lines.append(f"{dotted(key[-1:])} = {toml_value(value)}{origin}")
    return "\n".join(lines) + "\n"


def _flat(table: Mapping[str, Any], above: Key = ()) -> Iterator[tuple[Key, Any]]:
    # The keys of a table come before the tables in it, as TOML wants it.
    for name, value in sorted(table.items(), key=lambda item: isinstance(item[1], dict)):
        if isinstance(value, dict) and value:
            yield from _flat(value, (*above, name))
        else:
            yield (*above, name), value


def _merge(base: dict[str, Any], added: Mapping[str, Any], origins: dict[Key, str], path: str, above: Key = ()) -> None:
    for name, value in added.items():
        key = (*above, name)
        if isinstance(value, dict):
            # The options of a shim may be of any type, also of another one than in an earlier file.
            if not isinstance(base.get(name), dict):
                base[name] = {}
                origins.pop(key, None)
            _merge(base[name], value, origins, path, key)
        else:
            base[name] = value
            origins[key] = path


def _drop_ins(directory: str) -> list[str]:
    """The paths of the drop-ins, in the order of their names. Raises InvalidArgumentError."""
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise InvalidArgumentError(f"configuration {directory}: {e.strerror}") from e
    return [os.path.join(directory, name) for name in sorted(names) if name.endswith(".toml") and name[0] != "."]


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as f:
            return tomllib.load(f)
    except OSError as e:
        raise InvalidArgumentError(f"configuration {path}: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InvalidArgumentError(f"configuration {path} is not valid TOML: {e}") from e


def _check(path: str, tables: dict[str, Any], *, complete: bool = True) -> None:
    # Imported here: a daemon without a configuration file saves its memory.
    import jsonschema

    schema = json.loads(files("criserver.config").joinpath("schema.json").read_text())
    for error in jsonschema.Draft202012Validator(schema).iter_errors(tables):
        if complete or error.validator not in ("required", "anyOf"):
            raise InvalidArgumentError(f"configuration {path}: {_explain(schema, error)}; {_ADVICE}")


def _explain(schema: dict[str, Any], error: Any) -> str:
    """A sentence with the key, its value and the allowed values, for the most common mistakes."""
    keys = [str(k) for k in error.absolute_path]
    where = ".".join(keys) or "the top level"
    match error.validator:
        case "additionalProperties":
            allowed = sorted(error.schema.get("properties", {}))
            unknown = ", ".join(sorted(set(error.instance) - set(allowed)))
            return f"unknown key {unknown} at {where}; allowed: {', '.join(allowed)}"
        case "required":
            return f"{where}: {error.message}"
        case "anyOf":
            return f"{where} has neither path, for an OCI runtime, nor shim; give one"
        case "enum":
            return f"{where} = {error.instance!r}; allowed: {', '.join(error.validator_value)}"
        case "type":
            return f"{where} = {error.instance!r}; it must be of type {error.validator_value}"
        case "pattern" if error.validator_value == schema["$defs"]["path"]["pattern"]:
            return f"{where} = {error.instance!r}; it must be an absolute path"
        case "pattern" if error.validator_value == schema["$defs"]["path_or_none"]["pattern"]:
            return f"{where} = {error.instance!r}; it must be an absolute path, or empty"
        case "pattern" if where == "metrics.address":
            return f"{where} = {error.instance!r}; it must be HOST:PORT, unix:///PATH, or empty"
        case "pattern" if where == "tracing.endpoint":
            return f"{where} = {error.instance!r}; it must be HOST:PORT without a scheme, or empty"
        case "pattern" if where == "streaming.address":
            return f"{where} = {error.instance!r}; it must be HOST:PORT, with an IPv6 address in brackets"
        case _:
            return f"{where} = {error.instance!r}: {error.message}"
