"""What every request is held to before anything looks into it: texts that the kernel can take, of bounded length.

One walk over a request's fields, by its descriptor: a field that CRI gains is held to the same without a word here.
What a field means is another matter (``runtime/refusals.py``). Records are not looked at again: what was taken once, by
an older daemon too, stays readable.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from criserver.errors import InvalidArgumentError
from criserver.text import quoted

# Bytes. No name of Kubernetes' is near it, and no path of the kernel's is longer (PATH_MAX, limits.h).
_TEXT = 4096
# The kernel takes a sysctl's value as far as a page goes and drops what comes behind it (kernel/sysctl.c).
_SYSCTL = 4095
# Of one argument or environment variable, and of all of them with a pointer and a zero byte each (execve(2); the
# latter is what the largest limit of a stack gives them).
_ARGUMENT = 32 * os.sysconf("SC_PAGE_SIZE") - 1
_ARGUMENTS = 6 << 20
_POINTER = 8
# Tokens are as long as who signs them makes them.
_SECRET = 64 << 10
# All of a map of annotations. Kubernetes takes a quarter of it; they come back in every list, which has a limit too.
_ANNOTATIONS = 1 << 20

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class _Rule:
    """``limit`` is in bytes, 0 for none; ``words`` are on one line, without control characters."""

    limit: int = _TEXT
    words: bool = False
    zero: bool = False


_DEFAULT = _Rule()
_ANNOTATION = _Rule(limit=0, zero=True)
_WORDS = _Rule(words=True)

# By message and field, for what differs from the default. Names, and what becomes a part of a line, of a unit's name or
# of a control file, are words.
_RULES = {
    "PodSandboxMetadata.name": _WORDS,
    "PodSandboxMetadata.namespace": _WORDS,
    "PodSandboxMetadata.uid": _WORDS,
    "ContainerMetadata.name": _WORDS,
    "PodSandboxConfig.log_directory": _WORDS,
    "ContainerConfig.log_path": _WORDS,
    "LinuxPodSandboxConfig.cgroup_parent": _WORDS,
    # A value ends at its first newline: what comes behind it would be dropped without a word.
    "LinuxPodSandboxConfig.sysctls": _Rule(_SYSCTL, words=True),
    "LinuxContainerResources.cpuset_cpus": _WORDS,
    "LinuxContainerResources.cpuset_mems": _WORDS,
    "HugepageLimit.page_size": _WORDS,
    "RunPodSandboxRequest.runtime_handler": _WORDS,
    "ContainerConfig.command": _Rule(_ARGUMENT),
    "ContainerConfig.args": _Rule(_ARGUMENT),
    "ExecSyncRequest.cmd": _Rule(_ARGUMENT),
    "ExecRequest.cmd": _Rule(_ARGUMENT),
    "KeyValue.key": _Rule(_ARGUMENT),
    "AuthConfig.username": _Rule(_SECRET),
    "AuthConfig.password": _Rule(_SECRET),
    "AuthConfig.auth": _Rule(2 * _SECRET),
    "AuthConfig.identity_token": _Rule(_SECRET),
    "AuthConfig.registry_token": _Rule(_SECRET),
    "PullImageRequest.username": _Rule(_SECRET),
    "PullImageRequest.password": _Rule(_SECRET),
    "PullImageRequest.identity_token": _Rule(_SECRET),
    "PullImageRequest.registry_token": _Rule(_SECRET),
}


def check(request: Message) -> None:
    """Raises InvalidArgumentError, which names the field and not what is in it: that may be a secret."""
    _message(request, "")


def _message(message: Message, where: str) -> None:
    kind = message.DESCRIPTOR.name
    if kind in ("ContainerConfig", "ExecSyncRequest", "ExecRequest"):
        _arguments(message, where)
    elif kind == "KeyValue" and b"\0" in message.value:  # type: ignore[attr-defined]
        raise InvalidArgumentError(f"{where}value has a zero byte")
    for field, value in message.ListFields():
        name = where + field.name
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            _map(field, value, name, _RULES.get(f"{kind}.{field.name}", _DEFAULT))
        elif field.message_type is not None:
            if _is_list(value):
                for number, item in enumerate(value):
                    _message(item, f"{name}[{number}].")
            else:
                _message(value, f"{name}.")
        elif field.type == FieldDescriptor.TYPE_STRING:
            rule = _RULES.get(f"{kind}.{field.name}", _DEFAULT)
            if isinstance(value, str):
                _text(value, name, rule)
            else:
                for number, item in enumerate(value):
                    if _is_wrong(item, rule):
                        _text(item, f"{name}[{number}]", rule)


def _is_list(value: Any) -> bool:
    return not isinstance(value, Message)


def _map(field: FieldDescriptor, found: Mapping[str, Any], name: str, rule: _Rule) -> None:
    """A map of CRI's: its keys are names."""
    if field.name == "annotations":
        rule = _ANNOTATION
        total = sum(_size(key) + _size(value) for key, value in found.items())
        if total > _ANNOTATIONS:
            raise InvalidArgumentError(f"{name} has {total} bytes; all annotations together may have {_ANNOTATIONS}")
    for key, value in found.items():
        _text(key, f"{name}: the key {quoted(key)}", _WORDS)
        if isinstance(value, str):
            _text(value, f"{name}[{quoted(key)}]", rule)


def _is_wrong(text: str, rule: _Rule) -> bool:
    return (
        bool(rule.limit and 4 * len(text) > rule.limit and _size(text) > rule.limit)
        or (not rule.zero and "\0" in text)
        or bool(rule.words and _CONTROL.search(text))
    )


def _text(text: str, name: str, rule: _Rule) -> None:
    if not _is_wrong(text, rule):
        return
    if rule.limit and (size := _size(text)) > rule.limit:
        raise InvalidArgumentError(f"{name} has {size} bytes; at most {rule.limit} are possible")
    if "\0" in text:
        raise InvalidArgumentError(f"{name} has a zero byte")
    raise InvalidArgumentError(f"{name} has a control character; it must be printable and on one line")


def _arguments(message: Any, where: str) -> None:
    """What execve(2) could never take, whatever the limits: told here, and not by a runtime after megabytes of JSON."""
    texts: Iterable[str]
    total = 0
    if message.DESCRIPTOR.name == "ContainerConfig":
        texts = (*message.command, *message.args, *(e.key for e in message.envs))
        name = "command, args and envs"
        for number, env in enumerate(message.envs):
            if (size := _size(env.key) + 1 + len(env.value)) > _ARGUMENT:
                raise InvalidArgumentError(
                    f"{where}envs[{number}] has {size} bytes; the kernel takes {_ARGUMENT} of one variable"
                )
            total += 1 + len(env.value)
    else:
        texts, name = message.cmd, "cmd"
    total += sum(_size(text) + 1 + _POINTER for text in texts)
    if total > _ARGUMENTS:
        raise InvalidArgumentError(f"{where}{name} need {total} bytes in a process; the kernel gives them {_ARGUMENTS}")


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
