"""Records of every kind and state, and the database that a release keeps them in, as SQL.

``python -m tests.support.records 0.2.0`` writes tests/data/records/0.2.0.sql, once, with the code of that release. The
file is never written again: later releases must read what this one stores.
"""

from __future__ import annotations

import dataclasses
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from criserver.model import User
from criserver.network import Attachment
from criserver.network.cni_config import NetworkConfig
from criserver.network.cni_result import parse
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime.lifecycle import ContainerState, SandboxState
from criserver.runtime.parse import container_config, pod_config
from criserver.runtime.records import Container, Sandbox, dump
from criserver.store import Change, Store

DATA = Path(__file__).parents[1] / "data" / "records"

_LIMITS = cri.LinuxContainerResources(
    cpu_period=100_000,
    cpu_quota=50_000,
    cpu_shares=512,
    memory_limit_in_bytes=1 << 28,
    memory_swap_limit_in_bytes=1 << 29,
    oom_score_adj=-997,
    cpuset_cpus="0-1",
    cpuset_mems="0",
    hugepage_limits=[cri.HugepageLimit(page_size="2MB", limit=1 << 22)],
    unified={"memory.high": "200000000", "pids.max": "100"},
)
_USERS = cri.UserNamespace(
    mode=cri.POD,
    uids=[cri.IDMapping(container_id=0, host_id=65_536, length=65_536)],
    gids=[cri.IDMapping(container_id=0, host_id=131_072, length=65_536)],
)
_RESULT = {
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "eth0", "mac": "0a:58:0a:58:00:02", "sandbox": "/run/criserver/ns/full/net"}],
    "ips": [{"interface": 0, "address": "10.88.0.2/16"}, {"interface": 0, "address": "fd00::2/64"}],
}
_ATTACHMENT = Attachment(
    network=NetworkConfig("pods", "1.0.0", ({"type": "bridge"},), False, "10-pods.conflist"),
    container_id="full",
    netns="/run/criserver/ns/full/net",
    ifname="eth0",
    args="IgnoreUnknown=1;K8S_POD_NAME=web",
    capabilities={"portMappings": [{"hostPort": 5353, "containerPort": 53, "protocol": "udp"}]},
    result=parse(_RESULT, ifname="eth0", version="1.0.0"),
)
_SELINUX = cri.SELinuxOption(user="u", role="r", type="t", level="s0:c1,c2")


def full_pod() -> cri.PodSandboxConfig:
    """Every field has a value that is not its default's."""
    return cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name="web", namespace="shop", uid="8d1f", attempt=2),
        hostname="web-0",
        log_directory="/var/log/pods/shop_web_8d1f/",
        dns_config=cri.DNSConfig(servers=["10.96.0.10"], searches=["shop.svc.cluster.local"], options=["ndots:5"]),
        port_mappings=[cri.PortMapping(protocol=cri.UDP, container_port=53, host_port=5353, host_ip="192.0.2.1")],
        labels={"app": "web", "größe": "groß"},
        annotations={"note": "two\nlines"},
        linux=cri.LinuxPodSandboxConfig(
            cgroup_parent="kubepods/burstable/pod8d1f/",
            security_context=cri.LinuxSandboxSecurityContext(
                namespace_options=cri.NamespaceOption(
                    network=cri.POD, pid=cri.CONTAINER, ipc=cri.POD, userns_options=_USERS
                ),
                selinux_options=_SELINUX,
                run_as_user=cri.Int64Value(value=1000),
                run_as_group=cri.Int64Value(value=1001),
                readonly_rootfs=True,
                supplemental_groups=[2000],
                supplemental_groups_policy=cri.Strict,
                privileged=True,
                seccomp=cri.SecurityProfile(profile_type=cri.SecurityProfile.Localhost, localhost_ref="/etc/p.json"),
                apparmor=cri.SecurityProfile(profile_type=cri.SecurityProfile.RuntimeDefault),
                seccomp_profile_path="runtime/default",
            ),
            sysctls={"net.core.somaxconn": "1024"},
            overhead=_LIMITS,
            resources=_LIMITS,
        ),
    )


def full_container() -> cri.ContainerConfig:
    """Every field has a value that is not its default's, but those that rule each other out."""
    ids = [cri.IDMapping(container_id=0, host_id=65_536, length=65_536)]
    localhost = cri.SecurityProfile.Localhost
    return cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="nginx", attempt=3),
        image=cri.ImageSpec(
            image="sha256:" + "a" * 64,
            annotations={"k": "v"},
            user_specified_image="nginx:1.27",
            runtime_handler="crun",
            image_ref="sha256:" + "a" * 64,
        ),
        command=["nginx"],
        args=["-g", "daemon off;"],
        working_dir="/srv",
        envs=[cri.KeyValue(key="A", value="ä=1\n".encode()), cri.KeyValue(key="EMPTY")],
        mounts=[
            cri.Mount(
                container_path="/data/./a",
                host_path="/mnt/b/",
                readonly=True,
                selinux_relabel=True,
                propagation=cri.PROPAGATION_PRIVATE,
                uidMappings=ids,
                gidMappings=ids,
                recursive_read_only=True,
            ),
            cri.Mount(container_path="/shared", host_path="/mnt/s", propagation=cri.PROPAGATION_BIDIRECTIONAL),
            cri.Mount(
                container_path="/volume",
                readonly=True,
                image=cri.ImageSpec(image="tools:1", image_ref="sha256:" + "b" * 64),
                image_sub_path="bin",
            ),
        ],
        devices=[cri.Device(container_path="/dev/f", host_path="/dev/fuse", permissions="rw")],
        labels={"io.kubernetes.container.name": "nginx"},
        annotations={"cdi.k8s.io/old": "vendor.com/net=1"},
        log_path="nginx/3.log",
        stdin=True,
        stdin_once=True,
        tty=True,
        linux=cri.LinuxContainerConfig(
            resources=_LIMITS,
            security_context=cri.LinuxContainerSecurityContext(
                capabilities=cri.Capability(
                    add_capabilities=["NET_ADMIN"], drop_capabilities=["ALL"], add_ambient_capabilities=["CHOWN"]
                ),
                namespace_options=cri.NamespaceOption(
                    network=cri.POD, pid=cri.TARGET, ipc=cri.POD, target_id="plain", userns_options=_USERS
                ),
                selinux_options=_SELINUX,
                run_as_user=cri.Int64Value(value=1000),
                run_as_group=cri.Int64Value(value=1001),
                readonly_rootfs=True,
                supplemental_groups=[2000, 3000],
                supplemental_groups_policy=cri.Strict,
                no_new_privs=True,
                masked_paths=["/proc/kcore"],
                readonly_paths=["/proc/sys"],
                seccomp=cri.SecurityProfile(profile_type=localhost, localhost_ref="/etc/seccomp.json"),
                apparmor=cri.SecurityProfile(profile_type=localhost, localhost_ref="web"),
                apparmor_profile="localhost/web",
                seccomp_profile_path="localhost//etc/seccomp.json",
            ),
        ),
        CDI_devices=[cri.CDIDevice(name="vendor.com/gpu=0")],
        stop_signal=cri.SIGRTMINPLUS3,
    )


def sandbox(
    name: str, state: SandboxState = SandboxState.CREATING, sent: cri.PodSandboxConfig | None = None, **fields: Any
) -> Sandbox:
    sent = sent or cri.PodSandboxConfig(metadata=cri.PodSandboxMetadata(name=name, namespace="n", uid="u"))
    made = Sandbox(
        id=name,
        config=pod_config(sent),
        sent=sent.SerializeToString(deterministic=True),
        handler="",
        state=state,
        created_at=1_700_000_000_000_000_001,
        cgroup_parent=f"/criserver/{name}",
        cgroup_owned=True,
        runtime="runc",
    )
    return dataclasses.replace(made, **fields)


def container(
    name: str,
    pod: Sandbox,
    state: ContainerState = ContainerState.CREATING,
    sent: cri.ContainerConfig | None = None,
    **fields: Any,
) -> Container:
    sent = sent or cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name=name), image=cri.ImageSpec(image="i"), command=["true"]
    )
    made = Container(
        id=name,
        sandbox_id=pod.id,
        config=container_config(sent, pod.config),
        sent=sent.SerializeToString(deterministic=True),
        image_id="sha256:" + "a" * 64,
        image_ref="registry.example/nginx@sha256:" + "c" * 64,
        state=state,
        created_at=1_700_000_000_000_000_002,
        log_path="",
        stop_signal=15,
    )
    return dataclasses.replace(made, **fields)


def samples() -> Iterator[Sandbox | Container]:
    """Sandboxes and containers, each of every state; each sandbox before its containers."""
    full = sandbox(
        "full",
        SandboxState.READY,
        full_pod(),
        handler="crun",
        runtime="crun",
        cgroup_parent="/kubepods/burstable/pod8d1f",
        cgroup_owned=False,
        attachment=_ATTACHMENT.to_json(),
        ips=("10.88.0.2", "fd00::2"),
        selinux_level="s0:c1,c2",
    )
    modes = cri.NamespaceOption(network=cri.NODE, pid=cri.NODE, ipc=cri.NODE)
    host = sandbox(
        "host",
        SandboxState.NOT_READY,
        cri.PodSandboxConfig(
            metadata=cri.PodSandboxMetadata(name="host", namespace="n", uid="u"),
            linux=cri.LinuxPodSandboxConfig(
                cgroup_parent="kubepods.slice",
                security_context=cri.LinuxSandboxSecurityContext(namespace_options=modes),
            ),
        ),
    )
    yield from (full, host, sandbox("making", SandboxState.CREATING), sandbox("going", SandboxState.REMOVING))
    ran = {
        "pid": 4711,
        "start_ticks": 123_456,
        "started_at": 1_700_000_000_000_000_003,
        "user": User(1000, 1001, (1001, 2000, 3000)),
        "log_path": "/var/log/pods/shop_web_8d1f/nginx/3.log",
        "stop_signal": 37,
    }
    yield container("full-c", full, ContainerState.RUNNING, full_container(), **ran)
    ended = {"finished_at": 1_700_000_000_000_000_004, "exit_code": 137, "reason": "OOMKilled", "message": "no\nroom"}
    named = cri.LinuxContainerSecurityContext(privileged=True, run_as_username="web")
    sent = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="ended"),
        image=cri.ImageSpec(image="i"),
        linux=cri.LinuxContainerConfig(security_context=named),
    )
    yield container("ended", full, ContainerState.EXITED, sent, **ran, **ended)
    for state in (ContainerState.CREATING, ContainerState.CREATED, ContainerState.STARTING, ContainerState.REMOVING):
        yield container(state.value, host, state)


def sql() -> str:
    """The samples' database, as SQL that can be read."""
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "criserver.db")
        store = Store(path)
        for record in samples():
            store.write_now(
                Change("sandboxes" if isinstance(record, Sandbox) else "containers", record.id, dump(record))
            )
        store.close()
        db = sqlite3.connect(path)
        (version,) = db.execute("PRAGMA user_version").fetchone()
        lines = [f"PRAGMA user_version={version};"]
        lines += [f"{text};" for (text,) in db.execute("SELECT sql FROM sqlite_master ORDER BY name")]
        for table in ("sandboxes", "containers"):
            for key, value in db.execute(f"SELECT key, value FROM {table} ORDER BY key"):
                quoted = value.decode().replace("'", "''")
                lines.append(f"INSERT INTO {table} VALUES('{key}', CAST('{quoted}' AS BLOB));")
        db.close()
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DATA.mkdir(parents=True, exist_ok=True)
    with (DATA / f"{sys.argv[1]}.sql").open("x") as file:
        file.write(sql())
