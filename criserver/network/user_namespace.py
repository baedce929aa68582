"""A pod's user namespace, and the namespaces that it owns: made by a helper process that then ends.

A process with threads cannot leave its user namespace, so another process has to make it.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from criserver.errors import CriError, DeadlineExceededError, InvalidArgumentError, UnavailableError
from criserver.model import IdMapping
from criserver.network.namespace_calls import clone_flags, unshare_error
from criserver.network.sysctls import Sysctl, belongs, write_once
from criserver.text import quoted
from snapshotter.program import Program

# Seconds for the helper process, which takes milliseconds, and for its end after a kill.
_DEADLINE = 10.0
_GRACE = 1.0
_MAX_STDERR = 2000

# Standard input of both helper processes is a socket. They write the error number of each of their steps into it, 0 for
# none.
_STEPS = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def report(number):
    os.write(0, b"%d\\n" % number)
def call(function, *arguments):
    report(ctypes.get_errno() if function(*arguments) else 0)
def become_root():
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
def write(path, value):
    try:
        os.write(os.open("/proc/sys/" + path, os.O_WRONLY), os.fsencode(value))
    except OSError as e:
        return e.errno
    return 0
def write_all(arguments):
    for path, value in zip(arguments[::2], arguments[1::2]):
        report(write(path, value))
"""

# The process that makes the namespaces:
# 1. It unshares the user namespace. The daemon then maps its IDs, and writes a line to it.
# 2. It becomes root of the user namespace, and unshares the namespaces that the user namespace is to own.
# 3. It writes their sysctls.
# 4. It waits until it is killed, or until the daemon is gone.
_MAKER = (
    _STEPS
    + """
call(libc.unshare, int(sys.argv[1]))
if os.read(0, 1):
    become_root()
    call(libc.unshare, int(sys.argv[2]))
    write_all(sys.argv[3:])
    os.read(0, 1)
"""
)

# The process that writes sysctls in namespaces that exist. It enters them by their paths, and becomes root of them.
_WRITER = (
    _STEPS
    + """
user, net = (os.open(path, os.O_RDONLY) for path in sys.argv[1:3])
call(libc.setns, user, 0)
call(libc.setns, net, 0)
become_root()
write_all(sys.argv[3:])
"""
)


@dataclass(frozen=True, slots=True)
class UserMapping:
    """The IDs of a user namespace (user_namespaces(7)): ranges that do not overlap, one of them with ID 0."""

    uids: tuple[IdMapping, ...]
    gids: tuple[IdMapping, ...]


async def make_user_namespace(
    user: UserMapping, kinds: list[str], sysctls: list[Sysctl]
) -> tuple[dict[str, int], list[Sysctl]]:
    """Make a user namespace, and namespaces of ``kinds`` that it owns.

    Returns two things:

    1. Their descriptors by kind, "user" among them. The caller closes them.
    2. The ``sysctls`` that the node's root still has to write. For each sysctl the kernel lets either the node's root
       write it or the pod's root. Newer kernels let the pod's root write more of them.

    Raises InvalidArgumentError for IDs or a sysctl that the kernel refuses, and as :func:`unshare_error` says,
    DeadlineExceededError, UnavailableError if the process is killed, and CriError.
    """
    for name, ids in (("user", user.uids), ("group", user.gids)):
        if not any(r.container_id == 0 and r.length > 0 for r in ids):
            raise InvalidArgumentError(f"the pod's user namespace needs a mapping of {name} ID 0")
    opened: dict[str, int] = {}
    try:
        flags = (str(clone_flags(["user"])), str(clone_flags(kinds)))
        async with asyncio.timeout(_DEADLINE), _helper(_MAKER, flags, sysctls) as helper:
            await _check_unshared(helper, ["user"])
            _write_map(helper.pid, "uid_map", user.uids)
            _write_map(helper.pid, "gid_map", user.gids)
            helper.writer.write(b"\n")
            await _check_unshared(helper, kinds)
            remaining = [sysctl for sysctl in sysctls if not await _written(helper, sysctl, final=False)]
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


async def write_as_pods_root(user: str, net: str, sysctls: list[Sysctl]) -> list[Sysctl]:
    """Write network sysctls as root of a user namespace: IDs in their values are IDs of that namespace.

    ``user`` and ``net`` are the paths of pinned namespaces. Returns the sysctls that the node's root still has to
    write. Raises InvalidArgumentError for a sysctl that the kernel refuses, DeadlineExceededError, UnavailableError if
    the process is killed, and CriError.
    """
    try:
        async with asyncio.timeout(_DEADLINE), _helper(_WRITER, (user, net), sysctls) as helper:
            for path in (user, net):
                if number := await _error_number(helper):
                    raise CriError(f"cannot enter the namespace {path}: {os.strerror(number)}")
            return [sysctl for sysctl in sysctls if not await _written(helper, sysctl, final=True)]
    except TimeoutError as e:
        raise DeadlineExceededError(f"the kernel did not set the pod's sysctls within {_DEADLINE:g} s") from e
    except OSError as e:
        raise CriError(f"cannot set the pod's sysctls: {e}") from e


@dataclass(frozen=True, slots=True)
class _Helper:
    """A helper process that runs, and the connection to its standard input."""

    program: Program
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @property
    def pid(self) -> int:
        return self.program.pid


@asynccontextmanager
async def _helper(script: str, arguments: Iterable[str], sysctls: list[Sysctl]) -> AsyncIterator[_Helper]:
    """Raises OSError if the process cannot be started."""
    for sysctl in sysctls:
        if "\0" in sysctl.value:
            raise InvalidArgumentError(f"sysctl {sysctl.path} = {quoted(sysctl.value)} has a zero byte")
    values = itertools.chain.from_iterable((sysctl.path, sysctl.value) for sysctl in sysctls)
    argv = [sys.executable, "-I", "-S", "-c", script, *arguments, *values]
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            program = Program(argv, env={}, stdin=theirs.fileno(), most=0, most_errors=_MAX_STDERR)
    except OSError:
        ours.close()
        raise
    try:
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            await asyncio.wait({program.started})
            if program.failure is not None:
                raise program.failure
            yield _Helper(program, reader, writer)
        finally:
            writer.close()
    finally:
        await program.finish(_GRACE)


async def _check_unshared(helper: _Helper, kinds: list[str]) -> None:
    if number := await _error_number(helper):
        raise unshare_error(kinds, number)


async def _written(helper: _Helper, sysctl: Sysctl, *, final: bool) -> bool:
    """Whether the helper is done with a sysctl; False where the node's root has to write it.

    A limit of the user namespace is refused in this case. The node's root would write the node's limit.
    """
    number = await _error_number(helper)
    if number in (errno.EACCES, errno.EPERM) and not belongs(sysctl.path, ["user"]):
        return False
    if number:
        sysctl.refused(number, final=final)
    return True


async def _error_number(helper: _Helper) -> int:
    """The error number of the helper's next step."""
    try:
        line = await helper.reader.readline()
    except ConnectionError:  # it ended before it had read its line
        line = b""
    if not line:
        await asyncio.wait({helper.program.ended})
        code, reason = helper.program.returncode or 0, helper.program.stderr.decode(errors="replace").strip()
        if code < 0:
            raise UnavailableError(f"the process in the pod's user namespace was ended by signal {-code}")
        raise CriError(f"the process in the pod's user namespace ended early: {reason or 'without a message'}")
    return int(line)


def _write_map(pid: int, name: str, ids: tuple[IdMapping, ...]) -> None:
    text = "".join(f"{r.container_id} {r.host_id} {r.length}\n" for r in ids)
    try:
        write_once(f"/proc/{pid}/{name}", text)
    except OSError as e:
        if e.errno == errno.EINVAL:
            raise InvalidArgumentError(f"{name} {text.splitlines()} of the pod is refused by the kernel") from e
        raise
