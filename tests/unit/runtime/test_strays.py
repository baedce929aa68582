"""If something cannot be looked at, it does not count as gone: the daemon may have no file descriptor left."""

from __future__ import annotations

import asyncio
import builtins
import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from criserver.config import RuntimeHandler
from criserver.model import Dns
from criserver.runtime import command, pidfd, sandbox_files, strays
from criserver.runtime.runtime_choice import former_handler
from criserver.runtime.shim_v2 import MARK
from tests.support.waiting import eventually


def refuse(monkeypatch: pytest.MonkeyPatch, wanted: str, number: int) -> None:
    """Have open() fail for names that end so."""
    open_ = builtins.open

    def failing(path: Any, *arguments: Any, **more: Any) -> Any:
        if str(path).endswith(wanted):
            raise OSError(number, os.strerror(number))
        return open_(path, *arguments, **more)

    monkeypatch.setattr(builtins, "open", failing)


def has_begun(pid: int) -> bool:
    """Whether a process has its environment: the kernel shows none for a moment in execve(2)."""
    return len(strays._environment(pid)) > len(b"\0\0")


def test_what_is_still_at_work_is_not_overlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "1000"], env={"CNI_CONTAINERID": f"test-{os.getpid()}"}) as process:
        try:
            eventually(lambda: has_begun(process.pid))
            with pytest.MonkeyPatch.context() as patch:
                refuse(patch, "/environ", errno.EMFILE)
                with pytest.raises(OSError, match="Too many open files"):
                    strays.kill("CNI_CONTAINERID", f"test-{os.getpid()}")
            assert process.poll() is None
            strays.kill("CNI_CONTAINERID", f"test-{os.getpid()}")
            assert process.wait(10) == -9
        finally:
            process.kill()


def test_the_environment_of_any_process_is_read_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process can show gigabytes of its memory as its environment."""
    name = f"test-{os.getpid()}"
    large = {f"V{number}": "x" * 100_000 for number in range(5)}
    ours = {"CNI_CONTAINERID": name, **large}
    with subprocess.Popen(["sleep", "1000"], env=ours) as one, subprocess.Popen(["sleep", "1000"], env=large) as other:
        try:
            eventually(lambda: all(has_begun(program.pid) for program in (one, other)))
            assert len(strays._environment(other.pid)) == strays._MAX_ENVIRONMENT + 2
            strays.kill("CNI_CONTAINERID", name)
            assert one.wait(10) == -9
            assert other.poll() is None
        finally:
            one.kill()
            other.kill()


def test_what_a_killed_daemon_was_running_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strays, "_ORPHANS_PATIENCE", 0.0)
    monkeypatch.setattr(command, "OWNER", f"OWNER_{os.getpid()}")
    own = command.owner()
    gone = f"{os.getpid()}.1"
    environments = [{command.OWNER: owner} for owner in (own, gone, "no daemon")]
    programs = [subprocess.Popen(["sleep", "1000"], env=environment) for environment in environments]
    try:
        eventually(lambda: all(has_begun(program.pid) for program in programs))
        asyncio.run(strays.end_orphans())
        assert programs[1].wait(10) == -9
        assert [programs[0].poll(), programs[2].poll()] == [None, None]
    finally:
        for program in programs:
            program.kill()
            program.wait()


@pytest.mark.parametrize(
    ("owner", "orphan"),
    [
        (f"{os.getpid()}.{pidfd.start_ticks(os.getpid())}", False),
        (f"{os.getpid()}.1", True),
        # What a container may have in it.
        ("9" * 300 + ".1", False),
        ("1" * 5000 + ".1", False),
        ("\N{SUPERSCRIPT TWO}.1", False),
        ("1", False),
        ("", False),
    ],
    # The same for each worker of a run.
    ids=["this one", "ended", "many digits", "too many for int", "no ASCII", "no start", "empty"],
)
def test_a_variable_of_a_container_is_no_daemon(owner: str, orphan: bool) -> None:
    assert strays._is_orphan(f"\0A=b\0CRISERVER_DAEMON={owner}\0C=d\0".encode()) is orphan


def test_a_pod_is_not_given_an_empty_resolv_conf_in_place_of_one_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse(monkeypatch, "/etc/resolv.conf", errno.EMFILE)
    with pytest.raises(OSError, match="Too many open files"):
        sandbox_files.resolv_conf(Dns((), (), ()))
    refuse(monkeypatch, "/etc/resolv.conf", errno.ENOENT)
    assert sandbox_files.resolv_conf(Dns((), (), ())) == ""


def test_a_runtime_that_cannot_be_looked_up_is_not_taken_for_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    default = RuntimeHandler("runc", "/usr/bin/runc")
    (tmp_path / MARK).write_text('{"program": "/opt/containerd-shim-kata-v2"}')
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, MARK, errno.EMFILE)
        with pytest.raises(OSError, match="Too many open files"):
            former_handler("kata", str(tmp_path), default)
    assert former_handler("kata", str(tmp_path), default).shim == "/opt/containerd-shim-kata-v2"
    refuse(monkeypatch, MARK, errno.ENOENT)
    assert former_handler("kata", str(tmp_path), default).path == default.path
