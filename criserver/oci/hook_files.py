"""OCI hooks that the node adds to containers: files of the schema 1.0.0 that CRI-O and podman have (oci-hooks(5))."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jsonschema

from criserver.errors import FailedPreconditionError, InvalidArgumentError
from criserver.text import quoted
from snapshotter import files

# Bytes.
_MAX_FILE = 1 << 20
# Characters of a text that is compared with a pattern. A search holds up all threads, and its time may grow by the
# square of the text's length. The kernel runs no program with a longer path (PATH_MAX, limits.h). Names of annotations
# are no longer: api/bounds.py refuses them.
_MAX_TEXT = 4096


@dataclass(frozen=True, slots=True)
class NodeHook:
    """A hook and its conditions. All conditions that are there must hold, and at least one must be there.

    ``annotations`` are pairs of patterns, of a name and of its value. One annotation must match both of a pair.
    """

    hook: Mapping[str, Any]
    stages: tuple[str, ...]
    always: bool | None = None
    annotations: tuple[tuple[re.Pattern[str], re.Pattern[str]], ...] = ()
    commands: tuple[re.Pattern[str], ...] = ()
    has_bind_mounts: bool | None = None

    def matches(self, command: str, annotations: Mapping[str, str], *, has_bind_mounts: bool) -> bool:
        """Whether a container whose program is ``command`` gets the hook.

        Raises InvalidArgumentError for a text that is too long to be compared with a pattern.
        """
        found: list[bool] = []
        if self.always is not None:
            found.append(self.always)
        if self.has_bind_mounts is not None:
            found.append(self.has_bind_mounts and has_bind_mounts)
        for name, value in self.annotations:
            named = {key: text for key, text in annotations.items() if name.search(key)}
            for key, text in named.items():
                _check_length(text, f"the value of the annotation {quoted(key)}")
            found.append(any(value.search(text) for text in named.values()))
        if self.commands:
            _check_length(command, "the name of the container's program")
            found.append(any(pattern.search(command) for pattern in self.commands))
        return bool(found) and all(found)


def _check_length(text: str, what: str) -> None:
    if len(text) > _MAX_TEXT:
        raise InvalidArgumentError(
            f"{what} has {len(text)} characters; with the hooks of runtime.hooks_dir at most {_MAX_TEXT} are allowed"
        )


def load(directories: Iterable[str]) -> tuple[NodeHook, ...]:
    """The hooks of all ``*.json`` files, in the order of their names. Blocks.

    A file replaces those of the same name in earlier directories. A directory need not exist. Raises
    FailedPreconditionError for a file that cannot be used: a container without a hook that it should have may lack a
    protection.
    """
    paths: dict[str, str] = {}
    for directory in directories:
        try:
            names = os.listdir(directory)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as e:
            raise FailedPreconditionError(f"hooks_dir {directory} cannot be read: {e.strerror}") from e
        paths |= {name: os.path.join(directory, name) for name in names if name.endswith(".json")}
    return tuple(_read(paths[name]) for name in sorted(paths, key=lambda name: (name.lower(), name)))


def chosen(
    hooks: Iterable[NodeHook], command: str, annotations: Mapping[str, str], *, has_bind_mounts: bool
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The stage and the OCI hook of each hook that the container gets. Raises InvalidArgumentError as ``matches``."""
    for hook in hooks:
        if hook.matches(command, annotations, has_bind_mounts=has_bind_mounts):
            yield from ((stage, hook.hook) for stage in hook.stages)


def _read(path: str) -> NodeHook:
    try:
        document = json.loads(files.read(path, _MAX_FILE))
        for error in _validator().iter_errors(document):
            key = ".".join(str(part) for part in error.absolute_path) or "top level"
            raise FailedPreconditionError(
                f"hook file {path}: key {key}: {error.message[:300]}; mend or remove the file"
            )
        when = document["when"]
        return NodeHook(
            hook=document["hook"],
            stages=tuple(dict.fromkeys(document["stages"])),
            always=when.get("always"),
            annotations=tuple((re.compile(n), re.compile(v)) for n, v in when.get("annotations", {}).items()),
            commands=tuple(map(re.compile, when.get("commands", ()))),
            has_bind_mounts=when.get("hasBindMounts"),
        )
    except OSError as e:
        raise FailedPreconditionError(f"hook file {path} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise FailedPreconditionError(f"hook file {path} is not valid JSON: {e}") from e
    except re.error as e:
        raise FailedPreconditionError(f"hook file {path}: {e.pattern!r} is not a regular expression: {e}") from e


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(resources.files("criserver.oci").joinpath("schema/hook.json").read_text())
    return jsonschema.Draft202012Validator(schema)
