"""Any message of a type, made from its descriptor: fields that CRI gains are in it without a change here."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

# What some field or other takes for something.
_WORDS = (
    *("/a", "/a/../../b", "a/b", "../x", "..", "/", "//", "x.slice", "../x.slice", "cdi.k8s.io/x", "vendor.com/c=d"),
    *("unconfined", "unconfined/x", "runtime/default", "docker/default", "localhost/", "localhost/p", "localhost//p"),
    *("default", "net.core.somaxconn", "kernel.shmmax", "kernel.panic", "s0:c1", "rwm", "rx", "A=B", "a b", "a\n\0b"),
)
_TEXTS = st.sampled_from(_WORDS) | st.text(max_size=8)
_BYTES = st.binary(max_size=4)
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


@st.composite
def messages(draw: st.DrawFn, kind: type[Message]) -> Any:
    """A message of the class ``kind`` with any of its fields set to anything that its type can hold."""
    message = kind()
    _fill(draw, message)
    return message


def _fill(draw: st.DrawFn, message: Any) -> None:
    for field in message.DESCRIPTOR.fields:
        if not draw(st.booleans()):
            continue
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value.update(draw(st.dictionaries(_TEXTS, _TEXTS, max_size=2)))
        elif field.message_type is not None and field.is_repeated:
            for _ in range(draw(st.integers(1, 2))):
                _fill(draw, value.add())
        elif field.message_type is not None:
            value.SetInParent()
            _fill(draw, value)
        elif field.is_repeated:
            value.extend(draw(st.lists(_scalars(field), max_size=2)))
        else:
            setattr(message, field.name, draw(_scalars(field)))


def _scalars(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return _BYTES if field.type == FieldDescriptor.TYPE_BYTES else _TEXTS
    least, most = _RANGES[field.cpp_type]
    return st.integers(0, 3) | st.integers(least, most)
