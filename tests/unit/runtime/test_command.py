"""Programs of the node: how they are run and ended, and what they print as text for people."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import threading
from pathlib import Path

import pytest

from criserver.runtime import command
from criserver.runtime.command import Done
from tests.support.waiting import eventually, until


@pytest.mark.parametrize(
    ("printed", "message"),
    [
        (b'time="2026-11-27T04:33:44Z" level=error msg="container does not exist"\n', "container does not exist"),
        (b'time="1" level=warning msg="a \\"b\\""\ntime="2" level=error msg=short\n', 'a "b"\nshort'),
        (rb'time="1" level=error msg="bell \a"', r"bell \a"),
        (b"no log line: level=error\n", "no log line: level=error"),
        (b'time="1" level=error msg="x" more=fields\n', 'time="1" level=error msg="x" more=fields'),
        (b"\xff\n", "\ufffd"),
        (b"", ""),
    ],
)
def test_only_the_message_of_a_line_of_runcs_log_is_told(printed: bytes, message: str) -> None:
    assert Done(1, b"", printed).message == message


async def test_a_program_gets_its_input_its_directory_and_the_daemons_variables(tmp_path: Path) -> None:
    script = f"cat; pwd; echo ${command.OWNER}; echo oh >&2; exit 3"
    done = await command.run(["sh", "-c", script], 60, stdin=b"in\n", cwd=str(tmp_path))
    assert done == (3, f"in\n{tmp_path}\n{command.owner()}\n".encode(), b"oh\n")
    assert (await command.run(["sh", "-c", "cat; pwd"], 60)).stdout == f"{os.getcwd()}\n".encode()


async def test_a_program_that_is_killed_has_its_signal_as_code() -> None:
    assert (await command.run(["sh", "-c", "kill -9 $$"], 60)).code == -9


async def test_all_that_a_program_has_started_ends_with_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = f"setsid sh -c 'echo $$ >{pid}; exec sleep 1000' & sleep 1000"
    running = asyncio.ensure_future(command.run(["sh", "-c", script], 1000))
    await until(lambda: pid.exists() and pid.read_text())
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    eventually(lambda: not os.path.exists(f"/proc/{pid.read_text().strip()}/exe"))


async def test_a_program_that_takes_too_long_is_ended() -> None:
    with pytest.raises(TimeoutError):
        await command.run(["sleep", "1000"], 0.1)


@pytest.mark.parametrize(
    ("name", "number"), [("no-such-program", errno.ENOENT), ("/no/such", errno.ENOENT), ("/etc/passwd", errno.EACCES)]
)
async def test_a_program_that_cannot_be_started_is_named(name: str, number: int) -> None:
    with pytest.raises(OSError, match=name) as caught:
        await command.run([name], 60)
    assert caught.value.errno == number


async def test_a_program_that_prints_without_end_is_ended() -> None:
    with pytest.raises(OSError, match="printed more than"):
        await command.run(["sh", "-c", "exec cat /dev/zero"], 60)


async def test_the_loop_starts_no_program() -> None:
    """A start holds up its thread until the new process has a processor."""
    threads: list[int] = []
    told = threading.get_ident()

    def hook(event: str, _arguments: tuple[object, ...]) -> None:
        if event in ("os.posix_spawn", "subprocess.Popen", "os.fork") and on:
            threads.append(threading.get_ident())

    on = True
    sys.addaudithook(hook)
    try:
        await command.run(["true"], 60)
    finally:
        on = False
    assert len(threads) == 1
    assert threads != [told]
