"""How a program is started: what it gets of the daemon, and what it does not get."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from snapshotter.program_start import start

SCRIPT = """#!/bin/sh
echo "$0 $1 $2 $#"
pwd
env | grep -v -e ^PWD= -e ^SHLVL= -e ^_=
cat
ls /proc/self/fd | wc -l
grep -e ^SigIgn -e ^SigBlk /proc/$$/status
cut -d' ' -f6 /proc/$$/stat
echo error >&2
"""


def program(directory: Path, mode: int = 0o755) -> str:
    path = directory / "program"
    path.write_text(SCRIPT)
    path.chmod(mode)
    return str(path)


def test_what_a_program_gets(tmp_path: Path) -> None:
    path = program(tmp_path)
    inherited = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    with (
        (tmp_path / "in").open("w+") as stdin,
        (tmp_path / "out").open("w+") as out,
        (tmp_path / "err").open("w+") as err,
    ):
        stdin.write("the request\n")
        stdin.seek(0)
        env = {"PATH": os.environ["PATH"], "NAME": "a value"}
        pid = start([path, "one", "two words"], env, str(tmp_path), [stdin.fileno(), out.fileno(), err.fileno()])
        assert os.waitpid(pid, 0) == (pid, 0)
        out.seek(0)
        err.seek(0)
        got, complaint = out.read().splitlines(), err.read()
    os.close(inherited)
    assert got[:2] == [f"{path} one two words 2", str(tmp_path)]
    assert sorted(got[2:4]) == ["NAME=a value", f"PATH={os.environ['PATH']}"]
    assert got[4] == "the request"
    assert int(got[5]) == 4, "the three, and the one by which ls reads the directory"
    ignored = int(got[7].split()[1], 16)
    assert not ignored & 1 << (signal.SIGPIPE - 1)
    assert not ignored & 1 << (signal.SIGXFSZ - 1)
    assert int(got[8]) == pid, "a session of its own"
    assert complaint == "error\n"


@pytest.mark.parametrize(("name", "expected"), [("program", errno.EACCES), ("other", errno.ENOENT)])
def test_a_program_that_cannot_be_started(tmp_path: Path, name: str, expected: int) -> None:
    program(tmp_path, 0o644)
    path = str(tmp_path / name)
    with (tmp_path / "file").open("w+") as file, pytest.raises(OSError, match=name) as raised:
        start([path], {}, "/", [file.fileno()] * 3)
    assert raised.value.errno == expected
    assert raised.value.filename == path
