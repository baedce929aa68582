"""A pod's user namespace, and the namespaces that it owns: made by a helper process that then ends.

A process with threads cannot leave its user namespace, so another process has to make it.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from criserver.errors import CriError, DeadlineExceededError, InvalidArgumentError
from criserver.model import IdMapping
from criserver.network.namespace_calls import clone_flags, unshare_error
from criserver.network.sysctls import sysctl_error, write_once
from criserver.text import quoted

# Seconds for the helper process, which takes milliseconds, and for its end after a kill.
_DEADLINE = 10.0
_GRACE = 1.0
_MAX_STDERR = 2000

# The helper process:
# 1. It unshares the user namespace. The daemon then maps its IDs, and writes a line to it.
# 2. It becomes root of the user namespace, and unshares the namespaces that the user namespace is to own.
# 3. It writes their sysctls.
# 4. It waits until it is killed, or until the daemon is gone.
# After each step it prints the error number, 0 for none.
_HELPER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def unshare(flags):
    return ctypes.get_errno() if libc.unshare(flags) else 0
def write(path, value):
    try:
        os.write(os.open("/proc/sys/" + path, os.O_WRONLY), os.fsencode(value))
    except OSError as e:
        return e.errno
    return 0
def report(number):
    os.write(1, b"%d\\n" % number)
report(unshare(int(sys.argv[1])))
if os.read(0, 1):
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    report(unshare(int(sys.argv[2])))
    for path, value in zip(sys.argv[3::2], sys.argv[4::2]):
        report(write(path, value))
    os.read(0, 1)
"""


@dataclass(frozen=True, slots=True)
class UserMapping:
    """The IDs of a user namespace (user_namespaces(7)): ranges that do not overlap, one of them with ID 0."""

    uids: tuple[IdMapping, ...]
    gids: tuple[IdMapping, ...]


async def make_user_namespace(
    user: UserMapping, kinds: list[str], sysctls: Mapping[str, str]
) -> tuple[dict[str, int], dict[str, str]]:
    """Make a user namespace, and namespaces of ``kinds`` that it owns.

    Returns two things:

    1. Their descriptors by kind, "user" among them. The caller closes them.
    2. The ``sysctls`` that the node's root still has to write. For each sysctl the kernel lets either the node's root
       write it or the pod's root. Newer kernels let the pod's root write more of them.

    Raises InvalidArgumentError for IDs or a sysctl that the kernel refuses, and as :func:`unshare_error` says,
    DeadlineExceededError and CriError.
    """
    for name, ids in (("user", user.uids), ("group", user.gids)):
        if not any(r.container_id == 0 and r.length > 0 for r in ids):
            raise InvalidArgumentError(f"the pod's user namespace needs a mapping of {name} ID 0")
    for path, value in sysctls.items():
        if "\0" in value:
            raise InvalidArgumentError(f"sysctl {path} = {quoted(value)} has a zero byte")
    opened: dict[str, int] = {}
    try:
        async with asyncio.timeout(_DEADLINE), _helper(kinds, sysctls) as helper:
            assert helper.stdin is not None
            await _check_unshared(helper, ["user"])
            _write_map(helper.pid, "uid_map", user.uids)
            _write_map(helper.pid, "gid_map", user.gids)
            helper.stdin.write(b"\n")
            await _check_unshared(helper, kinds)
            remaining = {path: value for path, value in sysctls.items() if not await _written(helper, path, value)}
            for kind in ("user", *kinds):
                opened[kind] = os.open(f"/proc/{helper.pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
    except BaseException as e:
        for fd in opened.values():
            os.close(fd)
        if isinstance(e, TimeoutError):
            raise DeadlineExceededError(f"the kernel did not make a user namespace within {_DEADLINE:g} s") from e
        if isinstance(e, OSError):
            raise CriError(f"cannot make a user namespace: {e}") from e
        raise
    return opened, remaining


@asynccontextmanager
async def _helper(kinds: list[str], sysctls: Mapping[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-I", "-S", "-c", _HELPER, str(clone_flags(["user"])), str(clone_flags(kinds))),
        *itertools.chain.from_iterable(sysctls.items()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        # A killed process takes longer only if the kernel is stuck. asyncio reaps it when it ends.
        with suppress(TimeoutError):
            async with asyncio.timeout(_GRACE):
                await process.wait()


async def _check_unshared(helper: asyncio.subprocess.Process, kinds: list[str]) -> None:
    if number := await _error_number(helper):
        raise unshare_error(kinds, number)


async def _written(helper: asyncio.subprocess.Process, path: str, value: str) -> bool:
    """Whether the helper wrote a sysctl; False where it is not allowed to."""
    number = await _error_number(helper)
    if number and number not in (errno.EACCES, errno.EPERM):
        raise sysctl_error(path, value, number)
    return number == 0


async def _error_number(helper: asyncio.subprocess.Process) -> int:
    """The error number of the helper's next step."""
    assert helper.stdout is not None
    assert helper.stderr is not None
    line = await helper.stdout.readline()
    if not line:
        reason = (await helper.stderr.read(_MAX_STDERR)).decode(errors="replace").strip()
        raise CriError(f"the process that makes a user namespace ended early: {reason or 'without a message'}")
    return int(line)


def _write_map(pid: int, name: str, ids: tuple[IdMapping, ...]) -> None:
    text = "".join(f"{r.container_id} {r.host_id} {r.length}\n" for r in ids)
    try:
        write_once(f"/proc/{pid}/{name}", text)
    except OSError as e:
        if e.errno == errno.EINVAL:
            raise InvalidArgumentError(f"{name} {text.splitlines()} of the pod is refused by the kernel") from e
        raise
