"""Starts a program and lets all other threads go on meanwhile.

posix_spawn(3) holds up its caller until the new process has executed the program. On a busy node the new process waits
for a processor first. The standard library keeps the interpreter's lock all this time, so that no thread goes on, also
where subprocess is called in a thread. ctypes releases it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# More than the opaque types of posix_spawn take in any libc.
_ROOM = 1024
# <spawn.h>, the same in glibc and musl
_SETSIGDEF = 0x04
_SETSID = 0x80

_libc = ctypes.CDLL(None)


def start(argv: Sequence[str], env: Mapping[str, str], directory: str, fds: Sequence[int]) -> int:
    """Start the program ``argv[0]``, a path, in a ``directory`` and a session of its own. Returns its PID.

    Its descriptors 0, 1, 2, ... are copies of ``fds``, which are all larger than that; it has no other. Call it in a
    thread: it waits until the program is executed. Raises OSError if the program cannot be started.
    """
    path = argv[0]
    sys.audit("os.posix_spawn", path, argv, env)
    actions, attributes = ctypes.create_string_buffer(_ROOM), ctypes.create_string_buffer(_ROOM)
    pid = ctypes.c_int()
    _call("posix_spawn_file_actions_init", actions)
    _call("posix_spawnattr_init", attributes)
    try:
        for number, fd in enumerate(fds):
            _call("posix_spawn_file_actions_adddup2", actions, fd, number)
        _call("posix_spawn_file_actions_addclosefrom_np", actions, len(fds))
        _call("posix_spawn_file_actions_addchdir_np", actions, os.fsencode(directory))
        _call("posix_spawnattr_setflags", attributes, ctypes.c_short(_SETSID | _SETSIGDEF))
        _call("posix_spawnattr_setsigdefault", attributes, _ignored_by_python())
        words = _string_array([os.fsencode(word) for word in argv])
        variables = _string_array([os.fsencode(f"{key}={value}") for key, value in env.items()])
        _call("posix_spawn", ctypes.byref(pid), words[0], actions, attributes, words, variables)
    except OSError as e:
        raise OSError(e.errno, e.strerror, path) from None
    finally:
        _libc.posix_spawnattr_destroy(attributes)
        _libc.posix_spawn_file_actions_destroy(actions)
    return pid.value


def _call(function: str, *arguments: Any) -> None:
    """These functions return the error number."""
    if number := getattr(_libc, function)(*arguments):
        raise OSError(number, os.strerror(number))


def _string_array(values: list[bytes]) -> Any:
    return (ctypes.c_char_p * (len(values) + 1))(*values, None)


def _ignored_by_python() -> Any:
    """The set of the signals that a Python process ignores: a program expects their default."""
    found = ctypes.create_string_buffer(_ROOM)
    _libc.sigemptyset(found)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        _libc.sigaddset(found, number)
    return found
