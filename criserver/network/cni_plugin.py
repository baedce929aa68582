"""One run of one CNI plugin, in bounded time and memory: configuration to its input, results from its output."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping
from dataclasses import dataclass

from criserver.errors import CriError, DeadlineExceededError, FailedPreconditionError, UnavailableError, exhaustion
from criserver.network.cni_result import decode, excerpt
from snapshotter.program import Program, input_file

_MAX_STDOUT = 1 << 20
_MAX_STDERR = 4096
# Seconds that a plugin gets to finish when its caller is cancelled. A plugin that is killed during a write may leave
# something that its DEL does not find: host-local cannot tell the owner of a lease file that is still empty.
_GRACE = 2.0
# Seconds for a killed plugin to end. It takes longer only if the kernel is stuck.
_KILL = 5.0


@dataclass(frozen=True, slots=True)
class PluginReply:
    """A plugin's exit status, its output, and the last 4 KiB of its standard error."""

    returncode: int
    stdout: bytes
    stderr: bytes


async def run(path: str, *, run_name: str, env: Mapping[str, str], request: bytes, timeout: float) -> PluginReply:
    """Run the plugin at ``path`` with ``request`` on its standard input; ``timeout`` is in seconds.

    ``run_name`` names the run in messages. Raises DeadlineExceededError, FailedPreconditionError or UnavailableError
    where the plugin cannot be started, and CriError for more than 1 MiB of output. When it raises, the plugin and its
    process group are dead. When it is cancelled, the plugin gets a short time to end, and is killed after that.
    """
    try:
        with input_file(request) as stdin:
            plugin = Program([path], env=env, stdin=stdin.fileno(), most=_MAX_STDOUT, most_errors=_MAX_STDERR)
    except OSError as e:
        raise _start_error(run_name, path, e) from e
    try:
        try:
            done, _ = await asyncio.wait({plugin.ended}, timeout=timeout)
        except asyncio.CancelledError:
            await asyncio.wait({plugin.ended}, timeout=_GRACE)
            raise
        if not done:
            raise DeadlineExceededError(f"{run_name} did not end within {timeout:g} s and was killed")
        if plugin.failure is not None:
            raise _start_error(run_name, path, plugin.failure) from plugin.failure
        if len(plugin.stdout) > _MAX_STDOUT:
            raise CriError(f"{run_name} printed more than {_MAX_STDOUT} bytes and was killed")
        assert plugin.returncode is not None
        return PluginReply(plugin.returncode, bytes(plugin.stdout), bytes(plugin.stderr))
    finally:
        await plugin.finish(_KILL)


def failure(reply: PluginReply) -> tuple[int, str]:
    """The error code (0 for none) and the message of a plugin that failed (specification, section 5, "Error")."""
    if reply.returncode < 0:
        return 0, f"killed by signal {-reply.returncode}{_stderr_note(reply.stderr)}"
    if not reply.stdout.strip():
        return 0, f"exit status {reply.returncode} without a message{_stderr_note(reply.stderr)}"
    try:
        document = decode(reply.stdout)
    except CriError as e:
        return 0, f"exit status {reply.returncode}, and its error {e}"
    code = document.get("code")
    texts = [excerpt(str(document[key])) for key in ("msg", "details") if document.get(key)]
    return code if isinstance(code, int) else 0, f"{': '.join(texts) or 'no message'} (code {excerpt(str(code))})"


def _start_error(run_name: str, path: str, e: OSError) -> CriError:
    if e.errno == errno.ETXTBSY or exhaustion(e):
        return UnavailableError(f"{run_name} cannot be started just now: {path}: {e.strerror}")
    return FailedPreconditionError(f"{run_name} cannot be started: {path}: {e.strerror}; install the plugin anew")


def _stderr_note(stderr: bytes) -> str:
    return f"; its standard error ends: {excerpt(stderr)}" if stderr.strip() else ""
