"""The default validator: each switch, and the plugins that a container needs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from google.protobuf import json_format

from criserver.errors import FailedPreconditionError, InvalidArgumentError, PermissionDeniedError
from criserver.nri.adjustments import ContainerAdjustments
from criserver.nri.default_validator import REQUIRED_PLUGINS, ValidatorSettings, validate
from criserver.pb.nri.v1alpha1 import api_pb2 as nri

HOOKS = {"hooks": {"prestart": [{"path": "/h"}]}}
SECCOMP = {"linux": {"seccomp_policy": {"default_action": "SCMP_ACT_ALLOW"}}}
NAMESPACE = {"linux": {"namespaces": [{"type": "-network"}]}}
SYSCTL = {"linux": {"sysctl": {"net.x": "1"}}}
SYSCTL_REMOVED = {"linux": {"sysctl": {"-net.x": ""}}}
UNCONFINED = nri.SecurityProfile(profile_type=nri.SecurityProfile.UNCONFINED)
CUSTOM = nri.SecurityProfile(profile_type=nri.SecurityProfile.LOCALHOST)
DEFAULT = nri.SecurityProfile(profile_type=nri.SecurityProfile.RUNTIME_DEFAULT)
SWITCHES = [field.name for field in dataclasses.fields(ValidatorSettings) if field.name.startswith("reject_")]


def settings(**switches: Any) -> ValidatorSettings:
    return ValidatorSettings(**switches)


def request(
    adjust: dict[str, Any], profile: nri.SecurityProfile | None = None, annotations: dict[str, str] | None = None
) -> nri.ValidateContainerAdjustmentRequest:
    container = nri.Container(id="c1", name="web")
    if profile is not None:
        container.linux.seccomp_profile.CopyFrom(profile)
    pod = nri.PodSandbox(namespace="shop", name="front", annotations=annotations or {})
    merged = ContainerAdjustments(nri.CreateContainerRequest(pod=pod, container=container))
    merged.add("bad", json_format.ParseDict({"adjust": adjust}, nri.CreateContainerResponse()))
    return merged.validation([nri.PluginInstance(name="bad", index="10")])


@pytest.mark.parametrize(
    ("switch", "adjust", "profile"),
    [
        ("reject_oci_hook_adjustment", HOOKS, None),
        ("reject_runtime_default_seccomp_adjustment", SECCOMP, DEFAULT),
        ("reject_unconfined_seccomp_adjustment", SECCOMP, UNCONFINED),
        ("reject_unconfined_seccomp_adjustment", SECCOMP, None),
        ("reject_custom_seccomp_adjustment", SECCOMP, CUSTOM),
        ("reject_namespace_adjustment", NAMESPACE, None),
        ("reject_sysctl_adjustment", SYSCTL, None),
        ("reject_sysctl_adjustment", SYSCTL_REMOVED, None),
    ],
)
def test_a_switch_refuses_its_field_alone(
    switch: str, adjust: dict[str, Any], profile: nri.SecurityProfile | None
) -> None:
    asked = request(adjust, profile)
    with pytest.raises(PermissionDeniedError, match=rf"container shop/front/web: .*\({switch}\)") as caught:
        validate(settings(**{switch: True}), asked)
    assert ("bad" if adjust is not SYSCTL_REMOVED else "a plugin that removes one") in str(caught.value)
    validate(settings(**{name: name != switch for name in SWITCHES}), asked)
    validate(settings(**{switch: True}), request({"args": ["x"]}, profile))


@pytest.mark.parametrize(
    ("required", "annotations", "missing"),
    [
        (("bad",), {}, ""),
        (("10-bad",), {}, ""),
        (("11-bad",), {}, "11-bad"),
        (("one", "bad", "two"), {}, "one, two"),
        ((), {REQUIRED_PLUGINS: "[]"}, ""),
        ((), {REQUIRED_PLUGINS: ""}, ""),
        ((), {REQUIRED_PLUGINS: '["one"]'}, "one"),
        ((), {f"{REQUIRED_PLUGINS}/pod": "- one"}, "one"),
        (("two",), {f"{REQUIRED_PLUGINS}/container.web": "[one]", REQUIRED_PLUGINS: "[three]"}, "two, one"),
        ((), {f"{REQUIRED_PLUGINS}/container.other": "[one]"}, ""),
        (("one",), {"tolerate": "true"}, ""),
        (("one",), {"tolerate/container.web": "1", "tolerate": "false"}, ""),
        (("one",), {"tolerate": "false"}, "one"),
        (("one",), {"tolerate/container.other": "true"}, "one"),
    ],
)
def test_required_plugins(required: tuple[str, ...], annotations: dict[str, str], missing: str) -> None:
    needs = settings(required_plugins=required, tolerate_missing_plugins_annotation="tolerate")
    asked = request({}, annotations=annotations)
    if not missing:
        validate(needs, asked)
        return
    with pytest.raises(FailedPreconditionError, match=f"not there: {missing}$"):
        validate(needs, asked)


@pytest.mark.parametrize(
    "annotations",
    [{REQUIRED_PLUGINS: "one"}, {REQUIRED_PLUGINS: "[1]"}, {REQUIRED_PLUGINS: "{"}, {"tolerate": "perhaps"}],
)
def test_an_annotation_that_cannot_be_read_is_refused(annotations: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(annotations))):
        validate(settings(tolerate_missing_plugins_annotation="tolerate"), request({}, annotations=annotations))


def test_no_switch_refuses_nothing() -> None:
    for adjust in (HOOKS, SECCOMP, NAMESPACE, SYSCTL):
        validate(ValidatorSettings(), request(adjust))
