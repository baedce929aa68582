"""For any request, the spec is valid: by properties, and by the schema of the specification.

The schema is the runtime specification's own, as Debian packages it; OCI_RUNTIME_SCHEMA names another directory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT4

from criserver.errors import InvalidArgumentError
from criserver.model import (
    ContainerConfig,
    Device,
    IdMapping,
    Mount,
    NamespaceMode,
    Namespaces,
    Propagation,
    Resources,
    Security,
    User,
)
from criserver.oci import spec
from criserver.oci.capabilities import DEFAULT_CAPABILITIES
from criserver.oci.infra_spec import build_infra
from criserver.oci.spec_inputs import DeviceNode, HostFacts, ImageDefaults, PodFacts, Spec

PACKAGED = "/usr/share/gocode/src/github.com/opencontainers/runtime-spec/schema"
SCHEMA = os.environ.get("OCI_RUNTIME_SCHEMA", PACKAGED)
BASE_MOUNTS = ("/proc", "/dev", "/dev/pts", "/dev/mqueue", "/sys", "/sys/fs/cgroup", "/dev/shm")
KNOWN = (*DEFAULT_CAPABILITIES, "CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE")

# What parse.py lets through: text without NUL, absolute and normal paths, numbers of CRI's types.
text = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=8)
words = st.lists(text, max_size=4).map(tuple)
names = st.sampled_from(["PATH", "TERM", "HOSTNAME", "HOME", "A", "B", "\u00e9"])
texts = st.dictionaries(text.filter(bool), text, max_size=4)
segments = st.sampled_from(["etc", "hosts", "dev", "shm", "proc", "sys", "a", "b", "\u00e9 x"])
paths = st.lists(segments, min_size=1, max_size=4).map(lambda found: "/" + "/".join(found))
limits = st.integers(0, 2**63 - 1)
signed = st.integers(-1, 2**63 - 1)
numbers = st.integers(0, 2**32 - 2)
capabilities = st.lists(
    st.sampled_from([*KNOWN, "ALL", "all", "CHOWN", "net_admin", "cap_kill", "FLY", ""]), max_size=5
).map(tuple)

id_mappings = st.lists(
    st.builds(IdMapping, container_id=numbers, host_id=numbers, length=numbers.filter(bool)), min_size=1, max_size=3
).map(tuple)
mounts = st.builds(
    Mount,
    container_path=st.one_of(paths, st.sampled_from(["/etc/hosts", "/etc/resolv.conf", "/dev/shm", "/"])),
    host_path=paths,
    readonly=st.booleans(),
    propagation=st.sampled_from(Propagation),
    recursive_readonly=st.booleans(),
)
mapped = st.builds(dataclasses.replace, mounts, uids=id_mappings, gids=id_mappings)
devices = st.builds(
    Device, container_path=paths, host_path=paths, permissions=st.sampled_from(["r", "w", "m", "rw", "rm", "wm", "rwm"])
)
resources = st.builds(
    Resources,
    cpu_period=limits,
    cpu_quota=signed,
    cpu_shares=limits,
    memory_limit=signed,
    memory_swap_limit=signed,
    oom_score_adj=st.integers(-1000, 1000),
    cpuset_cpus=st.sampled_from(["", "0", "0-3,7"]),
    cpuset_mems=st.sampled_from(["", "0", "0-1"]),
    # All but the last can be limited on the hosts below; a limit of 0 for that one is what a kubelet may send.
    hugepage_limits=st.lists(
        st.one_of(st.tuples(st.sampled_from(["64KB", "2MB"]), limits), st.just(("1GB", 0))), max_size=3
    ).map(tuple),
    unified=texts,
)
security = st.builds(
    Security,
    privileged=st.booleans(),
    readonly_rootfs=st.booleans(),
    no_new_privs=st.booleans(),
    add_capabilities=capabilities,
    drop_capabilities=capabilities,
    ambient_capabilities=capabilities,
    masked_paths=st.lists(paths, max_size=4, unique=True).map(tuple),
    readonly_paths=st.lists(paths, max_size=4, unique=True).map(tuple),
    apparmor=st.one_of(st.just("unconfined"), text),
)
namespaces = st.builds(Namespaces, pid=st.sampled_from(NamespaceMode))
configs = st.builds(
    ContainerConfig,
    name=text.filter(bool),
    attempt=numbers,
    image=text.filter(bool),
    command=words,
    args=words,
    working_dir=st.one_of(st.just(""), paths),
    envs=st.lists(st.tuples(names, text), max_size=6).map(tuple),
    mounts=st.lists(st.one_of(mounts, mapped), max_size=6).map(tuple),
    devices=st.lists(devices, max_size=4).map(tuple),
    cdi_devices=st.just(()),
    labels=texts,
    annotations=texts,
    log_path=st.one_of(st.just(""), paths),
    stdin=st.booleans(),
    stdin_once=st.booleans(),
    tty=st.booleans(),
    resources=resources,
    security=security,
    namespaces=namespaces,
    stop_signal=st.sampled_from(["", "SIGTERM", "SIGUSR1"]),
)
images = st.builds(
    ImageDefaults,
    entrypoint=words,
    cmd=words,
    env=st.lists(st.tuples(names, text).map("=".join), max_size=4).map(tuple),
    working_dir=st.one_of(st.just(""), paths),
)
pins = st.one_of(st.none(), paths)
pods = st.builds(
    PodFacts,
    hostname=text,
    resolv_conf=paths,
    hosts=paths,
    hostname_file=paths,
    shm=paths,
    net_namespace=pins,
    ipc_namespace=pins,
    uts_namespace=pins,
    pid_namespace=pins,
    user_namespace=pins,
)
users = st.builds(User, uid=numbers, gid=numbers, groups=st.lists(numbers, max_size=3, unique=True).map(tuple))
hosts = st.builds(
    HostFacts,
    capabilities=st.just(KNOWN),
    open_files=st.one_of(st.none(), st.just((1024, 1 << 20))),
    oom_score_adj_floor=st.integers(-1000, 1000),
    unified_cgroups=st.booleans(),
    swap_accounting=st.booleans(),
    hugepage_sizes=st.just(frozenset({"64KB", "2MB"})),
)


@st.composite
def asked(draw: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a build that belong together: a node for each device."""
    config = draw(configs)
    nodes = [
        DeviceNode(
            path=device.container_path,
            kind=draw(st.sampled_from("cb")),
            major=draw(st.integers(0, 4095)),
            minor=draw(st.integers(0, 2**20 - 1)),
            mode=stat.S_IFCHR | draw(st.integers(0, 0o777)),
            uid=draw(numbers),
            gid=draw(numbers),
        )
        for device in config.devices
    ]
    return {
        "config": config,
        "image": draw(images),
        "user": draw(users),
        "pod": draw(pods),
        "host": draw(hosts),
        "cgroups_path": draw(st.sampled_from(["/kubepods/pod1/c", "kubepods-pod1.slice:criserver:c"])),
        "rootfs": draw(paths),
        "devices": nodes,
        "seccomp": draw(st.sampled_from([None, {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []}])),
        "selinux_label": draw(st.sampled_from(["", "system_u:system_r:container_t:s0:c1,c2"])),
        "annotations": draw(texts),
    }


def built(arguments: dict[str, Any]) -> Spec | None:
    """The document, None where the arguments are refused as they should be."""
    try:
        return spec.build(**arguments)
    except InvalidArgumentError:
        config, image = arguments["config"], arguments["image"]
        given = {
            *config.security.add_capabilities,
            *config.security.drop_capabilities,
            *config.security.ambient_capabilities,
        }
        no_command = not (config.command or image.entrypoint or config.args or image.cmd)
        assert no_command or given & {"FLY", ""}, "there was nothing to refuse"
        return None


many = settings(max_examples=100)


@many
@given(asked())
def test_a_document_is_plain_json_and_nothing_is_asked_twice(arguments: dict[str, Any]) -> None:
    if (document := built(arguments)) is None:
        return
    assert json.loads(json.dumps(document)) == document
    assert spec.build(**arguments) == document, "the same arguments give the same document"
    env = [line.partition("=")[0] for line in document["process"]["env"]]
    assert len(env) == len(set(env))
    assert (
        dict(arguments["config"].envs).items()
        <= {name: line.partition("=")[2] for name, line in zip(env, document["process"]["env"], strict=True)}.items()
    )
    kinds = [namespace["type"] for namespace in document["linux"]["namespaces"]]
    assert len(kinds) == len(set(kinds))
    assert "mount" in kinds


@many
@given(asked())
def test_mounts_come_parents_first_and_none_is_lost(arguments: dict[str, Any]) -> None:
    if (document := built(arguments)) is None:
        return
    order = [mount["destination"] for mount in document["mounts"]]
    depths = [0 if path == "/" else path.count("/") for path in order]
    assert all(before <= after for before, after in pairwise(depths))
    mounts = arguments["config"].mounts
    given = [mount.container_path for mount in mounts]
    # What is below these is theirs: a mount of the runtime's would be made on the node, or travel to it.
    taken = [
        m.container_path for m in mounts if m.propagation is Propagation.BIDIRECTIONAL or m.container_path == "/dev"
    ]
    for path in {*BASE_MOUNTS, "/etc/hosts", "/etc/resolv.conf", "/etc/hostname"}:
        own = path not in given and not any(path.startswith(top.rstrip("/") + "/") for top in taken)
        assert order.count(path) == given.count(path) + own, "the kubelet's mount replaces the runtime's"
    assert set(given) <= set(order)


@many
@given(asked())
def test_capability_sets_agree(arguments: dict[str, Any]) -> None:
    if (document := built(arguments)) is None:
        return
    sets = {kind: set(found) for kind, found in document["process"]["capabilities"].items()}
    assert set(sets) == {"bounding", "effective", "permitted", "inheritable", "ambient"}
    # The kernel takes an ambient capability only where it is permitted and inheritable (capabilities(7)).
    assert sets["ambient"] <= sets["permitted"] & sets["inheritable"]
    assert sets["effective"] <= sets["permitted"] <= sets["bounding"] <= set(KNOWN)
    if arguments["config"].security.privileged:
        assert sets["bounding"] == set(KNOWN)


@many
@given(asked())
def test_devices_are_denied_before_any_is_allowed(arguments: dict[str, Any]) -> None:
    if (document := built(arguments)) is None:
        return
    rules = document["linux"]["resources"]["devices"]
    if arguments["config"].security.privileged:
        assert rules == [{"allow": True, "access": "rwm"}]
        return
    assert rules[0] == {"allow": False, "access": "rwm"}
    assert [rule["access"] for rule in rules[1:]] == [d.permissions for d in arguments["config"].devices]
    assert all(rule["allow"] and {"type", "major", "minor"} <= rule.keys() for rule in rules[1:])
    assert document["process"]["oomScoreAdj"] >= arguments["host"].oom_score_adj_floor


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft4Validator:
    """A validator of the runtime specification's own schema."""
    if not os.path.exists(os.path.join(SCHEMA, "config-schema.json")):
        pytest.skip(f"there is no {SCHEMA}/config-schema.json: install golang-github-opencontainers-specs-dev")

    def retrieve(name: str) -> Resource:
        with open(os.path.join(SCHEMA, os.path.basename(name))) as f:
            return Resource.from_contents(json.load(f), default_specification=DRAFT4)

    registry = Registry(retrieve=retrieve)  # type: ignore[call-arg]  # its attribute is private, its argument is not
    return jsonschema.Draft4Validator({"$ref": "config-schema.json"}, registry=registry)


def test_the_schema_refuses_what_is_wrong(validator: jsonschema.Draft4Validator) -> None:
    arguments = {"ociVersion": "1.0.2", "linux": {"resources": {"cpu": {"shares": -1}}}}
    assert [list(e.absolute_path) for e in validator.iter_errors(arguments)] == [
        ["linux", "resources", "cpu", "shares"]
    ]


@many
@given(arguments=asked())
def test_a_document_is_valid_by_the_schema(validator: jsonschema.Draft4Validator, arguments: dict[str, Any]) -> None:
    if (document := built(arguments)) is not None:
        # The schema has only the names that are not recursive. runc and crun take both, and with those of the
        # schema the mounts below the root would keep the host's propagation.
        propagation = document["linux"].pop("rootfsPropagation", "rslave")
        assert propagation in ("rslave", "rshared")
        validator.validate(document)
        validator.validate({**document, "process": spec.exec_process(document, ["ls"], tty=True)})


@many
@given(program=paths, rootfs=paths, pod=pods, host=hosts)
def test_the_infra_process_is_valid_by_the_schema(
    validator: jsonschema.Draft4Validator, program: str, rootfs: str, pod: PodFacts, host: HostFacts
) -> None:
    validator.validate(build_infra(program=program, rootfs=rootfs, pod=pod, host=host, cgroups_path="/p/c"))
