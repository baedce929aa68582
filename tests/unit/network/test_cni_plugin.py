"""Chains of CNI plugins: their input, their order, and what happens if a plugin fails."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from criserver.errors import (
    CriError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    UnavailableError,
)
from criserver.model import PortMapping
from criserver.network import Attachment, Network, PodNetwork, cni_plugin
from snapshotter import program_start
from tests.support.descriptors import room_for
from tests.support.waiting import until

NETNS = "/proc/self/ns/net"  # any file of nsfs: these plugins do not enter it

SCRIPT = """#!/bin/sh
me=$(basename "$0")
echo "$CNI_COMMAND $me" >> {log}/calls
cat /dev/stdin > {log}/$me.$CNI_COMMAND.json
env > {log}/$me.$CNI_COMMAND.env
case $CNI_COMMAND in
ADD) {ADD} ;;
DEL) {DEL} ;;
CHECK) {CHECK} ;;
STATUS) {STATUS} ;;
VERSION) {VERSION} ;;
esac
"""
RESULT = {"ips": [{"address": "10.9.0.2/24"}]}
SPEAKS = """echo '{"supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]}'"""


def say(document: dict[str, Any], status: int = 0) -> str:
    return f"echo '{json.dumps(document)}'; exit {status}"


def fail(code: int, msg: str = "it broke") -> str:
    return say({"cniVersion": "1.0.0", "code": code, "msg": msg, "details": "see the manual"}, status=1)


class Node:
    """A configuration directory, a directory of plugins that log their calls, and the network of both."""

    def __init__(self, directory: Path) -> None:
        self.bin, self.conf, self.log = directory / "bin", directory / "net.d", directory / "log"
        for d in (self.bin, self.conf, self.log):
            d.mkdir()
        self.network = Network(conf_dir=str(self.conf), bin_dirs=[str(directory / "none"), str(self.bin)], timeout=30)

    def plugin(self, name: str, **verbs: str) -> None:
        actions = {"ADD": say(RESULT), "DEL": ":", "CHECK": ":", "STATUS": ":", "VERSION": SPEAKS, **verbs}
        (self.bin / name).write_text(SCRIPT.format(log=self.log, **actions))
        (self.bin / name).chmod(0o755)

    def configure(self, *plugins: str | dict[str, Any], version: str = "1.0.0", **keys: Any) -> None:
        chain = [{"type": p} if isinstance(p, str) else p for p in plugins]
        document = {"cniVersion": version, "name": "podnet", "plugins": chain, **keys}
        (self.conf / "10-pod.conflist").write_text(json.dumps(document))

    def plan(self, **fields: Any) -> Attachment:
        given = {"sandbox_id": "sb1", "netns": NETNS, "name": "web", "namespace": "prod", "uid": "u-1", **fields}
        return self.network.attach_plan(PodNetwork(**given))

    def calls(self) -> list[str]:
        log = self.log / "calls"
        return log.read_text().splitlines() if log.exists() else []

    def request(self, name: str, verb: str) -> dict[str, Any]:
        request: dict[str, Any] = json.loads((self.log / f"{name}.{verb}.json").read_text())
        return request

    def env(self, name: str, verb: str) -> dict[str, str]:
        lines = (self.log / f"{name}.{verb}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    node = Node(tmp_path)
    for name in ("one", "two", "three"):
        node.plugin(name)
    node.configure("one", "two")
    return node


def alive(pid: int) -> bool:
    """Whether the process runs; one that is dead but not reaped by its new parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_add_gives_each_plugin_the_result_of_the_one_before(node: Node) -> None:
    first = {"ips": [{"address": "10.9.0.7/24"}], "dns": {"domain": "x"}}
    node.plugin("one", ADD=say(first))
    node.plugin("two", ADD=say({"ips": [{"address": "10.9.0.8/24"}]}))
    node.configure({"type": "one", "own": {"key": [1]}}, "two", "three")
    attachment = await node.network.add(node.plan())
    assert node.calls() == ["ADD one", "ADD two", "ADD three"]
    assert node.request("one", "ADD") == {
        "type": "one",
        "own": {"key": [1]},
        "name": "podnet",
        "cniVersion": "1.0.0",
    }
    assert node.request("two", "ADD")["prevResult"] == {"cniVersion": "1.0.0", **first}
    assert node.request("three", "ADD")["prevResult"]["ips"] == [{"address": "10.9.0.8/24"}]
    assert attachment.ips == ("10.9.0.2",), "the chain's result is the last plugin's"


async def test_the_environment_is_the_protocols_and_nothing_else(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_DAEMON", "x")
    await node.network.add(node.plan(ifname="net0"))
    env = node.env("one", "ADD")
    for of_the_shell in ("PWD", "SHLVL", "_", "OLDPWD"):
        env.pop(of_the_shell, None)
    assert env == {
        "PATH": os.environ["PATH"],
        "CNI_COMMAND": "ADD",
        "CNI_PATH": f"{node.bin.parent / 'none'}:{node.bin}",
        "CNI_CONTAINERID": "sb1",
        "CNI_NETNS": NETNS,
        "CNI_IFNAME": "net0",
        "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=prod;K8S_POD_NAME=web;"
        "K8S_POD_INFRA_CONTAINER_ID=sb1;K8S_POD_UID=u-1",
    }


async def test_a_plugin_leads_a_session_of_its_own_in_the_root_directory(node: Node) -> None:
    node.plugin(
        "one",
        ADD=f"readlink /proc/$$/cwd > {node.log}/cwd; cut -d' ' -f1,5,6 /proc/$$/stat > {node.log}/ids;" + say(RESULT),
    )
    await node.network.add(node.plan())
    assert (node.log / "cwd").read_text() == "/\n"
    pid, group, session = (node.log / "ids").read_text().split()
    assert pid == group == session


async def test_capability_arguments_go_to_the_plugins_that_declare_them(node: Node) -> None:
    ports = (PortMapping("tcp", 80, 8080, ""), PortMapping("udp", 53, 53, "192.0.2.1"), PortMapping("tcp", 90, 0, ""))
    annotations = {"kubernetes.io/ingress-bandwidth": "1M", "kubernetes.io/egress-bandwidth": "512Ki"}
    node.configure(
        {"type": "one", "capabilities": {"portMappings": True, "dns": False, "mac": True}},
        {"type": "two", "capabilities": {"bandwidth": True, "dns": True, "cgroupPath": True}},
        {"type": "three", "capabilities": {"io.kubernetes.cri.pod-annotations": True}},
    )
    await node.network.add(
        node.plan(
            port_mappings=ports,
            annotations=annotations,
            dns_servers=("192.0.2.53",),
            dns_searches=("svc.local",),
            cgroup_parent="/kubepods/pod1",
        )
    )
    assert node.request("one", "ADD")["runtimeConfig"] == {
        "portMappings": [
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
            {"hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "192.0.2.1"},
        ]
    }
    assert node.request("two", "ADD")["runtimeConfig"] == {
        "bandwidth": {
            "ingressRate": 1_000_000,
            "ingressBurst": 2**32 - 1,
            "egressRate": 524_288,
            "egressBurst": 2**32 - 1,
        },
        "dns": {"servers": ["192.0.2.53"], "searches": ["svc.local"]},
        "cgroupPath": "/kubepods/pod1",
    }
    assert node.request("three", "ADD")["runtimeConfig"] == {"io.kubernetes.cri.pod-annotations": annotations}
    assert "capabilities" not in node.request("one", "ADD"), "the specification forbids the key in a request"


async def test_without_anything_to_tell_there_is_no_runtime_config(node: Node) -> None:
    node.configure({"type": "one", "capabilities": {"portMappings": True, "bandwidth": True}})
    await node.network.add(node.plan(port_mappings=(PortMapping("tcp", 80, 0, ""),)))
    assert "runtimeConfig" not in node.request("one", "ADD")


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1k", 1000),
        ("1000", 1000),
        ("1Ki", 1024),
        ("1.5M", 1_500_000),
        ("1e6", 10**6),
        ("2E3", 2000),
        (".5G", 5 * 10**8),
        ("+10M", 10**7),
        ("1000500m", 1001),
        ("1P", 10**15),
    ],
)
async def test_bandwidth_is_a_kubernetes_quantity(node: Node, text: str, rate: int) -> None:
    node.configure({"type": "one", "capabilities": {"bandwidth": True}})
    plan = node.plan(annotations={"kubernetes.io/egress-bandwidth": text})
    assert plan.capabilities["bandwidth"] == {"egressRate": rate, "egressBurst": 2**32 - 1}


@pytest.mark.parametrize("text", ["", "M", "ten", "1 M", "1m", "999", "-1M", "2P", "1E", "1e99", "0x10", "9" * 5000])
async def test_an_absurd_bandwidth_is_refused_before_anything_runs(node: Node, text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"annotation kubernetes\.io/ingress-bandwidth = .* from 1k to 1P"):
        node.plan(annotations={"kubernetes.io/ingress-bandwidth": text})


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", "a;b"), ("uid", "a=b"), ("namespace", "a\0"), ("sandbox_id", "../x"), ("sandbox_id", "")],
)
async def test_what_cni_args_cannot_carry_is_refused(node: Node, field: str, value: str) -> None:
    with pytest.raises(InvalidArgumentError):
        node.plan(**{field: value})


async def test_a_missing_plugin_is_refused_before_anything_runs(node: Node) -> None:
    node.configure("one", "absent")
    with pytest.raises(FailedPreconditionError) as e:
        node.plan()
    assert str(e.value).startswith(
        f"CNI plugin absent of network podnet ({node.conf}/10-pod.conflist) is not in "
        f"{node.bin.parent / 'none'}, {node.bin}: install it there"
    )
    (node.bin / "two").chmod(0o644)
    node.configure("one", "two")
    with pytest.raises(FailedPreconditionError, match=r"CNI plugin two .* is not in"):
        node.plan()
    assert node.calls() == []


async def test_delete_goes_backwards_with_the_chains_result(node: Node) -> None:
    node.plugin("two", ADD=say({"ips": [{"address": "10.9.0.3/24"}]}))
    attachment = await node.network.add(node.plan())
    await node.network.delete(attachment)
    assert node.calls()[2:] == ["DEL two", "DEL one"]
    for name in ("one", "two"):
        assert node.request(name, "DEL")["prevResult"]["ips"] == [{"address": "10.9.0.3/24"}]
        assert node.env(name, "DEL")["CNI_NETNS"] == NETNS


async def test_delete_has_no_previous_result_before_0_4_0(node: Node) -> None:
    node.configure("one", version="0.3.1")
    await node.network.delete(await node.network.add(node.plan()))
    assert "prevResult" not in node.request("one", "DEL")


async def test_delete_of_a_namespace_that_is_gone(node: Node, tmp_path: Path) -> None:
    unmounted = tmp_path / "net"
    unmounted.touch()
    for gone in (str(unmounted), str(tmp_path / "absent")):
        await node.network.delete(node.plan(netns=gone))
        assert node.env("one", "DEL")["CNI_NETNS"] == ""


async def test_delete_needs_nothing_but_the_recorded_attachment(node: Node) -> None:
    node.configure({"type": "one", "capabilities": {"portMappings": True}}, "two", disableCheck=True)
    plan = node.plan(port_mappings=(PortMapping("tcp", 80, 8080, ""),))
    assert Attachment.from_json(plan.to_json()) == plan
    added = await node.network.add(plan)
    recorded = added.to_json()
    assert Attachment.from_json(recorded) == added

    shutil.rmtree(node.conf)
    later = Network(conf_dir=str(node.conf), bin_dirs=[str(node.bin)])
    await later.delete(Attachment.from_json(recorded))
    request = node.request("one", "DEL")
    assert request["runtimeConfig"] == {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}
    assert request["prevResult"]["ips"] == RESULT["ips"]


async def test_delete_halts_at_a_failure_and_can_be_repeated(node: Node) -> None:
    node.plugin("two", DEL=fail(100))
    attachment = await node.network.add(node.plan())
    with pytest.raises(CriError, match=r"CNI plugin two \(DEL, network podnet\): it broke: see the manual"):
        await node.network.delete(attachment)
    assert node.calls()[2:] == ["DEL two"]
    node.plugin("two")
    await node.network.delete(attachment)
    assert node.calls()[3:] == ["DEL two", "DEL one"]


async def test_delete_of_what_a_plugin_never_knew(node: Node) -> None:
    node.plugin("two", DEL=fail(3, "unknown container"))
    await node.network.delete(node.plan())
    assert node.calls() == ["DEL two", "DEL one"]


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (fail(11), UnavailableError, "it broke: see the manual (code 11)"),
        (fail(7), FailedPreconditionError, "(code 7)"),
        (fail(1), FailedPreconditionError, "(code 1)"),
        (fail(100), CriError, "(code 100)"),
        (say({"code": "11"}, 1), UnavailableError, "no message (code 11)"),
        ("echo not JSON; exit 2", UnavailableError, "exit status 2, and its error 'not JSON' is not valid JSON"),
        (
            "echo the reason >&2; exit 2",
            UnavailableError,
            "exit status 2 without a message; its standard error ends: the reason",
        ),
        ("kill -SEGV $$", UnavailableError, "killed by signal 11"),
        ("exit 0", CriError, "printed no result: '' is not valid JSON"),
        (say({"ips": [{"address": "x"}]}), CriError, "printed no result: ips[0].address = 'x'"),
        (say({"ips": []}), CriError, "gave interface eth0 of sandbox sb1 no address"),
    ],
)
async def test_a_failed_add_is_undone_and_told(node: Node, action: str, error: type[CriError], message: str) -> None:
    node.plugin("two", ADD=action)
    with pytest.raises(CriError) as e:
        await node.network.add(node.plan())
    assert type(e.value) is error
    assert message in str(e.value)
    assert "podnet" in str(e.value)
    assert node.calls() == ["ADD one", "ADD two", "DEL two", "DEL one"]


async def test_what_an_add_left_half_done_is_told_to_del(node: Node) -> None:
    node.plugin("two", ADD=fail(100))
    with pytest.raises(CriError):
        await node.network.add(node.plan())
    assert node.request("one", "DEL")["prevResult"]["ips"] == RESULT["ips"]


async def test_a_failing_clean_up_does_not_hide_the_cause(node: Node) -> None:
    node.plugin("two", ADD=fail(11, "the cause"), DEL=fail(100, "the aftermath"))
    with pytest.raises(UnavailableError, match="the cause"):
        await node.network.add(node.plan())
    assert node.calls()[2:] == ["DEL two", "DEL one"], "the other plugins are still undone"


async def test_a_clean_up_that_cannot_even_begin_is_told_of_for_each_plugin(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a descriptor for it: by an error that is none of ours."""
    node.plugin("two", ADD=fail(11, "the cause"))
    run = cni_plugin.run

    async def refuse(path: str, *, env: dict[str, str], **more: Any) -> cni_plugin.PluginReply:
        if env["CNI_COMMAND"] == "DEL":
            raise OSError(24, "Too many open files")
        return await run(path, env=env, **more)

    monkeypatch.setattr(cni_plugin, "run", refuse)
    with capture_logs() as logs, pytest.raises(UnavailableError, match="the cause"):
        await node.network.add(node.plan())
    errors = [line["error"] for line in logs if line["log_level"] == "error"]
    assert errors == ["[Errno 24] Too many open files"] * 2


async def test_a_plugin_that_cannot_be_executed(node: Node) -> None:
    plan = node.plan()
    (node.bin / "two").write_text("#!/nonexistent/interpreter\n")
    with pytest.raises(FailedPreconditionError, match=r"two \(ADD.* cannot be started: .*/bin/two"):
        await node.network.add(plan)
    assert node.calls() == ["ADD one", "DEL one"]


async def test_a_hanging_plugin_is_killed_with_its_children(node: Node) -> None:
    node.plugin("two", ADD=f"sleep 1000 & echo $$ $! > {node.log}/pids; wait")
    network = Network(conf_dir=str(node.conf), bin_dirs=[str(node.bin)], timeout=4)
    started = time.monotonic()
    with pytest.raises(DeadlineExceededError, match=r"two \(ADD, network podnet\) did not end within 4 s"):
        await network.add(node.plan())
    assert time.monotonic() - started < 30
    pids = [int(pid) for pid in (node.log / "pids").read_text().split()]
    await until(lambda: not any(alive(pid) for pid in pids))
    assert node.calls() == ["ADD one", "ADD two", "DEL two", "DEL one"]


async def test_cancellation_kills_the_plugin_and_undoes_the_rest(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cni_plugin, "_GRACE", 0.1)
    node.plugin("two", ADD=f"sleep 1000 & echo $$ $! > {node.log}/pids; wait")
    task = asyncio.create_task(node.network.add(node.plan()))
    await until(lambda: (node.log / "pids").exists() and (node.log / "pids").read_text().endswith("\n"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    pids = [int(pid) for pid in (node.log / "pids").read_text().split()]
    await until(lambda: not any(alive(pid) for pid in pids))
    assert node.calls() == ["ADD one", "ADD two", "DEL two", "DEL one"]


async def test_a_cancelled_plugin_may_finish_what_it_is_writing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cni_plugin, "_GRACE", 30.0)
    node.plugin("one", ADD=f"sleep 0.3; touch {node.log}/finished; " + say(RESULT))
    task = asyncio.create_task(node.network.add(node.plan()))
    await until(lambda: "ADD one" in node.calls())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (node.log / "finished").exists()
    # The second plugin has never run, so there is nothing of it to undo.
    assert node.calls() == ["ADD one", "DEL one"]


async def test_a_second_cancellation_does_not_stop_the_clean_up(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cni_plugin, "_GRACE", 0.1)
    node.plugin("two", ADD="sleep 1000", DEL="sleep 0.3")
    task = asyncio.create_task(node.network.add(node.plan()))
    await until(lambda: "ADD two" in node.calls())
    task.cancel()
    await until(lambda: "DEL two" in node.calls())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: "DEL one" in node.calls())


@pytest.mark.parametrize("steps", range(1, 9))
async def test_a_cancellation_ends_a_plugin_whatever_the_state_of_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr(cni_plugin, "_GRACE", 0.1)
    plugin = tmp_path / "plugin"
    plugin.write_text("#!/bin/sh\nsleep 60\n")
    plugin.chmod(0o755)
    task = asyncio.create_task(cni_plugin.run(str(plugin), run_name="plugin", env={}, request=b"{}", timeout=60))
    for _ in range(steps):
        await asyncio.sleep(0)
        time.sleep(0.02)  # noqa: ASYNC251 - a busy machine: the plugin is further than the loop
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=20)
    assert done, "it waits for what the plugin has started"


class SlowStart:
    """Stands between the daemon and the start of a program, which waits in a thread until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.may_go_on = threading.Event(), threading.Event()
        self.pid = 0
        self._real = program_start.start
        monkeypatch.setattr(program_start, "start", self._start)

    def _start(self, *arguments: Any) -> int:
        self.reached.set()
        assert self.may_go_on.wait(60)
        self.pid = self._real(*arguments)
        return self.pid


async def test_the_event_loop_goes_on_while_a_program_starts(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowStart(monkeypatch)
    task = asyncio.create_task(node.network.add(node.plan()))
    await until(slow.reached.is_set)
    slow.may_go_on.set()
    assert (await task).ips == ("10.9.0.2",)


async def test_a_plugin_that_starts_after_its_caller_has_gone_is_killed_and_reaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cni_plugin, "_GRACE", 0.01)
    monkeypatch.setattr(cni_plugin, "_KILL", 0.01)
    plugin = tmp_path / "plugin"
    plugin.write_text("#!/bin/sh\nsleep 1000\n")
    plugin.chmod(0o755)
    slow = SlowStart(monkeypatch)
    task = asyncio.create_task(cni_plugin.run(str(plugin), run_name="plugin", env={}, request=b"{}", timeout=60))
    await until(slow.reached.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    before = set(os.listdir("/proc/self/fd"))
    slow.may_go_on.set()
    await until(lambda: slow.pid > 0)
    await until(lambda: not os.path.exists(f"/proc/{slow.pid}"))
    await until(lambda: len(os.listdir("/proc/self/fd")) < len(before))


async def test_endless_output_is_cut_off(node: Node) -> None:
    node.plugin("one", ADD=f"echo $$ > {node.log}/pid; exec cat /dev/zero")
    with pytest.raises(CriError, match="printed more than 1048576 bytes and was killed"):
        await node.network.add(node.plan())
    assert not alive(int((node.log / "pid").read_text()))


async def test_endless_errors_do_not_disturb(node: Node) -> None:
    node.plugin("one", ADD="head -c 5000000 /dev/zero >&2; " + say(RESULT))
    assert (await node.network.add(node.plan())).ips == ("10.9.0.2",)


async def test_a_process_left_behind_does_not_hold_up_the_pod(node: Node) -> None:
    node.plugin("one", ADD=f"setsid sleep 1000 & echo $! > {node.log}/pid; {say(RESULT)}")
    node.configure("one")
    started = time.monotonic()
    try:
        assert (await node.network.add(node.plan())).ips == ("10.9.0.2",)
        assert time.monotonic() - started < 30
    finally:
        os.kill(int((node.log / "pid").read_text()), 9)


async def test_a_request_larger_than_a_pipe(node: Node) -> None:
    node.configure({"type": "one", "own": "x" * 300_000})
    await node.network.add(node.plan())
    assert len(node.request("one", "ADD")["own"]) == 300_000


async def test_pods_do_not_wait_for_each_other(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cni_plugin, "_GRACE", 0.1)
    node.plugin("one", ADD=f"[ $CNI_CONTAINERID = stuck ] && sleep 1000; {say(RESULT)}")
    stuck = asyncio.create_task(node.network.add(node.plan(sandbox_id="stuck")))
    await until(lambda: "ADD one" in node.calls())
    assert (await node.network.add(node.plan())).ips == ("10.9.0.2",)
    assert not stuck.done()
    stuck.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stuck


async def test_check_asks_every_plugin_with_the_chains_result(node: Node) -> None:
    attachment = await node.network.add(node.plan())
    await node.network.check(attachment)
    assert node.calls()[2:] == ["CHECK one", "CHECK two"]
    assert node.request("one", "CHECK")["prevResult"] == {"cniVersion": "1.0.0", **RESULT}
    node.plugin("two", CHECK=fail(100, "no eth0"))
    with pytest.raises(CriError, match=r"CNI plugin two \(CHECK, network podnet\): no eth0"):
        await node.network.check(attachment)


@pytest.mark.parametrize("keys", [{"disableCheck": True}, {"version": "0.3.1"}])
async def test_check_is_not_run_where_it_must_not_be(node: Node, keys: dict[str, Any]) -> None:
    node.configure("one", **keys)
    await node.network.check(await node.network.add(node.plan()))
    assert node.calls() == ["ADD one"]


async def test_check_of_a_plan_is_refused(node: Node) -> None:
    with pytest.raises(FailedPreconditionError, match="sandbox sb1 is not attached"):
        await node.network.check(node.plan())


async def test_ready_follows_the_directories(node: Node) -> None:
    assert await node.network.ready() is None
    (node.bin / "two").unlink()
    assert "CNI plugin two of network podnet" in str(await node.network.ready())
    node.plugin("two")
    assert await node.network.ready() is None
    (node.conf / "10-pod.conflist").unlink()
    assert f"no CNI configuration in {node.conf}" in str(await node.network.ready())
    node.configure("one")
    assert await node.network.ready() is None


async def test_ready_asks_the_plugins_status_from_1_1_0_on(node: Node) -> None:
    node.plugin("two", STATUS=fail(50, "out of addresses"))
    assert await node.network.ready() is None
    node.configure("one", "two", version="1.1.0")
    assert "CNI plugin two (STATUS, network podnet): out of addresses" in str(await node.network.ready())
    assert node.request("one", "STATUS") == {"type": "one", "name": "podnet", "cniVersion": "1.1.0"}
    assert "CNI_CONTAINERID" not in node.env("one", "STATUS")
    node.plugin("two")
    assert await node.network.ready() is None


async def test_ready_refuses_a_version_that_a_plugin_does_not_speak(node: Node) -> None:
    node.plugin("two", VERSION=say({"supportedVersions": ["0.4.0", "0.3.1"]}))
    reason = str(await node.network.ready())
    assert f"CNI plugin {node.bin}/two does not support cniVersion 1.0.0" in reason
    assert "but 0.3.1, 0.4.0: upgrade it, or lower cniVersion" in reason
    node.configure("one", "two", version="0.4.0")
    assert await node.network.ready() is None
    assert node.calls().count("VERSION two") == 1, "a plugin is asked once, until its file changes"
    node.plugin("two")
    node.configure("one", "two")
    assert await node.network.ready() is None


@pytest.mark.parametrize("action", ["exit 1", ":", "echo '{}'", "echo garbage"])
async def test_ready_where_a_plugin_does_not_know_the_version_verb(node: Node, action: str) -> None:
    node.plugin("two", VERSION=action)
    assert await node.network.ready() is None


async def test_a_plugin_for_which_there_are_no_descriptors_may_be_run_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not refuse for ever: its DEL is still owed."""
    monkeypatch.setattr("snapshotter.program._FIRST", 3)  # below the limit of this test
    with room_for(1), pytest.raises(UnavailableError, match="cannot be started just now: /bin/true: Too many open"):
        await cni_plugin.run("/bin/true", run_name="DEL of true", env={}, request=b"{}", timeout=60)
