"""The generated messages have the numbers and types that the interface has on the wire."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from criserver.api.grpc_server import method_name
from criserver.api.image_service import MISSING as IMAGE_MISSING
from criserver.api.image_service import ImageService
from criserver.api.runtime_service import MISSING as RUNTIME_MISSING
from criserver.api.runtime_service import RuntimeService
from criserver.pb.runtime.v1 import api_pb2 as cri

# The interface's descriptor set lies beside a developer's checkout; a user's clone has none.
FACTS = Path(os.environ.get("CRI_DESCRIPTORS", Path(__file__).parents[3].parent / "shared" / "cri" / "cri-v1.binpb"))


def messages(
    found: Iterable[descriptor_pb2.DescriptorProto], prefix: str = ""
) -> Iterator[tuple[str, descriptor_pb2.DescriptorProto]]:
    for message in found:
        yield prefix + message.name, message
        yield from messages(message.nested_type, f"{prefix}{message.name}.")


def facts(file: descriptor_pb2.FileDescriptorProto) -> set[tuple[object, ...]]:
    """Every fact that two sides of a wire must agree on."""
    found: set[tuple[object, ...]] = set()
    for name, message in messages(file.message_type):
        for field in message.field:
            found.add((name, field.name, field.number, field.type, field.label, field.type_name))
        for enum in message.enum_type:
            found.update((f"{name}.{enum.name}", v.name, v.number) for v in enum.value)
        found.add((name,))
    for enum in file.enum_type:
        found.update((enum.name, v.name, v.number) for v in enum.value)
    for service in file.service:
        for rpc in service.method:
            found.add((service.name, rpc.name, rpc.input_type, rpc.output_type, rpc.server_streaming))
    return found


@pytest.mark.skipif(not FACTS.exists(), reason=f"no descriptor set of the interface at {FACTS}")
def test_every_message_field_and_rpc_is_the_interfaces() -> None:
    theirs = descriptor_pb2.FileDescriptorSet.FromString(FACTS.read_bytes()).file[0]
    ours = descriptor_pb2.FileDescriptorProto()
    cri.DESCRIPTOR.CopyToProto(ours)
    assert facts(ours) == facts(theirs)
    assert ours.package == theirs.package == "runtime.v1"


@pytest.mark.parametrize(
    ("service", "implementation", "missing"),
    [("RuntimeService", RuntimeService, RUNTIME_MISSING), ("ImageService", ImageService, IMAGE_MISSING)],
)
def test_every_rpc_is_served_or_refused_by_the_name_of_its_feature(
    service: str, implementation: type[Exception], missing: dict[str, object]
) -> None:
    rpcs = {m.name for m in cri.DESCRIPTOR.services_by_name[service].methods}
    served = {rpc for rpc in rpcs if hasattr(implementation, method_name(rpc))}
    assert served | set(missing) == rpcs
    assert not served & set(missing)
