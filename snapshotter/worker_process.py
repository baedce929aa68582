"""Starts and supervises the unpack worker (snapshotter.worker) and the layer checker (snapshotter.layer_check).

Each of them is a process for one layer. Its options are JSON in an argument, the blob is its standard input, and it
prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, BinaryIO

import isal
import structlog

from snapshotter import errors, marks, settling
from snapshotter.arrival import Arrival, Unpacked
from snapshotter.errors import SnapshotError
from snapshotter.limits import LayerLimits
from snapshotter.metadata import Layer
from snapshotter.program import Program
from snapshotter.staging import Staging
from snapshotter.threads import in_loose_thread, in_thread

_log = structlog.get_logger(__name__)

_MAX_ARRIVALS = 3  # beside the workers whose blobs are whole: a slow registry must not hold those up
_MOST_TOLD = 20  # names of attributes
_MAX_OUTPUT = 64 << 10

# The worker imports neither this package's __init__ nor site, which saves half of its start-up time.
_WORKER = """
import sys, types
package = types.ModuleType("snapshotter")
package.__path__ = [sys.argv.pop()]
sys.modules["snapshotter"] = package
sys.path.append(sys.argv.pop())
from snapshotter.worker import main
main()
"""
_CHECKER = _WORKER.replace("snapshotter.worker", "snapshotter.layer_check")
_WORKER_PATHS = (os.path.dirname(os.path.dirname(isal.__file__)), os.path.dirname(__file__))
_WORKER_ERRORS: dict[str, type[SnapshotError]] = {
    kind.__name__: kind
    for kind in (
        errors.LayerError,
        errors.LimitError,
        errors.TruncatedLayerError,
        errors.DiffMismatchError,
        SnapshotError,
    )
}


class Workers:
    """Unpacks blobs in ``staging``, each by a worker of its own; ``count`` bounds how many work at the same time."""

    def __init__(self, staging: Staging, limits: LayerLimits, count: int) -> None:
        self._staging = staging
        self.limits = limits  # for the layers that are unpacked from now on
        self._slots = asyncio.Semaphore(count)
        self._arrivals = 0

    def arrival(self, blob: str, compression: str, diff_id: str) -> Arrival | None:
        """Begin to unpack a blob that is still being written; see :meth:`Snapshotter.arrival`."""
        if self._arrivals == _MAX_ARRIVALS:
            return None
        try:
            file = open(blob, "rb")  # noqa: SIM115 - the task closes it
        except OSError:
            return None
        try:
            told, pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            file.close()
            return None
        os.set_blocking(told, True)
        self._arrivals += 1
        task = asyncio.create_task(self._make(file, compression, diff_id, told))

        def ended(_: asyncio.Task[Unpacked]) -> None:
            self._arrivals -= 1
            file.close()
            os.close(told)

        task.add_done_callback(ended)
        return Arrival(task, pipe, self._staging.discard)

    async def unpack(self, blob: str, compression: str, diff_id: str, arrival: Arrival | None) -> Unpacked:
        """Unpack a whole blob, or end what ``arrival`` has begun. Raises as :meth:`Snapshotter.unpack`."""
        if arrival is not None and (unpacked := await arrival.result()) is not None:
            return unpacked
        async with self._slots:
            try:
                with open(blob, "rb") as file:
                    return await self._make(file, compression, diff_id)
            except OSError as e:
                raise SnapshotError(f"cannot unpack layer {diff_id}: {e}") from e

    async def _make(self, blob: BinaryIO, compression: str, diff_id: str, told: int | None = None) -> Unpacked:
        """Unpack a blob in a new directory in staging, which is deleted after a failure."""
        area = self._staging.place()
        try:
            await in_thread(self._staging.make, area)
            options = {
                "compression": compression,
                "diff_id": diff_id,
                "limits": self.limits._asdict(),
                "daemon": os.getpid(),
                "told": told,
            }
            try:
                made = await _run_worker(area, blob, options, self.limits)
                if names := settling.left_out_of(area):
                    _log.warning(
                        "extended attributes of a layer are left out: the file system below root has no place for them",
                        layer=diff_id,
                        attributes=[errors.shown(name) for name in names[:_MOST_TOLD]],
                    )
                return area, made
            except SnapshotError as e:
                raise type(e)(f"layer {diff_id}: {e}") from e
            except OSError as e:
                raise SnapshotError(f"cannot unpack layer {diff_id}: {e}") from e
        except BaseException:
            await in_thread(self._staging.discard, area)
            raise


async def compare(layer: Layer, blob: str, compression: str, limits: LayerLimits) -> str:
    """How the files of a layer differ from its blob; "" where they do not.

    Raises OSError if one of the two has gone, if the process cannot be started or if the node lacks something else,
    LayerError if the blob cannot be read, and SnapshotError if the process fails, stands still or takes too long.
    """
    options = {
        "compression": compression,
        "diff_id": layer.diff_id,
        "limits": limits._asdict(),
        "daemon": os.getpid(),
    }
    with open(blob, "rb") as file:
        checker = _start(_CHECKER, options, file, layer.path)
        await _supervise("the layer checker", checker, file, limits)
    result = _result("the layer checker", checker)
    if "lack" in result:
        raise OSError(result["lack"], os.strerror(result["lack"]))
    if "unread" in result:
        raise errors.LayerError(f"the blob of layer {layer.diff_id} cannot be read: {result['unread']}")
    return "; ".join(result["differences"])


async def _run_worker(area: str, blob: BinaryIO, options: dict[str, Any], limits: LayerLimits) -> dict[str, Any]:
    told = options["told"]
    async with _answered_marks(area) as theirs:
        passed = [theirs.fileno(), *([] if told is None else [told])]
        numbers = {"marks": 3, "told": None if told is None else 4}
        worker = _start(_WORKER, {**options, **numbers}, blob, area, passed)
        theirs.close()
        await _supervise("the unpack worker", worker, blob, limits)
    result = _result("the unpack worker", worker)
    if "error" in result:
        # The number tells the daemon's caller that the disk is full, or has failed.
        cause = OSError(result["errno"], os.strerror(result["errno"])) if result.get("errno") else None
        raise _WORKER_ERRORS.get(result["error"], SnapshotError)(result["message"]) from cause
    return result


async def _supervise(what: str, program: Program, blob: BinaryIO, limits: LayerLimits) -> None:
    """Wait for the end of a program. It has ended when this returns or raises. Raises OSError if it cannot start."""
    try:
        async with asyncio.timeout(limits.max_seconds):
            seen = _progress(program.pid, blob)
            while not (await asyncio.wait([program.ended], timeout=limits.max_stall))[0]:
                before, seen = seen, _progress(program.pid, blob)
                if before == seen:
                    raise errors.HelperTimeoutError(f"{what} did nothing for {limits.max_stall:g} seconds")
    except TimeoutError:
        words = f"{what} took longer than {limits.max_seconds:g} seconds (max_seconds)"
        raise errors.HelperTimeoutError(words) from None
    finally:
        await program.finish()
    if program.failure is not None:
        raise program.failure


def _start(script: str, options: dict[str, Any], blob: BinaryIO, directory: str, passed: Sequence[int] = ()) -> Program:
    """Start one of this package's programs in a layer's ``directory``; it has ``passed`` as 3, 4, ..."""
    return Program(
        [sys.executable, "-I", "-S", "-c", script, json.dumps(options), *_WORKER_PATHS],
        env={},
        stdin=blob.fileno(),
        directory=directory,
        passed=passed,
        most=_MAX_OUTPUT,
        most_errors=_MAX_OUTPUT,
    )


def _result(what: str, program: Program) -> dict[str, Any]:
    """The object that a program has printed. Raises SnapshotError if it has ended without one."""
    try:
        result: dict[str, Any] = json.loads(program.stdout)
    except ValueError:
        code = program.returncode or 0
        if code < 0:
            raise errors.HelperKilledError(f"{what} was ended by signal {-code}") from None
        words = program.stderr.decode("utf-8", "backslashreplace").strip()[-2000:]
        raise SnapshotError(f"{what} ended with status {code}: {words}") from None
    return result


def _progress(pid: int, blob: BinaryIO) -> tuple[int, str]:
    """How far a program has read, and the CPU time that it has taken: one of them changes while it does anything."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0, "ended"
    return os.lseek(blob.fileno(), 0, os.SEEK_CUR), " ".join(fields[11:13])  # utime, stime (proc_pid_stat(5))


@asynccontextmanager
async def _answered_marks(area: str) -> AsyncIterator[socket.socket]:
    """A socket for a worker, by which it asks for opaque marks below ``area``. They are set while the block lasts.

    They are set by a thread, as the disk may be slow or stand still.
    """
    device = os.stat(area).st_dev
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    setting: asyncio.Future[bool] | None = None
    ended = False

    def answer() -> None:
        nonlocal setting
        loop.remove_reader(ours)  # until this one is answered
        setting = asyncio.ensure_future(in_loose_thread(partial(marks.answer, ours, device), "marks"))
        setting.add_done_callback(answered)

    def answered(done: asyncio.Future[bool]) -> None:
        if ended:
            ours.close()
        elif not done.cancelled():
            # An error says that there is no thread for it.
            more = done.result() if done.exception() is None else marks.answer(ours, device)
            if more:
                loop.add_reader(ours, answer)

    with theirs:
        ours.setblocking(False)
        loop.add_reader(ours, answer)
        try:
            yield theirs
        finally:
            ended = True
            loop.remove_reader(ours)
            if setting is None or setting.done():
                ours.close()
