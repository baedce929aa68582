"""Pods: run, status, list, stop, remove, and what their containers see of them."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import cgroups
from tests.support.node import DRIVER, SUBNET, Node, refused
from tests.support.pods import shared
from tests.support.waiting import SLOWNESS, eventually


def test_a_pod_has_an_address_namespaces_and_no_process(node: Node) -> None:
    pod = node.run_pod("plain", labels={"app": "web"}, annotations={"note": "x"})
    status = node.client.PodSandboxStatus(pod_sandbox_id=pod).status
    assert status.state == cri.SANDBOX_READY
    assert status.network.ip.startswith(SUBNET.removesuffix("0.0/16"))
    assert (status.metadata.name, status.metadata.uid) == ("plain", "uid-plain")
    assert dict(status.labels) == {"app": "web"}
    assert dict(status.annotations) == {"note": "x"}
    pins = f"{node.state}/ns/{pod}"
    assert sorted(os.listdir(pins)) == ["ipc", "net", "uts"]
    inodes = {f"{os.stat(f'{pins}/{kind}').st_ino}" for kind in ("ipc", "net", "uts")}
    links = subprocess.run(
        "cat /proc/[0-9]*/task/*/stat >/dev/null 2>&1; readlink /proc/[0-9]*/ns/net /proc/[0-9]*/ns/uts",
        shell=True,
        capture_output=True,
        text=True,
    ).stdout
    assert not [i for i in inodes if i in links], "a process is in the pod's namespaces"
    ping = ["ping", "-c1", "-W2", status.network.ip] if os.path.exists("/bin/ping") else ["true"]
    subprocess.run(ping, check=True, capture_output=True)


def test_verbose_status_shows_where_the_pod_lives(node: Node) -> None:
    pod = node.run_pod("verbose")
    info = json.loads(node.client.PodSandboxStatus(pod_sandbox_id=pod, verbose=True).info["info"])
    assert info["sandboxID"] == pod
    assert os.path.isdir(info["namespaces"])
    assert info["network"]["result"]["ips"]
    # The idiom of many scripts: crictl inspectp POD | jq '.info.runtimeSpec.linux.namespaces[] | ...'
    paths = {one["type"]: one["path"] for one in info["runtimeSpec"]["linux"]["namespaces"]}
    assert paths.keys() == {"network", "ipc", "uts"}
    addresses = subprocess.run(["nsenter", f"--net={paths['network']}", "ip", "addr"], capture_output=True, text=True)
    assert info["network"]["result"]["ips"][0]["address"] in addresses.stdout


def test_an_agent_in_a_pod_sees_the_network_namespaces_of_new_pods(node: Node) -> None:
    """As thick Multus, OVN-Kubernetes and DRA drivers: they are told a path, and have this directory of the node."""
    os.makedirs(node.netns, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "netns", node.netns], check=True)
    try:
        subprocess.run(["mount", "--make-shared", node.netns], check=True)
        mount = cri.Mount(
            host_path=node.netns, container_path="/var/run/netns", propagation=cri.PROPAGATION_HOST_TO_CONTAINER
        )
        agent = node.run(node.run_pod("agent"), "agent", ["sleep", "1000"], mounts=[mount])
        pod = node.run_pod("later")
        info = json.loads(node.client.PodSandboxStatus(pod_sandbox_id=pod, verbose=True).info["info"])
        paths = {one["type"]: one["path"] for one in info["runtimeSpec"]["linux"]["namespaces"]}
        assert json.dumps(info["network"]).count(paths["network"]) >= 1  # what plugins were told
        seen = paths["network"].replace(node.netns, "/var/run/netns")
        inode = os.stat(paths["network"]).st_ino
        assert node.sh(agent, f"stat -c %i {seen}") == f"{inode}\n"
        node.remove_pods()
        assert os.listdir(node.netns) == []
    finally:
        subprocess.run(["umount", "--lazy", node.netns], check=True)


def test_listing_by_every_filter(node: Node) -> None:
    one = node.run_pod("one", labels={"tier": "a", "app": "x"})
    two = node.run_pod("two", labels={"tier": "b", "app": "x"})
    node.client.StopPodSandbox(pod_sandbox_id=two)

    def ids(**wanted: Any) -> set[str]:
        return {p.id for p in node.client.ListPodSandbox(filter=cri.PodSandboxFilter(**wanted)).items}

    assert ids() == {one, two}
    assert ids(id=one) == {one}
    assert ids(id=one[:12]) == {one}
    assert ids(id="0" * 64) == set()
    assert ids(state=cri.PodSandboxStateValue(state=cri.SANDBOX_READY)) == {one}
    assert ids(state=cri.PodSandboxStateValue(state=cri.SANDBOX_NOTREADY)) == {two}
    assert ids(label_selector={"app": "x"}) == {one, two}
    assert ids(label_selector={"app": "x", "tier": "b"}) == {two}
    assert ids(label_selector={"app": "y"}) == set()
    assert ids(id=one, label_selector={"tier": "b"}) == set()


def test_stop_and_remove_are_idempotent_and_leave_nothing(node: Node) -> None:
    pod = node.run_pod("twice")
    for _ in range(2):
        node.client.StopPodSandbox(pod_sandbox_id=pod)
    stopped = node.client.PodSandboxStatus(pod_sandbox_id=pod, verbose=True)
    assert stopped.status.state == cri.SANDBOX_NOTREADY
    assert json.loads(stopped.info["info"])["reason"] == "it was stopped"
    assert not os.path.exists(f"{node.state}/ns/{pod}")
    for _ in range(2):
        node.client.RemovePodSandbox(pod_sandbox_id=pod)
    node.client.StopPodSandbox(pod_sandbox_id=pod)
    with pytest.raises(grpc.RpcError) as e:
        node.client.PodSandboxStatus(pod_sandbox_id=pod)
    assert e.value.code() == grpc.StatusCode.NOT_FOUND
    assert node.settled() == []


def test_removing_a_running_pod_takes_its_containers_along(node: Node) -> None:
    pod = node.run_pod("whole")
    node.run(pod, "a", ["sleep", "1000"])
    node.create(pod, "b", ["true"])
    node.client.RemovePodSandbox(pod_sandbox_id=pod)
    assert node.client.ListContainers().containers == []
    assert node.settled() == []


def test_containers_see_the_pods_files(node: Node) -> None:
    dns = cri.DNSConfig(servers=["10.0.0.10"], searches=["ns.svc", "svc"], options=["ndots:5"])
    pod = node.run_pod("files", dns_config=dns, hostname="the-host")
    address = node.client.PodSandboxStatus(pod_sandbox_id=pod).status.network.ip
    container = node.run(pod, "c", ["sleep", "1000"])
    assert node.sh(container, "cat /etc/resolv.conf") == "search ns.svc svc\nnameserver 10.0.0.10\noptions ndots:5\n"
    assert node.sh(container, "hostname; cat /etc/hostname") == "the-host\nthe-host\n"
    assert f"{address}\tthe-host\n" in node.sh(container, "cat /etc/hosts")
    assert address in node.sh(container, "ip -4 addr show eth0")
    assert "127.0.0.1/8" in node.sh(container, "ip -4 addr show lo")
    assert node.sh(container, "df -m /dev/shm | awk 'NR==2 {print $2}'") == "64\n"


def test_containers_of_a_pod_share_network_ipc_and_uts_but_not_processes(node: Node) -> None:
    pod = node.run_pod("together")
    one = node.run(pod, "one", ["sleep", "1000"])
    two = node.run(pod, "two", ["sleep", "1000"])
    for kind, same in (("net", True), ("ipc", True), ("uts", True), ("pid", False), ("mnt", False)):
        links = {node.sh(c, f"readlink /proc/self/ns/{kind}") for c in (one, two)}
        assert (len(links) == 1) is same, kind
    node.sh(one, "echo shared > /dev/shm/x")
    assert node.sh(two, "cat /dev/shm/x") == "shared\n"


def test_an_infra_process_that_ends_at_once(nothing_left: None, busybox_archive: str) -> None:
    node = Node(infra="/bin/busybox")
    try:
        node.start()
        try:
            pod = node.run_pod("short", linux=shared(pid=cri.POD), deadline=30 * SLOWNESS)
        except grpc.RpcError as e:
            assert e.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "infra process ended at once: is /bin/busybox a catatonit?" in str(e.details())
        else:  # it was ready before its end was told
            eventually(lambda: node.client.PodSandboxStatus(pod_sandbox_id=pod).status.state == cri.SANDBOX_NOTREADY)
            node.remove_pods()
        assert node.client.ListPodSandbox().items == []
        assert node.settled() == []
    finally:
        node.close()


def test_a_pod_that_shares_its_pid_namespace(node: Node) -> None:
    pod = node.run_pod("pids", linux=shared(pid=cri.POD))
    one = node.run(pod, "one", ["sleep", "1001"])
    two = node.run(pod, "two", ["sleep", "1002"])
    seen = node.sh(two, "ps -o args")
    assert "sleep 1001" in seen
    assert "/infra -P" in seen
    assert node.sh(one, "readlink /proc/self/ns/pid") == node.sh(two, "readlink /proc/self/ns/pid")
    node.client.StopContainer(container_id=one, timeout=0)
    assert node.wait(one).exit_code == 137
    assert node.status(two).state == cri.CONTAINER_RUNNING


def flags_of_shm(mountinfo: str) -> list[str]:
    """The options of the topmost mount at /dev/shm, "rw" or "ro" first."""
    return [line.split()[5].split(",") for line in mountinfo.splitlines() if line.split()[4] == "/dev/shm"][-1]


def test_a_pod_on_the_hosts_namespaces(node: Node) -> None:
    pod = node.run_pod("host", hostname="", linux=shared(network=cri.NODE, pid=cri.NODE, ipc=cri.NODE))
    container = node.run(pod, "c", ["sleep", "1003"])
    for kind in ("net", "ipc", "uts", "pid"):
        assert node.sh(container, f"readlink /proc/self/ns/{kind}").strip() == os.readlink(f"/proc/self/ns/{kind}"), (
            kind
        )
    assert node.client.PodSandboxStatus(pod_sandbox_id=pod).status.network.ip == ""
    assert node.sh(container, "hostname").strip() == os.uname().nodename
    # Programs in the node's /dev/shm may be executable; those in a pod's own are not.
    nodes = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    assert flags_of_shm(node.sh(container, "cat /proc/self/mountinfo")) == flags_of_shm(nodes)


def test_sysctls_are_the_pods_own(node: Node) -> None:
    linux = shared()
    linux.sysctls.update(
        {
            "net.ipv4.ip_unprivileged_port_start": "77",
            "kernel.shm_rmid_forced": "1",
            "net.ipv4.conf.eth0.arp_filter": "1",
        }
    )
    before = Path("/proc/sys/kernel/shm_rmid_forced").read_text()
    pod = node.run_pod("sysctl", linux=linux)
    container = node.run(pod, "c", ["sleep", "1000"])
    names = ("net/ipv4/ip_unprivileged_port_start", "kernel/shm_rmid_forced", "net/ipv4/conf/eth0/arp_filter")
    seen = node.sh(container, "cat " + " ".join(f"/proc/sys/{name}" for name in names))
    assert seen == "77\n1\n1\n"
    assert Path("/proc/sys/kernel/shm_rmid_forced").read_text() == before


def test_a_sysctl_that_does_not_exist_after_the_plugins_either(node: Node) -> None:
    linux = shared()
    linux.sysctls["net.ipv4.conf.eth1.arp_filter"] = "1"
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "conf/eth1/arp_filter", "No such file"):
        node.run_pod("sysctl", linux=linux)
    assert node.settled() == []


def test_low_ports_and_ping_are_for_any_user(node: Node) -> None:
    pod = node.run_pod("ping")
    files = "/proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range"
    user = cri.LinuxContainerSecurityContext(run_as_user=cri.Int64Value(value=1000))
    user.capabilities.drop_capabilities.append("ALL")
    linux = cri.LinuxContainerConfig(security_context=user)
    container = node.run(pod, "c", ["sleep", "1000"], linux=linux)
    assert node.sh(container, f"cat {files}").split() == ["0", "0", "2147483647"]
    node.sh(container, "httpd -p 80")  # it ends with an error where it cannot listen


def test_a_host_port_leads_to_the_pod(node: Node) -> None:
    pod = node.run_pod("ports", port_mappings=[cri.PortMapping(protocol=cri.TCP, container_port=80, host_port=38080)])
    rules = subprocess.run(["iptables-save", "-t", "nat"], capture_output=True, text=True, check=True).stdout
    address = node.client.PodSandboxStatus(pod_sandbox_id=pod).status.network.ip
    assert f"{address}:80" in rules
    node.client.StopPodSandbox(pod_sandbox_id=pod)
    rules = subprocess.run(["iptables-save", "-t", "nat"], capture_output=True, text=True, check=True).stdout
    assert f"{address}:80" not in rules


@pytest.mark.skipif(DRIVER != "cgroupfs", reason="the cgroup driver is systemd's")
def test_the_cgroup_parent_holds_the_container(node: Node) -> None:
    linux = shared()
    linux.cgroup_parent = "/crie2e/pod-x"
    pod = node.run_pod("cgroup", linux=linux)
    container = node.run(pod, "c", ["sleep", "1000"])
    assert f":/crie2e/pod-x/{container}\n" in cgroups_of_process(node, container)
    node.client.RemovePodSandbox(pod_sandbox_id=pod)
    for hierarchy in set(cgroups.roots().values()):
        top = f"{hierarchy}/crie2e"
        if os.path.isdir(top):
            assert [d for d in os.listdir(f"{top}/pod-x") if os.path.isdir(f"{top}/pod-x/{d}")] == []
            os.rmdir(f"{top}/pod-x")
            os.rmdir(top)


@pytest.mark.skipif(DRIVER != "systemd", reason="the cgroup driver is not systemd's")
def test_a_slice_holds_the_containers_scope(node: Node) -> None:
    linux = shared(pid=cri.POD)
    # As a kubelet names it; systemd nests slices by the dashes.
    name = "crie2e-burstable-pod0a_1.slice"
    linux.cgroup_parent = f"/crie2e.slice/crie2e-burstable.slice/{name}"
    pod = node.run_pod("cgroup", linux=linux)
    container = node.run(pod, "c", ["sleep", "1000"])
    path = f"{linux.cgroup_parent}/criserver-{container}.scope"
    assert f":{path}\n" in cgroups_of_process(node, container)
    assert unit(f"criserver-{container}.scope")["Slice"] == name
    assert unit(f"criserver-{pod}.scope")["Slice"] == name  # the process that holds the PID namespace
    node.client.RemovePodSandbox(pod_sandbox_id=pod)
    for key in (container, pod):
        assert unit(f"criserver-{key}.scope")["LoadState"] == "not-found"
    # The kubelet's own: it is left to who has named it.
    assert unit(name)["ActiveState"] == "active"
    subprocess.run(["systemctl", "stop", "crie2e.slice"], check=True)


@pytest.mark.skipif(DRIVER != "systemd", reason="the cgroup driver is not systemd's")
def test_a_slice_of_the_pods_own_ends_with_it(node: Node) -> None:
    pod = node.run_pod("own")
    node.run(pod, "c", ["sleep", "1000"])
    assert unit(f"criserver-{pod}.slice")["ActiveState"] == "active"
    node.client.StopPodSandbox(pod_sandbox_id=pod)
    assert unit(f"criserver-{pod}.slice")["ActiveState"] == "inactive"
    # Once more, where systemd does not know it any more, and for a pod that never had one.
    node.client.RemovePodSandbox(pod_sandbox_id=pod)
    node.client.RemovePodSandbox(pod_sandbox_id=node.run_pod("empty"))
    assert "systemd does not stop" not in node.daemon_log()


def cgroups_of_process(node: Node, container: str) -> str:
    pid = node.pid(container)
    return Path(f"/proc/{pid}/cgroup").read_text()


def unit(name: str) -> dict[str, str]:
    """What systemd says of a unit."""
    command = ["systemctl", "show", "--property=LoadState,ActiveState,Slice", name]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(line.split("=", 1) for line in shown.splitlines())


def test_many_pods_at_once_get_different_addresses(node: Node) -> None:
    pods: list[str] = []
    threads = [threading.Thread(target=lambda n=n: pods.append(node.run_pod(f"many-{n}"))) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    addresses = {node.client.PodSandboxStatus(pod_sandbox_id=p).status.network.ip for p in pods}
    assert len(addresses) == len(pods) == 10


def test_a_call_that_the_caller_gave_up_is_met_by_its_retry(node: Node) -> None:
    with pytest.raises(grpc.RpcError) as e:
        node.client.RunPodSandbox(deadline=0.01, config=node.pod("impatient"))
    assert e.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    pod = node.run_pod("impatient")
    assert [p.id for p in node.client.ListPodSandbox().items] == [pod]


def test_a_caller_that_gives_up_as_the_answer_comes_is_met_by_its_retry(node: Node) -> None:
    times = []
    for n in range(3):
        began = time.monotonic()
        node.run_pod(f"patient-{n}")
        times.append(time.monotonic() - began)
    given_up = 0
    for n in range(30):  # from a tenth of the time that it takes to twice that
        deadline = min(times) * (0.1 + n * 0.065)
        try:
            first = node.client.RunPodSandbox(deadline=deadline, config=node.pod(f"late-{n}")).pod_sandbox_id
        except grpc.RpcError as e:
            assert e.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            given_up += 1
            first = node.run_pod(f"late-{n}")
        assert node.client.PodSandboxStatus(pod_sandbox_id=first).status.metadata.name == f"late-{n}"
    assert given_up
    assert len(node.client.ListPodSandbox().items) == 33


def test_the_network_becomes_ready_without_a_restart(node: Node) -> None:
    def ready() -> cri.RuntimeCondition:
        return next(c for c in node.client.Status().status.conditions if c.type == "NetworkReady")

    assert ready().status
    os.rename(f"{node.cni}/10-e2e.conflist", f"{node.base}/aside")
    try:
        assert not ready().status
        assert node.cni in ready().message
    finally:
        os.rename(f"{node.base}/aside", f"{node.cni}/10-e2e.conflist")
    assert ready().status
