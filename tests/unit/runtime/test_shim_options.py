"""The options of a shim, from TOML to the bytes that the shim takes."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criserver.errors import InvalidArgumentError
from criserver.runtime import shim_options
from shims import task_wire

RUNC = "io.containerd.runc.v2"
KATA = "io.containerd.kata.v2"

values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(st.characters(exclude_categories=("Cs", "Cc"))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab.- é"', min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text('abc."\\é ', min_size=1), values, max_size=4))
def test_a_table_is_the_same_after_it_was_written_and_read(table: dict[str, Any]) -> None:
    assert tomllib.loads(shim_options.toml(table)) == table


@pytest.mark.parametrize("shim", [RUNC, "/opt/containerd-shim-runc-v2"])
def test_runcs_options_have_fields_of_their_own(shim: str) -> None:
    kind, value = shim_options.encoded(
        shim, {"BinaryName": "/usr/bin/crun", "NoPivotRoot": True, "IoUid": 7}, root="/r", systemd=True
    )
    found = task_wire.fields(value)
    assert kind == "containerd.runc.v1.Options"
    assert found == {1: [1], 4: [7], 6: [b"/usr/bin/crun"], 7: [b"/r"], 9: [1]}


def test_other_shims_get_a_path_or_the_table() -> None:
    assert shim_options.encoded(KATA, {}, root="/r", systemd=True) == ("", b"")
    options = {"TypeUrl": "io.containerd.runsc.v1.options", "ConfigPath": "/etc/runsc.toml", "other": 1}
    kind, value = shim_options.encoded(KATA, options, root="/r", systemd=False)
    assert kind == "runtimeoptions.v1.Options"
    assert task_wire.fields(value) == {1: [b"io.containerd.runsc.v1.options"], 2: [b"/etc/runsc.toml"]}
    del options["ConfigPath"]
    found = task_wire.fields(shim_options.encoded(KATA, options, root="/r", systemd=False)[1])
    assert tomllib.loads(task_wire.content(found, 3).decode()) == options


@pytest.mark.parametrize(
    ("shim", "options", "words"),
    [
        (RUNC, {"SystemdCgroup": True}, "unknown key SystemdCgroup"),
        (RUNC, {"BinaryName": 1}, "BinaryName = 1; it must be of type str"),
        (RUNC, {"NoPivotRoot": 1}, "NoPivotRoot = 1; it must be of type bool"),
        (RUNC, {"IoUid": -1}, "IoUid = -1"),
        (KATA, {"ConfigPath": 1}, "ConfigPath = 1"),
    ],
)
def test_options_that_the_shim_has_not_are_refused(shim: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        shim_options.check(shim, options)
