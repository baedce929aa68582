"""The Container Device Interface: which files are read, which device is found, and how it changes a spec."""

from __future__ import annotations

import copy
import errno
import json
import os
import stat
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criserver.errors import CriError, FailedPreconditionError, InvalidArgumentError, NotFoundError, exhaustion
from criserver.oci import cdi, cdi_edits, cdi_files
from criserver.oci.adjustment_faults import RuntimeFacts, runtime_facts
from snapshotter import files

KIND = "vendor.com/gpu"
PLAIN = RuntimeFacts()


def write(directory: Path, name: str = "vendor.json", **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    document = {"cdiVersion": "1.0.0", "kind": KIND, "devices": [{"name": "0"}], **changes}
    (directory / name).write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
    return directory / name


def device(name: str, **edits: Any) -> dict[str, Any]:
    return {"name": name, "containerEdits": edits}


def edits_of(tmp_path: Path, *names: str, **changes: Any) -> cdi.ContainerEdits:
    write(tmp_path, **changes)
    return cdi.resolve(names or [f"{KIND}=0"], cdi.load([str(tmp_path)]), PLAIN)


def spec(**process: Any) -> dict[str, Any]:
    return {
        "process": {"user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin", "A=1"], **process},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"resources": {"devices": [{"allow": False, "access": "rwm"}]}, "devices": []},
    }


def host(
    kind: int = stat.S_IFCHR, mode: int = 0o640, uid: int = 3, gid: int = 4, rdev: tuple[int, int] = (10, 229)
) -> Callable[[str], os.stat_result]:
    result = os.stat_result((kind | mode, 0, 0, 1, uid, gid, 0, 0, 0, 0), {"st_rdev": os.makedev(*rdev)})
    return lambda path: result


def missing(path: str) -> os.stat_result:
    raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)


LETTERS = string.ascii_letters
ALNUM = LETTERS + string.digits


def word(first: str, inner: str, longest: int) -> st.SearchStrategy[str]:
    middle = st.text(inner, max_size=longest - 2)
    return st.sampled_from(first) | st.builds(
        lambda a, b, c: a + b + c, st.sampled_from(first), middle, st.sampled_from(ALNUM)
    )


VENDORS = word(LETTERS, ALNUM + "_-.", 253)
CLASSES = word(LETTERS, ALNUM + "_-.", 63)
DEVICES = word(ALNUM, ALNUM + "_-.:", 100)


@given(VENDORS, CLASSES, DEVICES)
def test_every_name_of_the_grammar_is_taken_apart(vendor: str, class_: str, name: str) -> None:
    assert cdi.parse_name(f"{vendor}/{class_}={name}") == (f"{vendor}/{class_}", name)


@given(st.text(LETTERS + "/=._-:1\n ", max_size=20))
def test_any_other_name_is_refused(text: str) -> None:
    try:
        kind, name = cdi.parse_name(text)
    except InvalidArgumentError:
        return
    assert f"{kind}={name}" == text
    vendor, class_ = kind.split("/")
    for part, first, inner in ((vendor, LETTERS, "_-."), (class_, LETTERS, "_-."), (name, ALNUM, "_-.:")):
        assert part[0] in first
        assert part[-1] in ALNUM
        assert set(part) <= set(ALNUM + inner)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/dev/fuse",
        "gpu=0",
        "vendor.com/gpu",
        "vendor.com/gpu=",
        "/gpu=0",
        "vendor.com/=0",
        "1vendor/gpu=0",
        "vendor./gpu=0",
        "vendor.com/gpu-=0",
        "vendor.com/a/b=0",
        "vendor.com/gpu=0:",
        "vendor.com/gpu=0=1",
        "vendor.com/gpu=0\n",
        "vendör.com/gpu=0",
        f"{'v' * 254}/gpu=0",
        f"vendor.com/{'g' * 64}=0",
    ],
)
def test_malformed_names(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="form vendor"):
        cdi.resolve([name], cdi.load([]), PLAIN)


def test_annotations_name_devices() -> None:
    annotations = {
        "cdi.k8s.io/b": "vendor.com/gpu=1",
        "cdi.k8s.io/a": "vendor.com/gpu=0,vendor.com/nic=x",
        "other/cdi.k8s.io/": "nothing",
    }
    assert cdi.from_annotations(annotations) == ("vendor.com/gpu=0", "vendor.com/nic=x", "vendor.com/gpu=1")
    # What is no name is refused elsewhere: annotations of a record are read, whatever they are.
    assert cdi.from_annotations({"cdi.k8s.io/a": "vendor.com/gpu=0,gpu0"}) == ("vendor.com/gpu=0", "gpu0")


def test_no_directories_and_no_devices(tmp_path: Path) -> None:
    registry = cdi.load([str(tmp_path / "no"), str(tmp_path / "neither")])
    assert cdi.resolve([], registry, PLAIN) == cdi.ContainerEdits()
    with pytest.raises(NotFoundError, match=f"vendor.com/gpu=0 is in no file .*{tmp_path}/no, {tmp_path}/neither"):
        cdi.resolve(["vendor.com/gpu=0"], registry, PLAIN)


def test_common_edits_come_once_and_first(tmp_path: Path) -> None:
    write(
        tmp_path,
        containerEdits={"env": ["COMMON=1"]},
        devices=[device("0", env=["ZERO=1"]), device("1", env=["ONE=1"]), device("2", env=["TWO=1"])],
    )
    write(tmp_path, "nic.json", kind="vendor.com/nic", devices=[device("a", env=["NIC=1"])])
    names = ["vendor.com/nic=a", f"{KIND}=1", f"{KIND}=0", f"{KIND}=1"]
    assert cdi.resolve(names, cdi.load([str(tmp_path)]), PLAIN).env == ("NIC=1", "COMMON=1", "ONE=1", "ZERO=1")


def test_a_later_directory_overrides(tmp_path: Path) -> None:
    low, high = tmp_path / "low", tmp_path / "high"
    for directory in (low, high):
        write(directory, devices=[device("0", env=[f"FROM={directory.name}"])])
    write(low, "b.json", devices=[device("1", env=["FROM=only"])])
    registry = cdi.load([str(low), str(high)])
    assert cdi.resolve([f"{KIND}=0"], registry, PLAIN).env == ("FROM=high",)
    assert cdi.resolve([f"{KIND}=1"], registry, PLAIN).env == ("FROM=only",)


def test_two_files_of_one_directory_are_a_conflict(tmp_path: Path) -> None:
    low, high = tmp_path / "low", tmp_path / "high"
    for name in ("a.json", "b.json"):
        write(low, name)
    registry = cdi.load([str(low)])
    with pytest.raises(NotFoundError, match=f"=0 is in each of {low}/a.json, {low}/b.json"):
        cdi.resolve([f"{KIND}=0"], registry, PLAIN)
    write(high)
    assert cdi.resolve([f"{KIND}=0"], cdi.load([str(low), str(high)]), PLAIN) == cdi.ContainerEdits()


def test_every_missing_device_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(NotFoundError) as caught:
        cdi.resolve([f"{KIND}=7", f"{KIND}=0", "other.org/x=y"], cdi.load([str(tmp_path)]), PLAIN)
    assert f"{KIND}=7 is in no file" in str(caught.value)
    assert "other.org/x=y is in no file" in str(caught.value)
    assert f"{KIND}=0" not in str(caught.value)


def test_files_are_read_again_only_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, devices=[device("0", env=["A=1"])])
    write(tmp_path, "other.json", kind="vendor.com/nic")
    read: list[str] = []
    reader = files.read
    monkeypatch.setattr(files, "read", lambda name, limit: read.append(name) or reader(name, limit))
    first = cdi.load([str(tmp_path)])
    assert len(read) == 2
    assert cdi.load([str(tmp_path)], first) == first
    assert len(read) == 2
    write(tmp_path, devices=[device("0", env=["LONGER=1"])])
    second = cdi.load([str(tmp_path)], first)
    assert read[2:] == [str(path)]
    assert cdi.resolve([f"{KIND}=0"], second, PLAIN).env == ("LONGER=1",)
    path.unlink()
    with pytest.raises(NotFoundError):
        cdi.resolve([f"{KIND}=0"], cdi.load([str(tmp_path)], second), PLAIN)


def test_what_is_no_cdi_file_is_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("{")
    (tmp_path / "folder.json").mkdir()
    assert cdi.load([str(tmp_path)]).files == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cdiVersion": "1.2.0"}, "key cdiVersion: '1.2.0' is not one of"),
        ({"cdiVersion": None}, "cdiVersion"),
        ({"cdiVersion": 1}, "key cdiVersion"),
        ({"kind": "gpu"}, "key kind"),
        ({"kind": "vendor.com/gpu/x"}, "key kind"),
        ({"kind": "vendor.com/gpu="}, "key kind"),
        ({"devices": []}, "key devices"),
        ({"devices": [{"name": "-a"}]}, "key devices.0.name"),
        ({"devices": [{"name": "a"}, {"name": "a"}]}, "key devices.1.name: .*twice"),
        ({"device": []}, "'device'"),
        ({"containerEdits": {"env": ["A"]}}, "key containerEdits.env.0"),
        ({"containerEdits": {"netDevices": []}}, "does not have netDevices.*1.1.0"),
        ({"containerEdits": {"intelRdt": {"schemata": []}}}, "does not have schemata.*1.1.0"),
        (
            {"cdiVersion": "1.1.0", "containerEdits": {"netDevices": [{"hostInterfaceName": "a/b", "name": "c"}]}},
            "netDevices.0.hostInterfaceName",
        ),
        ({"containerEdits": {"deviceNodes": [{"path": "dev/a"}]}}, "key containerEdits.deviceNodes.0.path"),
        ({"containerEdits": {"deviceNodes": [{"path": "/a", "type": "x"}]}}, "deviceNodes.0.type"),
        ({"containerEdits": {"deviceNodes": [{"path": "/a", "permissions": "rx"}]}}, "deviceNodes.0.permissions"),
        ({"containerEdits": {"mounts": [{"hostPath": "/a"}]}}, "containerPath"),
        ({"containerEdits": {"hooks": [{"hookName": "never", "path": "/a"}]}}, "hooks.0.hookName"),
        ({"containerEdits": {"hooks": [{"hookName": "prestart", "path": "a"}]}}, "hooks.0.path"),
        ({"containerEdits": {"intelRdt": {"closID": ".."}}}, "intelRdt.closID"),
        ({"containerEdits": {"additionalGids": [-1]}}, "additionalGids.0"),
        ({"cdiVersion": "0.6.0", "containerEdits": {"additionalGids": [1]}}, "does not have additionalGids.*0.7.0"),
        ({"cdiVersion": "0.6.0", "containerEdits": {"intelRdt": {}}}, "does not have intelRdt.*0.7.0"),
        ({"cdiVersion": "0.5.0", "annotations": {"a": "b"}}, "does not have annotations.*0.6.0"),
        ({"cdiVersion": "0.5.0", "kind": "vendor.com/a.b"}, "does not have a dot.*0.6.0"),
        ({"cdiVersion": "0.4.0"}, "digit first.*0.5.0"),
        (
            {"cdiVersion": "0.4.0", "devices": [device("a", deviceNodes=[{"path": "/a", "hostPath": "/b"}])]},
            "does not have hostPath.*0.5.0",
        ),
        (
            {
                "cdiVersion": "0.3.0",
                "devices": [device("a", mounts=[{"hostPath": "/", "containerPath": "/", "type": ""}])],
            },
            "does not have a mount's type.*0.4.0",
        ),
    ],
)
def test_a_file_that_breaks_the_rules_is_passed_over(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, **changes)
    write(tmp_path, "good.json", kind="vendor.com/good")
    registry = cdi.load([str(tmp_path)])
    with pytest.raises(NotFoundError, match=f"{path} is not used: .*{message}"):
        cdi.resolve([f"{KIND}=0"], registry, PLAIN)
    assert cdi.resolve(["vendor.com/good=0"], registry, PLAIN) == cdi.ContainerEdits()


@pytest.mark.parametrize("version", cdi_files.VERSIONS)
def test_every_version_is_read(tmp_path: Path, version: str) -> None:
    found = edits_of(tmp_path, f"{KIND}=a", cdiVersion=version, devices=[device("a", env=["A=1"])])
    assert found.env == ("A=1",)


YAML = """
cdiVersion: 0.6.0
kind: nvidia.com/gpu
devices:
  - name: "0"
    containerEdits:
      env: [GPU=0]
"""


def test_yaml_files_are_as_good_as_json(tmp_path: Path) -> None:
    (tmp_path / "nvidia.yaml").write_text(YAML)
    edits = cdi.resolve(["nvidia.com/gpu=0"], cdi.load([str(tmp_path)]), PLAIN)
    assert edits.env == ("GPU=0",)


def test_a_yaml_file_may_have_numbers_where_texts_are_due(tmp_path: Path) -> None:
    text = YAML.replace('"0"', "0").replace(
        "[GPU=0]", "[GPU=0]\n      hooks: [{hookName: prestart, path: /a, args: [a, 5]}]"
    )
    (tmp_path / "nvidia.yaml").write_text(text)
    edits = cdi.resolve(["nvidia.com/gpu=0"], cdi.load([str(tmp_path)]), PLAIN)
    assert edits.hooks == (("prestart", {"path": "/a", "args": ["a", "5"]}),)


def test_keys_that_are_null_are_not_set(tmp_path: Path) -> None:
    nodes = [{"path": "/dev/a", "hostPath": None, "type": "c", "major": 1, "fileMode": None}]
    changes = device("0", env=None, mounts=None, hooks=None, intelRdt=None, deviceNodes=nodes)
    found = edits_of(tmp_path, cdiVersion="v0.5.0", devices=[changes])
    assert (found.nodes[0].host_path, found.nodes[0].mode) == ("/dev/a", None)


def test_a_runtime_that_would_leave_an_edit_out_is_refused(tmp_path: Path) -> None:
    able = runtime_facts({"linux": {"netDevices": {"enabled": True}, "intelRdt": {"schemata": True}}})
    nics = [{"hostInterfaceName": "eth5", "name": "net1"}]
    write(tmp_path, cdiVersion="1.1.0", devices=[device("0", netDevices=nics, intelRdt={"schemata": ["MB:0=10"]})])
    catalog = cdi.load([str(tmp_path)])
    with pytest.raises(FailedPreconditionError, match=r"gpu=0 need an OCI runtime that reports netDevices, intelRdt\."):
        cdi.resolve([f"{KIND}=0"], catalog, PLAIN)
    found = cdi.apply(spec(), cdi.resolve([f"{KIND}=0"], catalog, able))
    assert found["linux"]["netDevices"] == {"eth5": {"name": "net1"}}
    assert found["linux"]["intelRdt"] == {"schemata": ["MB:0=10"]}


def test_a_yaml_file_that_is_none_is_named_where_a_device_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "nvidia.yaml").write_text("cdiVersion: [")
    with pytest.raises(NotFoundError, match=r"nvidia\.yaml is not used: it is not valid YAML"):
        cdi.resolve(["nvidia.com/gpu=0"], cdi.load([str(tmp_path)]), PLAIN)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "broken.json").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "large.json").write_bytes(b" " * (cdi_files.MAX_FILE + 1))
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    faults = {os.path.basename(f.path): f.fault for f in cdi.load([str(tmp_path)]).files}
    assert "No such file" in faults["broken.json"]
    assert "regular" in faults["fifo.json"]
    assert "larger" in faults["large.json"]
    assert "JSON" in faults["text.json"]
    assert "top level" in faults["list.json"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "containerEdits", "env", "deviceNodes", "mounts", "hooks", "path", "intelRdt"]),
            inner,
        )
    ),
)


@given(JSON, JSON, JSON)
def test_no_file_hinders_the_others(
    tmp_path_factory: pytest.TempPathFactory, kind: Any, devices: Any, edits: Any
) -> None:
    directory = tmp_path_factory.mktemp("cdi")
    write(directory, kind=kind, devices=devices, containerEdits=edits)
    write(directory, "good.json", kind="vendor.com/good")
    try:
        assert cdi.resolve(["vendor.com/good=0"], cdi.load([str(directory)]), PLAIN) == cdi.ContainerEdits()
    except CriError as e:
        pytest.fail(str(e))


def test_environment_is_set_in_place(tmp_path: Path) -> None:
    edits = edits_of(tmp_path, containerEdits={"env": ["A=2", "B=x=y"]})
    assert cdi.apply(spec(), edits)["process"]["env"] == ["PATH=/bin", "A=2", "B=x=y"]


def test_a_node_is_filled_in_from_the_host(tmp_path: Path) -> None:
    nodes = [{"path": "/dev/a", "hostPath": "/dev/fuse", "permissions": "rw"}]
    found = cdi.apply(spec(), edits_of(tmp_path, containerEdits={"deviceNodes": nodes}), host())["linux"]
    assert found["devices"] == [
        {"path": "/dev/a", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 3, "gid": 4}
    ]
    assert found["resources"]["devices"] == [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"},
    ]


def test_a_node_of_another_path_is_mounted_in_a_user_namespace(tmp_path: Path) -> None:
    nodes = [{"path": "/dev/a", "hostPath": "/dev/b"}, {"path": "/dev/c"}]
    edits = edits_of(tmp_path, containerEdits={"deviceNodes": nodes})
    before = spec()
    before["linux"]["namespaces"] = [{"type": "user", "path": "/n/user"}]
    found = cdi.apply(before, edits, host())
    assert [device["path"] for device in found["linux"]["devices"]] == ["/dev/c"]
    assert found["mounts"][-1] == {
        "destination": "/dev/a",
        "type": "bind",
        "source": "/dev/b",
        "options": ["rbind", "rprivate", "rw"],
    }
    assert len(found["linux"]["resources"]["devices"]) == 2  # the denial of all, and one device by its number
    assert cdi.apply(found, edits, host()) == found


def test_a_node_says_everything_itself(tmp_path: Path) -> None:
    node = {"path": "/dev/a", "type": "b", "major": 8, "minor": 1, "fileMode": 0o60600, "uid": 1, "gid": 2}
    edits = edits_of(tmp_path, containerEdits={"deviceNodes": [node]})
    for stat_of in (missing, host()):
        found = cdi.apply(spec(user={"uid": 9, "gid": 9}), edits, stat_of)["linux"]
        assert found["devices"] == [{**node, "fileMode": 0o600}]
        assert found["resources"]["devices"][1]["access"] == "rwm"


def test_a_node_without_an_owner_is_the_containers_users(tmp_path: Path) -> None:
    edits = edits_of(tmp_path, containerEdits={"deviceNodes": [{"path": "/dev/a"}]})
    found = cdi.apply(spec(user={"uid": 1000, "gid": 0}), edits, host())["linux"]["devices"][0]
    assert (found["uid"], found["gid"], found["fileMode"]) == (1000, 4, 0o640)


@pytest.mark.parametrize(
    ("node", "stat_of", "expected"),
    [
        ({"type": "u"}, host(), ("c", 1)),
        ({}, host(stat.S_IFBLK), ("b", 1)),
        ({}, host(stat.S_IFIFO), ("p", 0)),
        ({"type": "p"}, missing, ("p", 0)),
        ({"permissions": "none"}, host(), ("c", 0)),
        ({"permissions": ""}, host(), ("c", 1)),
    ],
)
def test_kinds_of_nodes(
    tmp_path: Path, node: dict[str, Any], stat_of: cdi_edits.StatCall, expected: tuple[str, int]
) -> None:
    edits = edits_of(tmp_path, containerEdits={"deviceNodes": [{"path": "/dev/a", **node}]})
    found = cdi.apply(spec(), edits, stat_of)["linux"]
    assert (found["devices"][0]["type"], len(found["resources"]["devices"]) - 1) == expected


@pytest.mark.parametrize(
    ("node", "stat_of", "message"),
    [
        ({}, missing, "/dev/b of the host: No such file or directory"),
        ({"type": "c"}, missing, "/dev/b of the host: No such file"),
        ({}, host(stat.S_IFREG), "is no device"),
        ({"type": "b"}, host(stat.S_IFCHR), "is no block device"),
    ],
)
def test_a_device_that_the_host_lacks(
    tmp_path: Path, node: dict[str, Any], stat_of: cdi_edits.StatCall, message: str
) -> None:
    nodes = [{"path": "/dev/a", "hostPath": "/dev/b", **node}]
    with pytest.raises(FailedPreconditionError, match=f"CDI device /dev/a: .*{message}"):
        cdi.apply(spec(), edits_of(tmp_path, containerEdits={"deviceNodes": nodes}), stat_of)


def test_mounts(tmp_path: Path) -> None:
    mounts = [
        {"hostPath": "/opt/lib", "containerPath": "/usr/lib/x"},
        {"hostPath": "/opt", "containerPath": "/usr", "options": ["ro", "bind"]},
        {"hostPath": "none", "containerPath": "/proc/", "type": "tmpfs", "options": ["size=1m"]},
    ]
    found = cdi.apply(spec(), edits_of(tmp_path, containerEdits={"mounts": mounts}))["mounts"]
    assert found == [
        {"destination": "/usr", "type": "bind", "source": "/opt", "options": ["ro", "bind"]},
        {"destination": "/proc/", "type": "tmpfs", "source": "none", "options": ["size=1m"]},
        {"destination": "/usr/lib/x", "type": "bind", "source": "/opt/lib", "options": ["rbind"]},
    ]


def test_hooks_groups_and_rdt(tmp_path: Path) -> None:
    hooks = [
        {"hookName": "createContainer", "path": "/bin/a", "args": ["a", "b"], "env": ["A=1"], "timeout": 3},
        {"hookName": "createContainer", "path": "/bin/b"},
        {"hookName": "poststop", "path": "/bin/a"},
    ]
    rdt = {"closID": "gold", "enableMBM": True}
    edits = edits_of(tmp_path, containerEdits={"hooks": hooks, "additionalGids": [0, 5, 7], "intelRdt": rdt})
    before = {**spec(user={"uid": 1, "gid": 1, "additionalGids": [7]}), "hooks": {"poststop": [{"path": "/bin/z"}]}}
    found = cdi.apply(before, edits)
    assert found["hooks"] == {
        "poststop": [{"path": "/bin/z"}, {"path": "/bin/a"}],
        "createContainer": [
            {"path": "/bin/a", "args": ["a", "b"], "env": ["A=1"], "timeout": 3},
            {"path": "/bin/b"},
        ],
    }
    assert found["process"]["user"]["additionalGids"] == [7, 5]
    assert found["linux"]["intelRdt"] == rdt


PATHS = st.sampled_from(["/dev/a", "/dev/b", "/dev//a", "/x/y", "/x"])
EDITS = st.builds(
    cdi.ContainerEdits,
    env=st.lists(st.sampled_from(["A=1", "A=2", "B=1"])).map(tuple),
    nodes=st.lists(
        st.builds(
            cdi_edits.CdiDeviceNode,
            path=PATHS,
            host_path=PATHS,
            kind=st.sampled_from(["", "c"]),
            major=st.none() | st.integers(0, 9),
            minor=st.none() | st.integers(0, 9),
            mode=st.none() | st.integers(0, 0o777),
            uid=st.none() | st.integers(0, 9),
            gid=st.none(),
            permissions=st.sampled_from(["", "rwm", "r"]),
        )
    ).map(tuple),
    mounts=st.lists(PATHS.map(lambda p: {"destination": p, "source": "/s", "type": "bind", "options": ["rbind"]})).map(
        tuple
    ),
    hooks=st.lists(st.tuples(st.sampled_from(["prestart", "poststop"]), PATHS.map(lambda p: {"path": p}))).map(tuple),
    groups=st.lists(st.integers(0, 3)).map(tuple),
    intel_rdt=st.none() | st.just({"closID": "x"}),
)


@given(EDITS)
def test_twice_is_as_good_as_once_and_the_spec_is_left_alone(edits: cdi.ContainerEdits) -> None:
    before = spec()
    kept = copy.deepcopy(before)
    once = cdi.apply(before, edits, host())
    assert before == kept
    assert cdi.apply(once, edits, host()) == once


def test_a_file_that_cannot_be_read_for_a_moment_is_read_again(tmp_path: Path) -> None:
    """It has not changed, and its devices would be gone until it does."""
    write(tmp_path)
    refused = OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def failing(*_: object) -> bytes:
        raise refused

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "read", failing)
        known = cdi.load([str(tmp_path)])
        with pytest.raises(NotFoundError, match="Too many open files") as error:
            cdi.resolve([f"{KIND}=0"], known, PLAIN)
    assert "LimitNOFILE" in exhaustion(error.value)
    cdi.resolve([f"{KIND}=0"], cdi.load([str(tmp_path)], known), PLAIN)
