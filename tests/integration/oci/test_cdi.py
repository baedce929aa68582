"""Devices of the Container Device Interface in a real container."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from criserver.oci import cdi
from criserver.oci.adjustment_faults import RuntimeFacts
from tests.support.bundles import PATH, Bundles

pytestmark = [
    pytest.mark.skipif(not shutil.which("runc") or not shutil.which("busybox"), reason="needs runc and busybox"),
    pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="the host has no /dev/fuse to give"),
]


@pytest.fixture(scope="module")
def bundles(nothing_left: None) -> Iterator[Bundles]:
    bundles = Bundles()
    try:
        yield bundles
    finally:
        bundles.close()


@pytest.fixture
def edits(tmp_path: Path) -> cdi.ContainerEdits:
    """A camera, which is the host's /dev/fuse under another name, and what its programs need."""
    (tmp_path / "library").write_text("the vendor's library\n")
    document = {
        "cdiVersion": "0.8.0",
        "kind": "vendor.com/camera",
        "containerEdits": {
            "mounts": [
                {
                    "hostPath": str(tmp_path / "library"),
                    "containerPath": "/tmp/library",
                    "options": ["ro", "nosuid", "nodev", "bind"],
                }
            ]
        },
        "devices": [
            {
                "name": "front",
                "containerEdits": {
                    "env": ["CAMERA=front"],
                    "deviceNodes": [
                        {"path": "/dev/camera", "hostPath": "/dev/fuse", "permissions": "rw", "fileMode": 0o600}
                    ],
                    "hooks": [
                        {
                            "hookName": "createRuntime",
                            "path": "/bin/sh",
                            "args": ["sh", "-c", f"echo $WHO > {tmp_path}/hook"],
                            "env": ["WHO=vendor"],
                        }
                    ],
                    "additionalGids": [4321],
                },
            }
        ],
    }
    (tmp_path / "vendor.json").write_text(json.dumps(document))
    return cdi.resolve(["vendor.com/camera=front"], cdi.load([str(tmp_path)]), RuntimeFacts())


def user(spec: dict[str, Any], uid: int) -> dict[str, Any]:
    spec["process"]["user"] = {"uid": uid, "gid": uid}
    return spec


def test_a_device_in_a_container(bundles: Bundles, edits: cdi.ContainerEdits, tmp_path: Path) -> None:
    script = "exec 3<>/dev/camera && stat -c '%t:%T %a %u' /dev/camera; echo $CAMERA; cat /tmp/library; id -G"
    found = bundles.run(cdi.apply(bundles.spec(["sh", "-c", script]), edits))
    assert found.returncode == 0, found.stderr
    rdev = os.stat("/dev/fuse").st_rdev
    assert found.stdout.splitlines() == [
        f"{os.major(rdev):x}:{os.minor(rdev):x} 600 0",
        "front",
        "the vendor's library",
        "0 4321",
    ]
    assert (tmp_path / "hook").read_text() == "vendor\n"


def test_a_user_without_privileges_can_open_it(bundles: Bundles, edits: cdi.ContainerEdits) -> None:
    spec = user(bundles.spec(["sh", "-c", "exec 3<>/dev/camera && id -u"]), 1000)
    found = bundles.run(cdi.apply(spec, edits))
    assert (found.returncode, found.stdout) == (0, "1000\n"), found.stderr


@pytest.mark.parametrize(("permissions", "opened"), [("rw", "rw"), ("r", "r"), ("", "")])
def test_the_device_cgroup_holds_to_the_permissions(
    bundles: Bundles, edits: cdi.ContainerEdits, permissions: str, opened: str
) -> None:
    edits = dataclasses.replace(edits, nodes=(dataclasses.replace(edits.nodes[0], permissions=permissions),))
    script = "(exec 3</dev/camera) && printf r; (exec 3>/dev/camera) && printf w; true"
    found = bundles.run(cdi.apply(bundles.spec(["sh", "-c", script]), edits))
    assert found.stdout == opened
    assert found.stderr.count("Operation not permitted") == 2 - len(opened)


def test_without_its_edits_there_is_nothing_of_the_device(bundles: Bundles) -> None:
    found = bundles.run(bundles.spec(["sh", "-c", "ls /dev/camera; ls /tmp/library; env"]))
    assert found.stderr.count("No such file") == 2
    assert PATH in found.stdout
    assert "CAMERA" not in found.stdout
