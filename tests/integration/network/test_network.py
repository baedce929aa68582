"""Real network namespaces, with real CNI plugins.

The plugins work on a node of their own: a network namespace in which their bridge, their iptables chains and
their sysctls are made, so that the host's are not touched and all of them end with it.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from criserver.errors import CriError, InvalidArgumentError
from criserver.model import PortMapping
from criserver.network import Attachment, Network, PodNetwork, namespace_calls, namespaces
from tests.support.node import RUN
from tests.support.waiting import eventually, until

PLUGINS = "/usr/lib/cni"
# Of this run alone: others may be at work on the machine.
BRIDGE = f"crinet{RUN}"
IPV4 = f"10.211.{RUN}"
IPV6 = f"fd00:211:{RUN}:"
GATEWAY = f"{IPV4}.1"
PORT = 18000 + RUN


@pytest.fixture
def base() -> Iterator[str]:
    """A directory on a tmpfs; whatever is still mounted below it after the test fails the test."""
    base = tempfile.mkdtemp(prefix="cri-net-", dir="/run")
    yield base
    left = pinned(base)
    for path in left:
        namespaces.unpin(os.path.dirname(path))
    shutil.rmtree(base)
    assert left == []
    eventually(lambda: "namespaces" not in [t.name for t in threading.enumerate()])  # one may be about to end


def pinned(base: str) -> list[str]:
    with open("/proc/self/mountinfo", errors="surrogateescape") as f:
        return [fields[4] for fields in map(str.split, f) if fields[4].startswith(base)]


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def inside(pin: namespaces.PinnedNamespaces, *command: str) -> str:
    """What a command prints in the pod's namespaces."""
    enter = [f"--{kind}={path}" for kind in ("net", "ipc", "uts") if (path := getattr(pin, kind))]
    return run("nsenter", *enter, *command)


@contextmanager
def listening(pin: namespaces.PinnedNamespaces, port: int, greeting: str) -> Iterator[None]:
    """A server in the pod that greets its first caller."""
    serve = (
        f"import socket; s = socket.create_server(('', {port})); print(flush=True); "
        f"s.accept()[0].send({greeting.encode()!r})"
    )
    command = ["nsenter", f"--net={pin.net}", "python3", "-c", serve]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            server.stdout.readline()
            yield
        finally:
            server.kill()


# Namespaces


async def test_all_namespaces_are_new_pinned_and_set_up(base: str) -> None:
    before = {kind: os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "ipc", "uts")}
    hostname = os.uname().nodename
    with open("/proc/sys/kernel/shm_rmid_forced") as f:
        shm_rmid_forced = f.read()
    pin = await namespaces.make(
        f"{base}/ns",
        net=True,
        ipc=True,
        uts=True,
        hostname="pod-a",
        sysctls={
            "net.ipv4.ip_unprivileged_port_start": "80",
            "net/ipv4/conf/lo/arp_filter": "1",
            "kernel.shm_rmid_forced": "1",
            "fs.mqueue.msg_max": "33",
        },
    )
    assert pin == namespaces.PinnedNamespaces(f"{base}/ns/net", f"{base}/ns/ipc", f"{base}/ns/uts")
    for kind, inode in before.items():
        path = getattr(pin, kind)
        assert namespaces.is_pinned(path)
        assert os.stat(path).st_ino != inode
        assert os.stat(f"/proc/self/ns/{kind}").st_ino == inode, "the daemon stays where it is"
    assert inside(pin, "hostname") == "pod-a\n"
    names = ("net/ipv4/ip_unprivileged_port_start", "net/ipv4/conf/lo/arp_filter")
    assert inside(pin, "cat", *(f"/proc/sys/{n}" for n in names)).split() == ["80", "1"]
    assert inside(pin, "cat", "/proc/sys/kernel/shm_rmid_forced", "/proc/sys/fs/mqueue/msg_max").split() == ["1", "33"]
    lo = json.loads(inside(pin, "ip", "-json", "address", "show", "lo"))[0]
    assert "UP" in lo["flags"]
    assert [a["local"] for a in lo["addr_info"]] == ["127.0.0.1", "::1"]
    assert os.uname().nodename == hostname
    with open("/proc/sys/kernel/shm_rmid_forced") as f:
        assert f.read() == shm_rmid_forced

    namespaces.unpin(f"{base}/ns")
    assert not os.path.exists(f"{base}/ns")
    namespaces.unpin(f"{base}/ns")


async def test_only_what_is_asked_for_is_made(base: str) -> None:
    pin = await namespaces.make(f"{base}/ns", net=False, ipc=True, uts=False)
    assert (pin.net, pin.uts) == (None, None)
    assert os.listdir(f"{base}/ns") == ["ipc"]
    assert pin.ipc is not None
    assert namespaces.is_pinned(pin.ipc)
    namespaces.unpin(f"{base}/ns")


async def test_a_sysctl_that_the_kernel_refuses_undoes_everything(base: str) -> None:
    for name, value in (("net.ipv4.ip_forward", "many"), ("kernel.shm_no_such_thing", "1")):
        with pytest.raises(InvalidArgumentError, match="is refused by the kernel"):
            await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, sysctls={name: value})
        assert not os.path.exists(f"{base}/ns")


async def test_sysctls_are_set_again_after_the_plugins(base: str) -> None:
    """One of an interface waits for the interface; one that a plugin has changed is set again."""
    sysctls = {"net.ipv4.conf.eth0.rp_filter": "1", "net.ipv4.conf.default.arp_filter": "1"}
    pin = await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, sysctls=sysctls)
    inside(pin, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "v1")
    files = [f"/proc/sys/net/ipv4/conf/{name}" for name in ("eth0/arp_filter", "default/arp_filter", "eth0/rp_filter")]
    assert inside(pin, "cat", files[0]).strip() == "1", "the interface begins with what was set before"
    inside(pin, "sh", "-c", f"echo 0 > {files[1]}; echo 0 > {files[2]}")
    await namespaces.set_sysctls(pin, {**sysctls, "kernel.shm_rmid_forced": "1"})
    assert inside(pin, "cat", *files[1:]).split() == ["1", "1"]
    with pytest.raises(InvalidArgumentError, match=r"no_such_thing = '1' is refused .* No such file"):
        await namespaces.set_sysctls(pin, {"net.ipv4.no_such_thing": "1"})
    namespaces.unpin(f"{base}/ns")


async def test_defaults_are_set_where_the_pod_names_no_value(base: str) -> None:
    defaults = {"net/ipv4/ip_unprivileged_port_start": "0", "net/ipv4/ping_group_range": "0 7", "net/no/such": "1"}
    sysctls = {"net.ipv4.ip_unprivileged_port_start": "77"}
    pin = await namespaces.make(f"{base}/ns", net=True, ipc=False, uts=False, sysctls=sysctls, defaults=defaults)
    assert inside(pin, "cat", *(f"/proc/sys/{path}" for path in list(defaults)[:2])).split() == ["77", "0", "7"]
    namespaces.unpin(f"{base}/ns")


async def test_a_pin_that_fails_undoes_the_ones_before(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = namespaces._pin

    def fail_at_uts(path: str, source: str) -> None:
        if path == f"{base}/ns/uts":
            raise OSError(28, "No space left on device")
        pin(path, source)

    monkeypatch.setattr(namespaces, "_pin", fail_at_uts)
    with pytest.raises(CriError, match="No space left on device"):
        await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True)
    assert not os.path.exists(f"{base}/ns")


async def test_cancellation_leaves_nothing(base: str) -> None:
    for delay in (0, 0.0002, 0.0005, 0.001, 0.002):
        task = asyncio.create_task(namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True))
        await asyncio.sleep(delay)
        task.cancel()
        try:
            await task
            namespaces.unpin(f"{base}/ns")
        except asyncio.CancelledError:
            assert not os.path.exists(f"{base}/ns")
    assert pinned(base) == []


async def test_a_thread_that_is_late_takes_its_work_back(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, unshare = threading.Event(), namespace_calls.unshare

    def slow(kinds: list[str]) -> None:
        go_on.wait(10)
        unshare(kinds)

    monkeypatch.setattr(namespaces, "unshare", slow)
    monkeypatch.setattr(namespaces, "_DEADLINE", 0.05)
    with pytest.raises(CriError, match="did not make the namespaces"):
        await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True)
    go_on.set()
    await until(lambda: not os.path.exists(f"{base}/ns"))
    assert pinned(base) == []


@pytest.mark.parametrize("left", ["all", "no mount", "no file", "a second mount"])
async def test_a_network_namespace_is_pinned_where_agents_look_for_it(base: str, left: str) -> None:
    elsewhere = f"{base}/netns/criserver-a"
    pin = await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, net_pin=elsewhere)
    assert pin == namespaces.PinnedNamespaces(elsewhere, f"{base}/ns/ipc", f"{base}/ns/uts")
    assert sorted(pinned(base)) == [elsewhere, f"{base}/ns/ipc", f"{base}/ns/uts"]
    assert namespaces.is_pinned(f"{base}/ns/net")  # by its link
    assert namespaces.pin_behind(f"{base}/ns/net") == elsewhere
    if left == "a second mount":
        run("mount", "--bind", elsewhere, elsewhere)
    elif left != "all":
        run("umount", elsewhere)
    if left == "no file":
        os.unlink(elsewhere)
    namespaces.unpin(f"{base}/ns")
    assert pinned(base) == []
    assert sorted(os.listdir(base)) == ["netns"]
    assert os.listdir(f"{base}/netns") == []


async def test_a_pod_is_undone_where_its_pin_can_be_neither_made_nor_deleted(base: str) -> None:
    os.mkdir(f"{base}/netns")
    run("mount", "-t", "tmpfs", "-o", "ro", "netns", f"{base}/netns")
    try:
        with pytest.raises(CriError, match="Read-only file system"):
            await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, net_pin=f"{base}/netns/criserver-a")
    finally:
        run("umount", f"{base}/netns")
    assert os.listdir(base) == ["netns"]


async def test_a_directory_of_pins_that_is_none_is_named(base: str) -> None:
    Path(base, "netns").touch()
    with pytest.raises(CriError, match=f"{base}/netns is no directory"):
        await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, net_pin=f"{base}/netns/criserver-a")
    assert os.listdir(base) == ["netns"]


async def test_a_mount_that_hides_a_pin_keeps_no_pod(base: str) -> None:
    """`ip netns add` mounts the directory on itself where it is not shared: each pin is there twice, one hidden."""
    pin = await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, net_pin=f"{base}/netns/criserver-a")
    run("mount", "--make-private", "--rbind", f"{base}/netns", f"{base}/netns")
    try:
        with capture_logs() as logs:
            namespaces.unpin(f"{base}/ns")
        assert [(line["event"], line["path"]) for line in logs] == [
            ("a network namespace stays, as a mount hides where it is pinned", pin.net)
        ]
    finally:
        run("umount", f"{base}/netns")
        run("umount", f"{base}/netns/criserver-a")
    assert os.listdir(base) == ["netns"]


async def test_a_failure_leaves_no_pin_elsewhere(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: str, path: str) -> None:
        raise OSError(12, os.strerror(12), path)

    monkeypatch.setattr(namespaces, "bind_mount", refused)
    with pytest.raises(CriError, match="netns/criserver-a"):
        await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True, net_pin=f"{base}/netns/criserver-a")
    assert os.listdir(base) == ["netns"]
    assert os.listdir(f"{base}/netns") == []


async def test_unpin_of_what_a_crash_left(base: str) -> None:
    await namespaces.make(f"{base}/ns", net=True, ipc=True, uts=True)
    run("umount", f"{base}/ns/ipc")  # a file that was made, but not yet mounted on
    run("umount", f"{base}/ns/uts")
    os.unlink(f"{base}/ns/uts")
    run("mount", "--bind", f"{base}/ns/net", f"{base}/ns/net")
    namespaces.unpin(f"{base}/ns")
    assert not os.path.exists(f"{base}/ns")


async def test_unpin_removes_all_but_a_mount_that_it_did_not_make(base: str) -> None:
    os.makedirs(f"{base}/ns/mount")
    run("mount", "-t", "tmpfs", "tmpfs", f"{base}/ns/mount")
    try:
        Path(f"{base}/ns/mount/kept").touch()
        Path(f"{base}/ns/other").touch()
        with pytest.raises(CriError, match="a file system is mounted there; unmount it first"):
            namespaces.unpin(f"{base}/ns")
        assert os.listdir(f"{base}/ns/mount") == ["kept"]
    finally:
        run("umount", f"{base}/ns/mount")
    namespaces.unpin(f"{base}/ns")
    assert not os.path.exists(f"{base}/ns")


async def test_many_at_once(base: str) -> None:
    pins = await asyncio.gather(
        *(namespaces.make(f"{base}/{i}", net=True, ipc=True, uts=True, hostname=f"pod-{i}") for i in range(20))
    )
    assert len({os.stat(pin.net).st_ino for pin in pins if pin.net}) == 20
    assert [inside(pin, "hostname").strip() for pin in pins] == [f"pod-{i}" for i in range(20)]
    for i in range(20):
        namespaces.unpin(f"{base}/{i}")


# Plugins


class Host:
    """A node's network in a namespace of its own, with a CNI configuration and Debian's plugins."""

    def __init__(self, base: str, pin: namespaces.PinnedNamespaces) -> None:
        self.base, self.pin, self.pods = base, pin, 0
        self.bin, self.conf, self.ipam = f"{base}/bin", f"{base}/net.d", f"{base}/ipam"
        os.mkdir(self.bin)
        os.mkdir(self.conf)
        for name in os.listdir(PLUGINS):
            with open(f"{self.bin}/{name}", "w") as f:
                f.write(f'#!/bin/sh\nexec nsenter --net={pin.net} {PLUGINS}/{name} "$@"\n')
            os.chmod(f"{self.bin}/{name}", 0o755)
        self.configure()
        self.network = Network(conf_dir=self.conf, bin_dirs=[self.bin], timeout=30)

    def configure(self, *more: dict[str, Any], subnets: tuple[str, ...] = (f"{IPV4}.0/24",)) -> None:
        bridge = {
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "dataDir": self.ipam,
                "ranges": [[{"subnet": subnet}] for subnet in subnets],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        document = {"cniVersion": "1.0.0", "name": "crinet", "plugins": [bridge, portmap, *more]}
        with open(f"{self.conf}/10-crinet.conflist", "w") as f:
            json.dump(document, f)

    async def pod(self, **fields: Any) -> tuple[namespaces.PinnedNamespaces, Attachment]:
        """A pod's namespaces, and the plan to attach it."""
        self.pods += 1
        pin = await namespaces.make(f"{self.base}/pod{self.pods}", net=True, ipc=True, uts=True)
        assert pin.net is not None
        given = {"sandbox_id": f"sandbox-{self.pods}", "name": "web", "namespace": "prod", "uid": "u", **fields}
        return pin, self.network.attach_plan(PodNetwork(netns=pin.net, **given))

    def leases(self) -> list[str]:
        try:
            return sorted(n for n in os.listdir(f"{self.ipam}/crinet") if n[0].isdigit() or ":" in n)
        except FileNotFoundError:
            return []

    def ports(self) -> list[str]:
        return [link["ifname"] for link in json.loads(inside(self.pin, "ip", "-json", "link")) if link.get("master")]

    def rules(self, sandbox: str) -> list[str]:
        saved = inside(self.pin, "iptables-save") + inside(self.pin, "ip6tables-save")
        return [line for line in saved.splitlines() if sandbox in line]

    def left(self, sandbox: str) -> list[str]:
        return [*self.leases(), *self.ports(), *self.rules(sandbox)]


@pytest.fixture
async def host(base: str) -> AsyncIterator[Host]:
    pin = await namespaces.make(f"{base}/host", net=True, ipc=False, uts=False)
    host = Host(base, pin)
    yield host
    for i in range(host.pods + 1):
        namespaces.unpin(f"{base}/pod{i}")
    namespaces.unpin(f"{base}/host")


async def test_a_pod_is_attached_reached_and_detached(host: Host) -> None:
    assert await host.network.ready() is None
    pin, plan = await host.pod(port_mappings=(PortMapping("tcp", 8080, PORT, ""),))
    attachment = await host.network.add(plan)

    assert attachment.ips == (f"{IPV4}.2",)
    assert attachment.result is not None
    eth0 = json.loads(inside(pin, "ip", "-json", "address", "show", "eth0"))[0]
    assert f"{IPV4}.2" in [a["local"] for a in eth0["addr_info"]]
    own = next(i for i in attachment.result.interfaces if i.sandbox)
    assert (own.name, own.mac, own.sandbox) == ("eth0", eth0["address"], pin.net)
    assert host.leases() == [f"{IPV4}.2"]
    assert len(host.ports()) == 1
    assert host.rules("sandbox-1")

    with listening(pin, 8080, "the pod"):
        get = f"import socket; print(socket.create_connection(('{GATEWAY}', {PORT}), 5).recv(20).decode())"
        assert inside(host.pin, "python3", "-c", get) == "the pod\n"

    await host.network.delete(attachment)
    assert host.left("sandbox-1") == []
    assert "eth0" not in inside(pin, "ip", "link")
    await host.network.delete(attachment)


async def test_check_tells_what_is_amiss(host: Host) -> None:
    pin, plan = await host.pod()
    attachment = await host.network.add(plan)
    await host.network.check(attachment)
    inside(pin, "ip", "address", "del", f"{IPV4}.2/24", "dev", "eth0")
    with pytest.raises(CriError, match=r"CNI plugin bridge \(CHECK, network crinet\)"):
        await host.network.check(attachment)


async def test_a_pod_of_two_families(host: Host) -> None:
    host.configure(subnets=(f"{IPV6}:/64", f"{IPV4}.0/24"))
    pin, plan = await host.pod(port_mappings=(PortMapping("tcp", 8080, PORT, ""),))
    attachment = await host.network.add(plan)
    assert attachment.ips == (f"{IPV6}:2", f"{IPV4}.2"), "the network's order is kept"
    eth0 = json.loads(inside(pin, "ip", "-json", "address", "show", "eth0"))[0]
    assert set(attachment.ips) <= {a["local"] for a in eth0["addr_info"]}
    await host.network.delete(attachment)
    assert host.left("sandbox-1") == []


async def test_delete_after_the_namespace_is_gone(host: Host) -> None:
    _, plan = await host.pod(port_mappings=(PortMapping("tcp", 8080, PORT, ""),))
    attachment = await host.network.add(plan)
    namespaces.unpin(f"{host.base}/pod1")
    assert host.leases()
    await host.network.delete(attachment)
    assert host.leases() == []
    # The bridge plugin takes back its masquerading rules through the namespace only; the ports' rules go.
    assert [rule for rule in host.rules("sandbox-1") if "dnat" in rule] == []
    await until(lambda: not host.ports())  # the kernel takes the veth with the namespace, in its own time


async def test_delete_of_an_add_whose_outcome_was_never_recorded(host: Host) -> None:
    _, plan = await host.pod(port_mappings=(PortMapping("tcp", 8080, PORT, ""),))
    intention = plan.to_json()
    await host.network.add(plan)
    os.unlink(f"{host.conf}/10-crinet.conflist")
    await host.network.delete(Attachment.from_json(intention))
    assert host.left("sandbox-1") == []


async def test_a_chain_that_fails_at_its_end_leaves_nothing(host: Host) -> None:
    host.configure({"type": "tuning", "sysctl": {"net.core.no_such_thing": "1"}})
    pin, plan = await host.pod(port_mappings=(PortMapping("tcp", 8080, PORT, ""),))
    with pytest.raises(CriError, match=r"CNI plugin tuning \(ADD, network crinet\)"):
        await host.network.add(plan)
    assert host.left("sandbox-1") == []
    assert "eth0" not in inside(pin, "ip", "link")


def misspell(host: Host, recorded: str, wanted: str) -> None:
    path = f"{host.conf}/10-crinet.conflist"
    with open(path) as f:
        text = f.read()
    assert recorded in text
    with open(path, "w") as f:
        f.write(text.replace(recorded, wanted))


async def test_a_plugin_that_refuses_add_and_del_owes_nothing(host: Host) -> None:
    misspell(host, '"host-local"', '"host-locl"')
    _, plan = await host.pod()
    left: list[Attachment] = []
    with pytest.raises(CriError, match=r"CNI plugin bridge \(ADD, network crinet\).*host-locl"):
        await host.network.add(plan, left.append)
    # Neither the plugin that can never succeed, nor the one behind it that never ran.
    assert [attachment.network.plugins for attachment in left] == [()]
    await host.network.delete(Attachment.from_json(left[0].to_json()))
    assert host.left("sandbox-1") == []


def stub(host: Host, name: str, cases: str) -> str:
    """A plugin of a shell script; its calls are lines of the file that is returned."""
    with open(f"{host.bin}/{name}", "w") as f:
        f.write(
            f"#!/bin/sh\ncat >/dev/null\necho $CNI_COMMAND >>{host.base}/{name}\ncase $CNI_COMMAND in\n{cases}\nesac\n"
        )
    os.chmod(f"{host.bin}/{name}", 0o755)
    return f"{host.base}/{name}"


def failing(code: int) -> str:
    return f'echo \'{{"code": {code}, "msg": "no"}}\'; exit 1'


@pytest.mark.parametrize(
    ("cases", "owed"),
    [
        (f"*) {failing(999)};;", []),
        # It asks to try again later.
        (f"ADD) {failing(999)};; DEL) {failing(11)};;", ["stub"]),
        # It printed no result, so nobody knows what it did.
        (f"ADD) ;; DEL) {failing(999)};;", ["stub"]),
    ],
)
async def test_what_is_owed_after_a_failed_add(host: Host, cases: str, owed: list[str]) -> None:
    calls, never = stub(host, "stub", cases), stub(host, "never", "")
    host.configure({"type": "stub"}, {"type": "never"})
    _, plan = await host.pod()
    left: list[Attachment] = []
    with pytest.raises(CriError, match="CNI plugin stub"):
        await host.network.add(plan, left.append)
    assert [plugin["type"] for plugin in left[0].network.plugins] == owed
    with open(calls) as f:
        assert f.read() == "ADD\nDEL\n"
    assert not os.path.exists(never)
    assert host.left("sandbox-1") == []


async def test_a_failed_del_is_tried_with_the_repaired_configuration(host: Host) -> None:
    _, plan = await host.pod()
    attachment = await host.network.add(plan)
    # As an earlier daemon has recorded it that was killed during ADD.
    recorded = json.loads(attachment.to_json())
    recorded["result"] = None
    recorded["network"]["plugins"][0]["ipam"]["type"] = "host-locl"
    broken = Attachment.from_json(json.dumps(recorded))
    misspell(host, '"crinet"', '"another"')
    with pytest.raises(CriError, match="host-locl"):
        await host.network.delete(broken)
    assert host.leases()
    misspell(host, '"another"', '"crinet"')
    await host.network.delete(broken)
    # The bridge plugin takes back its masquerading rules through the interface only, which the failed DEL has deleted.
    assert host.leases() == []
    assert host.ports() == []


async def test_a_misspelt_plugin_is_repaired_too_and_both_failures_are_told(host: Host) -> None:
    _, plan = await host.pod()
    attachment = await host.network.add(plan)
    recorded = json.loads(attachment.to_json())
    recorded["network"]["plugins"][0]["type"] = "bridge-x"
    broken = Attachment.from_json(json.dumps(recorded))
    misspell(host, '"host-local"', '"host-locl"')
    with pytest.raises(
        CriError, match=r"plugin bridge-x .* is not in .*; and with the present configuration .*host-locl"
    ):
        await host.network.delete(broken)
    assert len(await host.network.delete_by_force(broken)) == 1
    misspell(host, '"host-locl"', '"host-local"')
    await host.network.delete(broken)
    # The bridge plugin takes back its masquerading rules through the interface only, which the failed DEL has deleted.
    assert host.leases() == []
    assert host.ports() == []


async def test_a_cancelled_add_leaves_nothing(host: Host) -> None:
    _, plan = await host.pod(port_mappings=(PortMapping("tcp", 8080, PORT, ""),))
    task = asyncio.create_task(host.network.add(plan))
    await until(lambda: host.leases())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert host.left("sandbox-1") == []


async def test_pods_attached_at_once_have_addresses_of_their_own(host: Host) -> None:
    plans = [(await host.pod())[1] for _ in range(6)]
    attachments = await asyncio.gather(*(host.network.add(plan) for plan in plans))
    assert len({a.ips[0] for a in attachments}) == 6
    await asyncio.gather(*(host.network.delete(a) for a in attachments))
    assert host.left("sandbox") == []


async def test_bandwidth_annotations_shape_the_pods_traffic(host: Host) -> None:
    host.configure({"type": "bandwidth", "capabilities": {"bandwidth": True}})
    _, plan = await host.pod(annotations={"kubernetes.io/ingress-bandwidth": "10M"})
    attachment = await host.network.add(plan)
    shapers = [q for q in json.loads(inside(host.pin, "tc", "-json", "qdisc")) if q["kind"] == "tbf"]
    assert [q["options"]["rate"] for q in shapers] == [10_000_000 // 8]
    await host.network.delete(attachment)
    assert host.left("sandbox-1") == []
