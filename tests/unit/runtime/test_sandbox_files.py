"""The files that all containers of a pod share."""

from __future__ import annotations

from pathlib import Path

import pytest

from criserver.errors import FailedPreconditionError
from criserver.model import Dns, PodConfig
from criserver.pb.runtime.v1 import api_pb2 as cri
from criserver.runtime import parse, sandbox_files

LATIN_1 = b"127.0.0.1 localhost # disk-\xe9\r\n"


def pod() -> PodConfig:
    options = cri.NamespaceOption(network=cri.NODE, pid=cri.CONTAINER, ipc=cri.NODE)
    security = cri.LinuxSandboxSecurityContext(namespace_options=options)
    return parse.pod_config(cri.PodSandboxConfig(linux=cri.LinuxPodSandboxConfig(security_context=security)))


@pytest.fixture
def of_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the node's files."""
    monkeypatch.setattr(sandbox_files, "_RESOLV_CONF", str(tmp_path / "resolv.conf"))
    monkeypatch.setattr(sandbox_files, "_HOSTS", str(tmp_path / "hosts"))
    return tmp_path


def test_the_nodes_files_may_have_any_encoding(of_node: Path) -> None:
    for name in ("resolv.conf", "hosts"):
        (of_node / name).write_bytes(LATIN_1)
    files = of_node / "files"
    sandbox_files.write(str(files), str(of_node / "sandbox"), pod(), "", 0)
    assert (files / "resolv.conf").read_bytes() == LATIN_1
    assert (files / "hosts").read_bytes() == LATIN_1
    adopted = of_node / "adopted"
    sandbox_files.adopt(str(adopted), str(files), "")
    assert (adopted / "hosts").read_bytes() == LATIN_1


def test_a_file_of_the_node_that_cannot_be_read_is_named(of_node: Path) -> None:
    (of_node / "resolv.conf").mkdir()
    with pytest.raises(FailedPreconditionError, match=r"resolv\.conf of the node cannot be read for a pod: Is"):
        sandbox_files.resolv_conf(Dns((), (), ()))


def test_without_files_of_the_node_there_are_defaults(of_node: Path) -> None:
    assert sandbox_files.resolv_conf(Dns((), (), ())) == ""
    files = of_node / "files"
    sandbox_files.write(str(files), str(of_node / "sandbox"), pod(), "", 0)
    assert (files / "hosts").read_text().startswith("127.0.0.1\tlocalhost\n")
