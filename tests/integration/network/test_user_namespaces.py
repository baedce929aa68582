"""User namespaces of pods: made and pinned with what they own."""

from __future__ import annotations

import asyncio
import json
import os

import pytest

from criserver.errors import CriError, DeadlineExceededError, InvalidArgumentError, UnavailableError
from criserver.model import IdMapping
from criserver.network import namespaces, user_namespace
from criserver.network.namespaces import PinnedNamespaces, UserMapping
from tests.support.usernamespaces import GID, UID, USER, base, inside, owner_of
from tests.support.waiting import until

__all__ = ["base"]


async def test_namespaces_are_owned_by_the_pods_user_namespace(base: str) -> None:
    pin = await namespaces.make(
        f"{base}/ns",
        net=True,
        ipc=True,
        uts=True,
        hostname="pod-a",
        sysctls={
            "net.ipv4.ip_unprivileged_port_start": "80",
            "kernel.shm_rmid_forced": "1",
            "fs.mqueue.msg_max": "33",
            "kernel.domainname": "example",
        },
        user=USER,
    )
    assert pin == PinnedNamespaces(*(f"{base}/ns/{kind}" for kind in ("net", "ipc", "uts", "user")))
    assert pin.user is not None
    user = os.stat(pin.user).st_ino
    assert user != os.stat("/proc/self/ns/user").st_ino
    for kind in ("net", "ipc", "uts"):
        assert owner_of(getattr(pin, kind)) == user
        assert os.stat(getattr(pin, kind)).st_ino != os.stat(f"/proc/self/ns/{kind}").st_ino
    maps = inside(pin, "cat", "/proc/self/uid_map", "/proc/self/gid_map").splitlines()
    assert [line.split() for line in maps] == [["0", str(UID), "65536"], ["0", str(GID), "65536"]]
    assert inside(pin, "cat", "/proc/self/setgroups") == "allow\n"
    assert inside(pin, "hostname") == "pod-a\n"
    names = (
        "net/ipv4/ip_unprivileged_port_start",
        "kernel/shm_rmid_forced",
        "fs/mqueue/msg_max",
        "kernel/domainname",
    )
    assert inside(pin, "cat", *(f"/proc/sys/{name}" for name in names)).split() == ["80", "1", "33", "example"]
    lo = json.loads(inside(pin, "ip", "-json", "address", "show", "lo"))[0]
    assert "UP" in lo["flags"]
    assert [a["local"] for a in lo["addr_info"]] == ["127.0.0.1", "::1"]
    inside(pin, "ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1")  # as the network's administrator
    # A container's /dev/mqueue belongs to its root.
    mount_queues = f"mount -t mqueue q {base} && stat -c %u:%g {base}"
    assert inside(pin, "unshare", "--mount", "sh", "-c", mount_queues) == "0:0\n"

    namespaces.unpin(f"{base}/ns")
    assert os.listdir(base) == []


async def test_limits_of_a_user_namespace_are_its_own(base: str) -> None:
    """A kubelet of Kubernetes 1.37 gives them to pods with a user namespace (KEP-5996)."""
    path, sysctls = "/proc/sys/user/max_net_namespaces", {"user.max_net_namespaces": "7", "net.ipv4.ip_forward": "1"}
    with open(path) as f:
        before = f.read()
    pin = await namespaces.make(f"{base}/ns", net=True, ipc=False, uts=False, sysctls=sysctls, user=USER)
    await namespaces.set_sysctls(pin, sysctls)
    assert inside(pin, "cat", path, "/proc/sys/net/ipv4/ip_forward").split() == ["7", "1"]
    with open(path) as f:
        assert f.read() == before, "the node has its own"
    namespaces.unpin(f"{base}/ns")


async def test_a_limit_that_only_the_nodes_root_might_write_is_not_written_on_the_node(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = user_namespace._MAKER.replace("write_all(sys.argv[3:])", "report(13)")
    monkeypatch.setattr(user_namespace, "_MAKER", script)
    with pytest.raises(InvalidArgumentError, match=r"max_net_namespaces = '7' is refused .* Permission denied"):
        await namespaces.make(
            f"{base}/ns", net=True, ipc=False, uts=False, sysctls={"user.max_net_namespaces": "7"}, user=USER
        )
    assert os.listdir(base) == []


async def test_sysctls_are_set_again_as_the_pods_root(base: str) -> None:
    """Group IDs in a value are the pod's own, before and after the plugins."""
    sysctls = {"net.ipv4.conf.eth0.rp_filter": "1", "net.ipv4.ping_group_range": "0 1000"}
    pin = await namespaces.make(f"{base}/ns", net=True, ipc=False, uts=False, sysctls=sysctls, user=USER)
    written, interface = (f"/proc/sys/net/ipv4/{name}" for name in ("ping_group_range", "conf/eth0/rp_filter"))
    assert inside(pin, "cat", written).split() == ["0", "1000"]
    inside(pin, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "v1")
    inside(pin, "sh", "-c", f"echo 5 6 > {written}; echo 0 > {interface}")
    await namespaces.set_sysctls(pin, sysctls)
    assert inside(pin, "cat", written, interface).split() == ["0", "1000", "1"]
    with pytest.raises(InvalidArgumentError, match=r"conf/eth1/rp_filter = '1' is refused .* No such file"):
        await namespaces.set_sysctls(pin, {"net.ipv4.conf.eth1.rp_filter": "1"})
    namespaces.unpin(f"{base}/ns")


async def test_a_user_namespace_can_be_made_alone(base: str) -> None:
    pin = await namespaces.make(f"{base}/ns", net=False, ipc=False, uts=False, user=USER)
    assert pin == PinnedNamespaces(None, None, None, f"{base}/ns/user")
    assert os.listdir(f"{base}/ns") == ["user"]
    namespaces.unpin(f"{base}/ns")


@pytest.mark.parametrize(
    "uids",
    [
        (IdMapping(0, UID, 10), IdMapping(5, UID + 100, 10)),
        (IdMapping(0, UID, 10), IdMapping(20, UID + 5, 10)),
        (IdMapping(0, UID, 2**32 - 1),),
        (IdMapping(0, 2**32 - 5, 10),),
        (IdMapping(0, UID, 2**40),),
        (IdMapping(0, UID, 10), IdMapping(10, UID + 10, 0)),
        tuple(IdMapping(n, UID + 2 * n, 1) for n in range(341)),
    ],
    ids=["overlapping", "overlapping on the node", "too long", "beyond the last", "no number", "empty", "too many"],
)
async def test_ids_that_the_kernel_refuses_leave_nothing(base: str, uids: tuple[IdMapping, ...]) -> None:
    for user, name in ((UserMapping(uids, USER.gids), "uid_map"), (UserMapping(USER.uids, uids), "gid_map")):
        with pytest.raises(InvalidArgumentError, match=f"{name} .* is refused by the kernel"):
            await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, user=user)
        assert os.listdir(base) == []


async def test_a_sysctl_that_is_refused_leaves_nothing(base: str) -> None:
    for name, value, reason in (
        ("net.ipv4.ip_forward", "many", "Invalid argument"),
        ("kernel.shm_no_such_thing", "1", "No such file"),
        ("kernel.shm_rmid_forced", "7", "Invalid argument"),
    ):
        with pytest.raises(InvalidArgumentError, match=f"is refused by the kernel: {reason}"):
            await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, sysctls={name: value}, user=USER)
        assert os.listdir(base) == []


async def test_a_failed_pin_leaves_nothing(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = namespaces._pin

    def fail_at_user(path: str, source: str) -> None:
        if path == f"{base}/ns/user":
            raise OSError(28, "No space left on device")
        pin(path, source)

    monkeypatch.setattr(namespaces, "_pin", fail_at_user)
    with pytest.raises(CriError, match="No space left on device"):
        await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, user=USER)
    assert os.listdir(base) == []


async def test_a_maker_that_dies_is_told(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_namespace, "_MAKER", "raise ValueError('no such luck')")
    with pytest.raises(CriError, match="no such luck"):
        await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, user=USER)
    assert os.listdir(base) == []


async def test_a_maker_that_is_killed_may_be_tried_again(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_namespace, "_MAKER", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(UnavailableError, match="ended by signal 9"):
        await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, user=USER)
    assert os.listdir(base) == []


async def test_a_maker_that_hangs_is_killed(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_namespace, "_MAKER", "import time; time.sleep(60)")
    monkeypatch.setattr(user_namespace, "_DEADLINE", 0.1)
    with pytest.raises(DeadlineExceededError):
        await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, user=USER)
    assert os.listdir(base) == []


async def test_cancellation_leaves_nothing(base: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for delay in (0, 0.001, 0.003, 0.006, 0.009, 0.012, 0.014, 0.016, 0.02):
        task = asyncio.create_task(namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, user=USER))
        await asyncio.sleep(delay)
        task.cancel()
        try:
            await task
            namespaces.unpin(f"{base}/ns")
        except asyncio.CancelledError:
            pass
        assert os.listdir(base) == []
    # The loop reaps a process whose end nobody could wait for.
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


# Snapshots
