"""Stored records can always be read: of every release, of any message of a kubelet, and damaged ones."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from criserver.api import views
from criserver.errors import InvalidArgumentError
from criserver.model import (
    ContainerConfig,
    Device,
    Dns,
    IdMapping,
    Mount,
    NamespaceMode,
    Namespaces,
    PodConfig,
    PortMapping,
    Propagation,
    Resources,
    Security,
    SelinuxOptions,
    User,
    UserNamespace,
)
from criserver.network import Attachment
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import migrations, parse, refusals
from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.record_store import RecordStore
from criserver.runtime.records import (
    Container,
    Record,
    Sandbox,
    UnreadableError,
    dump,
    load_container,
    load_sandbox,
)
from criserver.store import Change, Store
from tests.support import records
from tests.support.messages import messages

SAMPLES: dict[str, Any] = {record.id: record for record in records.samples()}
RELEASES = sorted(path.stem for path in records.DATA.glob("*.sql"))
IDS = (IdMapping(0, 65_536, 65_536),)
USERS = UserNamespace(IDS[0], IdMapping(0, 131_072, 65_536))
POD = PodConfig(
    name="web",
    namespace="shop",
    uid="8d1f",
    attempt=2,
    hostname="web-0",
    log_directory="/var/log/pods/shop_web_8d1f",
    dns=Dns(("10.96.0.10",), ("shop.svc.cluster.local",), ("ndots:5",)),
    port_mappings=(PortMapping("udp", 53, 5353, "192.0.2.1"),),
    labels={"app": "web", "größe": "groß"},
    annotations={"note": "two\nlines"},
    cgroup_parent="/kubepods/burstable/pod8d1f",
    sysctls={"net.core.somaxconn": "1024"},
    namespaces=Namespaces(pid=NamespaceMode.CONTAINER, user=USERS),
    privileged=True,
    selinux=SelinuxOptions("u", "r", "t", "s0:c1,c2"),
)
CONTAINER = ContainerConfig(
    name="nginx",
    attempt=3,
    image="sha256:" + "a" * 64,
    command=("nginx",),
    args=("-g", "daemon off;"),
    working_dir="/srv",
    envs=(("A", "ä=1\n"), ("EMPTY", "")),
    mounts=(
        Mount("/data/a", "/mnt/b", True, Propagation.PRIVATE, True, uids=IDS, gids=IDS, selinux_relabel=True),
        Mount("/shared", "/mnt/s", False, Propagation.BIDIRECTIONAL),
        Mount("/volume", "", True, Propagation.PRIVATE, image="tools:1", image_sub_path="bin"),
    ),
    devices=(Device("/dev/f", "/dev/fuse", "rw"),),
    cdi_devices=("vendor.com/gpu=0", "vendor.com/net=1"),
    labels={"io.kubernetes.container.name": "nginx"},
    annotations={"cdi.k8s.io/old": "vendor.com/net=1"},
    log_path="/var/log/pods/shop_web_8d1f/nginx/3.log",
    stdin=True,
    stdin_once=True,
    tty=True,
    resources=Resources(
        cpu_period=100_000,
        cpu_quota=50_000,
        cpu_shares=512,
        memory_limit=1 << 28,
        memory_swap_limit=1 << 29,
        oom_score_adj=-997,
        cpuset_cpus="0-1",
        cpuset_mems="0",
        hugepage_limits=(("2MB", 1 << 22),),
        unified={"memory.high": "200000000", "pids.max": "100"},
    ),
    security=Security(
        run_as_user=1000,
        run_as_group=1001,
        supplemental_groups=(2000, 3000),
        supplemental_groups_strict=True,
        readonly_rootfs=True,
        no_new_privs=True,
        add_capabilities=("NET_ADMIN",),
        drop_capabilities=("ALL",),
        ambient_capabilities=("CHOWN",),
        masked_paths=("/proc/kcore",),
        readonly_paths=("/proc/sys",),
        seccomp="/etc/seccomp.json",
        apparmor="web",
        selinux=SelinuxOptions("u", "r", "t", "s0:c1,c2"),
    ),
    namespaces=Namespaces(pid=NamespaceMode.TARGET, target="plain", user=USERS),
    stop_signal="SIGRTMINPLUS3",
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with contextlib.closing(Store(str(tmp_path / "criserver.db"))) as opened:
        yield opened


@pytest.mark.parametrize("release", RELEASES)
def test_the_records_of_every_release_are_read(release: str, tmp_path: Path) -> None:
    path = str(tmp_path / "criserver.db")
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript((records.DATA / f"{release}.sql").read_text())
    with contextlib.closing(Store(path)) as store:
        stored = RecordStore(store)
    found = {**stored.sandboxes, **stored.containers}
    assert found == {key: SAMPLES[key] for key in found}
    sandbox, container = stored.sandbox("full"), stored.container("full-c")
    assert (sandbox.config, container.config) == (POD, CONTAINER)
    assert {s.state for s in stored.sandboxes.values()} == set(SandboxState)
    assert {c.state for c in stored.containers.values()} == set(ContainerState)
    assert (sandbox.handler, sandbox.runtime, sandbox.cgroup_owned, sandbox.ips, sandbox.selinux_level) == (
        *("crun", "crun", False, ("10.88.0.2", "fd00::2"), "s0:c1,c2"),
    )
    assert Attachment.from_json(sandbox.attachment).ips == sandbox.ips
    assert (container.pid, container.start_ticks, container.user) == (
        4711,
        123_456,
        User(1000, 1001, (1001, 2000, 3000)),
    )
    ended = stored.container("ended")
    assert (ended.exit_code, ended.reason, ended.message, ended.config.security.run_as_username) == (
        *(137, "OOMKilled", "no\nroom", "web"),
    )
    assert stored.sandbox("host").config.namespaces.network is NamespaceMode.NODE
    assert stored.container_name(container) == "nginx_web_shop_8d1f_2_3"


def put(store: Store, record: Record) -> None:
    """Store a record of any state, which a record store would let come about step by step only."""
    store.write_now(Change("sandboxes" if isinstance(record, Sandbox) else "containers", record.id, dump(record)))


def test_what_is_stored_today_is_read_back_and_has_its_version(store: Store) -> None:
    for record in SAMPLES.values():
        put(store, record)
    for table, converted in (("sandboxes", migrations.SANDBOX), ("containers", migrations.CONTAINER)):
        assert {json.loads(value)["version"] for _, value in store.items(table)} == {migrations.newest(converted)}
    again = RecordStore(store)
    assert {**again.sandboxes, **again.containers} == SAMPLES


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(
    messages(cri.PodSandboxConfig),
    messages(cri.ContainerConfig),
    messages(cri.LinuxContainerResources),
    st.text() | st.just("half a character: \ud83d"),
)
def test_every_message_is_read_and_shown(
    pod: cri.PodSandboxConfig, container: cri.ContainerConfig, limits: cri.LinuxContainerResources, words: str
) -> None:
    sandbox = dataclasses.replace(SAMPLES["full"], sent=pod.SerializeToString(), config=parse.pod_config(pod))
    made = dataclasses.replace(
        SAMPLES["ended"],
        sent=container.SerializeToString(),
        config=parse.container_config(container, sandbox.config),
        message=words,
        reason=words,
    )
    parse.resources(limits)
    assert load_sandbox(dump(sandbox)) == sandbox
    assert load_container(dump(made), {sandbox.id: sandbox}) == made
    for view in (views.sandbox(sandbox), views.sandbox_status(sandbox), views.container(made)):
        assert type(view).FromString(view.SerializeToString()) == view
    status = views.container_status(made)
    assert list(status.mounts) == list(container.mounts)
    assert cri.ContainerStatus.FromString(status.SerializeToString()) == status


def secure(**security: Any) -> dict[str, cri.LinuxContainerConfig]:
    return {"linux": cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(**security))}


def profile(kind: Any, path: str = "") -> cri.SecurityProfile:
    return cri.SecurityProfile(profile_type=kind, localhost_ref=path)


UNKNOWN: Any = 9  # a number that no enum of CRI has
LOCALHOST = cri.SecurityProfile.Localhost


@pytest.mark.parametrize(
    ("fields", "strictest"),
    [
        (secure(seccomp=profile(UNKNOWN)), ("default", "", False)),
        (secure(seccomp=profile(LOCALHOST)), ("default", "", False)),
        (secure(seccomp=profile(LOCALHOST, "unconfined")), ("default", "", False)),
        (secure(seccomp_profile_path="unconfined/x"), ("default", "", False)),
        (secure(seccomp_profile_path="localhost/"), ("default", "", False)),
        (secure(apparmor=profile(UNKNOWN)), ("", "runtime/default", False)),
        (secure(apparmor=profile(LOCALHOST)), ("", "runtime/default", False)),
        (secure(apparmor_profile="unconfined/x"), ("", "runtime/default", False)),
        (secure(supplemental_groups_policy=UNKNOWN), ("", "", True)),
    ],
)
def test_what_is_refused_has_the_strictest_meaning_in_a_record(
    fields: dict[str, Any], strictest: tuple[str, str, bool]
) -> None:
    sent = cri.ContainerConfig(metadata=cri.ContainerMetadata(name="c"), image=cri.ImageSpec(image="i"), **fields)
    with pytest.raises(InvalidArgumentError):
        refusals.check_container(sent, POD, cri.PodSandboxConfig())
    found = parse.container_config(sent, POD).security
    assert (found.seccomp, found.apparmor, found.supplemental_groups_strict) == strictest


def test_a_pod_that_is_refused_is_in_no_namespace_and_no_cgroup_that_it_has_not_asked_for() -> None:
    unknown = cri.NamespaceOption(
        network=UNKNOWN, pid=UNKNOWN, ipc=UNKNOWN, userns_options=cri.UserNamespace(mode=UNKNOWN)
    )
    linux = cri.LinuxPodSandboxConfig(
        cgroup_parent="/a/../../b.slice",
        security_context=cri.LinuxSandboxSecurityContext(namespace_options=unknown),
    )
    found = parse.pod_config(cri.PodSandboxConfig(linux=linux))
    nobody = IdMapping(0, 0, 0)
    assert found.namespaces == Namespaces(pid=NamespaceMode.CONTAINER, user=UserNamespace(nobody, nobody))
    assert found.cgroup_parent == "/b.slice"
    assert parse.container_config(cri.ContainerConfig(log_path="../../x"), POD).log_path == ""


def stored(record: Sandbox | Container, **changes: object) -> bytes:
    return json.dumps({**json.loads(dump(record)), **changes}).encode()


@pytest.mark.parametrize(
    ("table", "value", "words"),
    [
        ("sandboxes", stored(SAMPLES["host"], version=7), "of version 7, and this criserver knows 3 at most: a newer"),
        ("containers", stored(SAMPLES["full-c"], version=7, more="x"), "of version 7, and .* start that one again"),
        ("containers", stored(SAMPLES["full-c"], version=0), "damaged .*version 0"),
        ("containers", stored(SAMPLES["full-c"], version="1"), "damaged .*version '1'"),
        ("sandboxes", stored(SAMPLES["host"], state="asleep"), "damaged .*asleep"),
        ("sandboxes", stored(SAMPLES["host"], more="x"), "damaged .*more"),
        ("sandboxes", stored(SAMPLES["host"], sent="?"), "damaged"),
        ("sandboxes", stored(SAMPLES["host"], sent=base64.b64encode(b"\xff").decode()), "damaged .*DecodeError"),
        ("containers", stored(SAMPLES["full-c"], sandbox_id="gone"), "its pod sandbox gone has no record"),
        ("containers", stored(SAMPLES["full-c"], user=[]), "damaged"),
        ("containers", b'{"id":', "damaged"),
        ("containers", b"\xff", "damaged"),
        ("containers", b"[]", "damaged"),
        ("containers", b"[" * 100_000, "damaged"),
    ],
)
async def test_a_record_that_cannot_be_read_says_which_and_how_to_go_on(
    store: Store, table: str, value: bytes, words: str
) -> None:
    put(store, SAMPLES["full"])
    store.write_now(Change(table, "odd", value))
    with pytest.raises(UnreadableError, match=rf"the record odd of {table} is .*{words}.*criserver reset"):
        RecordStore(store)
    lenient = RecordStore(store, skip_unreadable=True)
    assert list(lenient.sandboxes) == ["full"]
    assert list(lenient.unreadable) == [(table, "odd")]
    await lenient.delete_unreadable()
    assert RecordStore(store).sandboxes == {"full": SAMPLES["full"]}


def test_a_record_is_brought_forward_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def more(fields: migrations.Fields) -> migrations.Fields:
        return {**fields, "exit_code": fields["exit_code"] + 1}

    def double(fields: migrations.Fields) -> migrations.Fields:
        return {**fields, "exit_code": fields["exit_code"] * 2}

    monkeypatch.setattr(migrations, "CONTAINER", ())
    first = stored(SAMPLES["ended"], exit_code=10)
    monkeypatch.setattr(migrations, "CONTAINER", (more,))
    second = stored(SAMPLES["ended"], exit_code=10)
    monkeypatch.setattr(migrations, "CONTAINER", (more, double))
    pods = {"full": SAMPLES["full"]}
    assert [load_container(s, pods).exit_code for s in (first, second, dump(SAMPLES["ended"]))] == [22, 20, 137]


def test_an_attachment_that_would_be_refused_today_is_still_given_back_to_its_plugins() -> None:
    document = json.loads(SAMPLES["full"].attachment)
    document["result"]["ips"][0]["address"] = "somewhere"
    found = Attachment.from_json(json.dumps(document))
    assert (found.ips, found.result.raw) == ((), document["result"])


def test_unified_limits_are_read_on_a_host_that_could_not_set_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.exists", lambda path: False)
    sent = records.full_container()
    with pytest.raises(InvalidArgumentError, match="unified"):
        refusals.check_container(sent, POD, cri.PodSandboxConfig())
    assert parse.container_config(sent, POD) == CONTAINER
