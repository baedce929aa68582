"""How a program's end is told."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

import pytest

from snapshotter.program import Program
from snapshotter.threads import Threads
from tests.support.waiting import until


def start(script: str, passed: Sequence[int] = ()) -> Program:
    argv = [sys.executable, "-I", "-S", "-c", script]
    with open(os.devnull, "rb") as stdin:
        return Program(argv, env={}, stdin=stdin.fileno(), passed=passed, most=1 << 20, most_errors=4096)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("pass", 0),
        ("raise SystemExit(255)", 255),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import os; os.abort()", -signal.SIGABRT),
    ],
)
async def test_how_it_ended(script: str, code: int) -> None:
    program = start(script)
    await asyncio.wait_for(asyncio.shield(program.ended), 60)
    assert program.returncode == code
    assert not program.is_running()


async def test_an_ended_program_is_reaped() -> None:
    program = start("pass")
    await asyncio.wait_for(asyncio.shield(program.ended), 60)
    async with asyncio.timeout(60):
        while os.path.exists(f"/proc/{program.pid}"):
            await asyncio.sleep(0.01)


async def test_an_end_is_told_while_all_threads_are_busy() -> None:
    # As where a disk stands still: the threads wait for it, and a network plugin ends.
    loop, going_on = asyncio.get_running_loop(), threading.Event()
    loop.set_default_executor(Threads(1))
    theirs, ours = os.pipe()
    program = start("import os; os.read(3, 1)", [theirs])
    os.close(theirs)
    await asyncio.wait_for(asyncio.shield(program.started), 60)
    standing = loop.run_in_executor(None, going_on.wait, 60)
    os.close(ours)
    try:
        await asyncio.wait_for(asyncio.shield(program.ended), 30)
        assert program.returncode == 0
    finally:
        going_on.set()
        await standing


# Traces the process that the argument names (PTRACE_SEIZE of ptrace(2)), and looks at its end when its input is closed.
TRACER = """
import ctypes, os, sys
seized = ctypes.CDLL(None, use_errno=True).ptrace(0x4206, int(sys.argv[1]), None, None)
print(seized, flush=True)
sys.stdin.read()
os.waitpid(int(sys.argv[1]), 0)
"""


async def test_the_end_of_a_program_that_is_traced_holds_nobody_else_up() -> None:
    # The kernel shows an end to the parent after the tracer has seen it, which a debugger may do much later.
    theirs, ours = os.pipe()
    program = start("import os; os.read(3, 1); raise SystemExit(7)", [theirs])
    os.close(theirs)
    await asyncio.wait_for(asyncio.shield(program.started), 60)
    argv = [sys.executable, "-c", TRACER, str(program.pid)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tracer:  # noqa: ASYNC220
        assert tracer.stdin is not None
        assert tracer.stdout is not None
        if tracer.stdout.readline() != b"0\n":
            os.close(ours)
            pytest.skip("processes may not be traced here")
        seen = threading.Timer(30, tracer.stdin.close)  # or a loop that is held up would never go on
        seen.start()
        os.close(ours)
        await until(lambda: not has_reader(program))
        assert seen.is_alive()
        assert not program.exited.done()
        seen.cancel()
        tracer.stdin.close()
        await asyncio.wait_for(asyncio.shield(program.ended), 60)
        assert program.returncode == 7


def has_reader(program: Program) -> bool:
    """Whether the loop has still to learn of the program's end."""
    return program._pidfd in asyncio.get_running_loop()._selector.get_map()  # type: ignore[attr-defined]
