"""The limits of every request: the length of its texts, and characters that the kernel accepts.

:func:`check` walks over the fields of a request by its descriptor. So the limits hold for new fields of CRI too.
``runtime/refusals.py`` checks the meaning of fields. Records are not checked again: a record that was accepted once,
also by an older daemon, stays readable.
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

# Bytes. Names of Kubernetes are much shorter, and no path of the kernel is longer (PATH_MAX, limits.h).
_TEXT = 4096
# The kernel cuts off the value of a sysctl after a page (kernel/sysctl.c).
_SYSCTL = 4095
# One argument or environment variable; and all of them, each with a pointer and a zero byte (execve(2)). The second
# limit is the one for the largest possible stack.
_ARGUMENT = 32 * os.sysconf("SC_PAGE_SIZE") - 1
_ARGUMENTS = 6 << 20
_POINTER = 8
# The length of a token depends on its issuer.
_SECRET = 64 << 10
# A whole map of annotations. The limit of Kubernetes is a quarter of it. Every list has them, and has a limit too.
_ANNOTATIONS = 1 << 20

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class _Rule:
    """``limit`` is in bytes, 0 for none. ``one_line``: no control characters. ``zero``: a zero byte is allowed."""

    limit: int = _TEXT
    one_line: bool = False
    zero: bool = False


_DEFAULT = _Rule()
_ANNOTATION = _Rule(limit=0, zero=True)
_ONE_LINE = _Rule(one_line=True)

# The rules that differ from the default, by message and field. One line: names, and texts that become a part of a line,
# of a unit's name or of a control file.
_RULES = {
    "PodSandboxMetadata.name": _ONE_LINE,
    "PodSandboxMetadata.namespace": _ONE_LINE,
    "PodSandboxMetadata.uid": _ONE_LINE,
    "ContainerMetadata.name": _ONE_LINE,
    "PodSandboxConfig.log_directory": _ONE_LINE,
    "ContainerConfig.log_path": _ONE_LINE,
    "LinuxPodSandboxConfig.cgroup_parent": _ONE_LINE,
    # A value ends at its first newline: the kernel would drop the rest silently.
    "LinuxPodSandboxConfig.sysctls": _Rule(_SYSCTL, one_line=True),
    "LinuxContainerResources.cpuset_cpus": _ONE_LINE,
    "LinuxContainerResources.cpuset_mems": _ONE_LINE,
    "HugepageLimit.page_size": _ONE_LINE,
    "RunPodSandboxRequest.runtime_handler": _ONE_LINE,
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
    """Raises InvalidArgumentError that names the field, but not its value: that may be a secret."""
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


def _map(field: FieldDescriptor, entries: Mapping[str, Any], name: str, rule: _Rule) -> None:
    """Check a map. Its keys are names."""
    if field.name == "annotations":
        rule = _ANNOTATION
        total = sum(_size(key) + _size(value) for key, value in entries.items())
        if total > _ANNOTATIONS:
            raise InvalidArgumentError(
                f"{name} has {total} bytes; all annotations together may have at most {_ANNOTATIONS}"
            )
    for key, value in entries.items():
        _text(key, f"{name}: the key {quoted(key)}", _ONE_LINE)
        if isinstance(value, str):
            _text(value, f"{name}[{quoted(key)}]", rule)


def _is_wrong(text: str, rule: _Rule) -> bool:
    return (
        bool(rule.limit and 4 * len(text) > rule.limit and _size(text) > rule.limit)
        or (not rule.zero and "\0" in text)
        or bool(rule.one_line and _CONTROL.search(text))
    )


def _text(text: str, name: str, rule: _Rule) -> None:
    if not _is_wrong(text, rule):
        return
    if rule.limit and (size := _size(text)) > rule.limit:
        raise InvalidArgumentError(f"{name} has {size} bytes; at most {rule.limit} are allowed")
    if "\0" in text:
        raise InvalidArgumentError(f"{name} has a zero byte")
    raise InvalidArgumentError(f"{name} has a control character; it must be printable and on one line")


def _arguments(message: Any, where: str) -> None:
    """Refuse arguments that execve(2) never accepts: here, and not in a runtime after megabytes of JSON."""
    texts: Iterable[str]
    total = 0
    if message.DESCRIPTOR.name == "ContainerConfig":
        texts = (*message.command, *message.args, *(e.key for e in message.envs))
        name = "command, args and envs"
        for number, env in enumerate(message.envs):
            if (size := _size(env.key) + 1 + len(env.value)) > _ARGUMENT:
                raise InvalidArgumentError(
                    f"{where}envs[{number}] has {size} bytes; the kernel allows {_ARGUMENT} for one variable"
                )
            total += 1 + len(env.value)
    else:
        texts, name = message.cmd, "cmd"
    total += sum(_size(text) + 1 + _POINTER for text in texts)
    if total > _ARGUMENTS:
        raise InvalidArgumentError(f"{where}{name} need {total} bytes in a process; the kernel allows {_ARGUMENTS}")


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
