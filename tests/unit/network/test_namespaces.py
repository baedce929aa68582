"""Requests that are refused before a namespace is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from criserver.errors import FailedPreconditionError, InvalidArgumentError
from criserver.model import IdMapping
from criserver.network import namespaces
from criserver.network.namespaces import UserMapping


@pytest.mark.parametrize(
    "name",
    [
        "net.ipv4.ip_forward",
        "kernel.shmmax",
        "vm.swappiness",
        "kernel.sched_rt_runtime_us",
        "",
        "net",
        "net..ipv4",
        "net/ipv4/../../kernel/hostname",
    ],
)
async def test_a_sysctl_of_the_node_is_refused(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "ns"
    with pytest.raises(InvalidArgumentError):
        await namespaces.make(str(directory), net=False, ipc=False, uts=True, sysctls={name: "1"})
    assert not directory.exists()


@pytest.mark.parametrize("name", ["net/ipv4/../../vm/swappiness", "net.ipv4\0", "fs.mqueue", "kernel.hostname"])
async def test_a_sysctl_that_only_looks_like_the_pods_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgumentError):
        await namespaces.make(str(tmp_path / "ns"), net=True, ipc=True, uts=True, sysctls={name: "1"})


async def test_a_hostname_needs_a_namespace_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="shares the node's UTS namespace"):
        await namespaces.make(str(tmp_path / "ns"), net=True, ipc=True, uts=False, hostname="pod")


@pytest.mark.parametrize(
    ("uids", "gids", "name"),
    [
        ((), (IdMapping(0, 200000, 10),), "user"),
        ((IdMapping(0, 200000, 10),), (), "group"),
        ((IdMapping(1, 200000, 10),), (IdMapping(0, 200000, 10),), "user"),
        ((IdMapping(0, 200000, 10),), (IdMapping(0, 200000, 0),), "group"),
    ],
)
async def test_a_user_namespace_needs_a_root(
    tmp_path: Path, uids: tuple[IdMapping, ...], gids: tuple[IdMapping, ...], name: str
) -> None:
    user = UserMapping(uids, gids)
    with pytest.raises(InvalidArgumentError, match=f"{name} ID 0"):
        await namespaces.make(str(tmp_path / "ns"), net=True, ipc=True, uts=True, user=user)


async def test_a_sysctl_for_a_user_namespace_has_no_zero_byte(tmp_path: Path) -> None:
    user = UserMapping((IdMapping(0, 200000, 10),), (IdMapping(0, 200000, 10),))
    with pytest.raises(InvalidArgumentError, match="zero byte"):
        await namespaces.make(
            str(tmp_path / "ns"), net=False, ipc=False, uts=True, sysctls={"kernel.domainname": "a\0b"}, user=user
        )


async def test_a_directory_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "net").write_text("of another pod")
    with pytest.raises(FailedPreconditionError, match="exists"):
        await namespaces.make(str(tmp_path), net=True, ipc=True, uts=True)
    assert (tmp_path / "net").read_text() == "of another pod"


def test_what_is_pinned(tmp_path: Path) -> None:
    assert namespaces.is_pinned("/proc/self/ns/net")
    (tmp_path / "net").touch()
    assert not namespaces.is_pinned(str(tmp_path / "net"))
    assert not namespaces.is_pinned(str(tmp_path / "absent"))
    assert not namespaces.is_pinned("")
