"""JSON documents of images, read as Go's encoding/json reads them.

Builders and registries are written in Go, and other runtimes read their documents with Go. So what Go takes for a field
that was never set is no error here:

1. null is as good as a missing field. In a list of texts and in a map of texts it is "".
2. A name is found in any case. A document that has it twice is refused: two readers would read two documents. Go merges
   the two objects of one name, and Python takes the second.
3. Bytes that are no UTF-8 become U+FFFD.

Which fields a document has and what they may be is in the JSON schemas beside this module.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jsonschema
import referencing

from criserver.errors import InvalidArgumentError
from criserver.text import shown

Schema = Mapping[str, Any]


def parse(body: bytes, what: str) -> dict[str, Any]:
    """The JSON object in ``body``; ``what`` names it in errors. Raises InvalidArgumentError."""
    try:
        document = json.loads(body.decode(errors="replace"), object_pairs_hook=_unique, parse_constant=_no_number)
        if b"\\u" in body:
            # An escaped lone surrogate is valid JSON, but no valid text for gRPC.
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:  # JSONDecodeError and UnicodeError are ValueErrors
        raise InvalidArgumentError(f"{what} is not valid JSON: {shown(e)}") from e
    if not isinstance(document, dict):
        raise InvalidArgumentError(f"{what} is not a JSON object")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name, number in Counter(name for name, _ in pairs).items() if number > 1)
        raise ValueError(f"an object has {shown(name)} twice")
    return found


def _no_number(text: str) -> None:
    """Refuse NaN and infinities, which Python takes for numbers and JSON does not have."""
    raise ValueError(f"{text} is no number")


def folded(name: str) -> str:
    """A name without case, as Go compares names: U+017F is an s, and U+212A, by lower(), a k."""
    return name.lower().replace("\u017f", "s")


def checked(document: Mapping[str, Any], schema: str, what: str) -> dict[str, Any]:
    """The fields of ``document`` that the schema in the file ``schema`` names, without those that are null.

    Raises InvalidArgumentError for a document that the schema does not allow.
    """
    found: dict[str, Any] = _as_go(document, _SCHEMAS[schema], _SCHEMAS[schema], what)
    # Validation ends at the first error, and every schema bounds the number of items before it looks at them. So a
    # document with millions of items takes no time.
    error = next(_VALIDATORS[schema].iter_errors(found), None)
    if error is not None:
        raise InvalidArgumentError(f"{what} is invalid: {error.json_path}: {shown(error.message)}")
    return found


def _as_go(value: Any, schema: Schema, root: Schema, what: str) -> Any:
    """``value`` with null resolved and names in the schema's spelling. What has too many items is left as it is."""
    schema, root = _resolved(schema, root)
    if isinstance(value, dict) and "properties" in schema:
        fields = _fields(value, schema["properties"], what)
        return {k: _as_go(v, schema["properties"][k], root, what) for k, v in fields.items()}
    if isinstance(value, dict) and "additionalProperties" in schema and len(value) <= schema["maxProperties"]:
        return {k: _zero(v, schema["additionalProperties"], root, what) for k, v in value.items()}
    if isinstance(value, list) and "items" in schema and len(value) <= schema["maxItems"]:
        return [_zero(v, schema["items"], root, what) for v in value]
    return value


def _zero(value: Any, schema: Schema, root: Schema, what: str) -> Any:
    """As :func:`_as_go`, for an item of a list or a map: null is the zero value of its type."""
    if value is None:
        value = {"string": "", "object": {}}[_resolved(schema, root)[0]["type"]]
    return _as_go(value, schema, root, what)


def _fields(value: Mapping[str, Any], properties: Schema, what: str) -> dict[str, Any]:
    """The members that are fields, under the field's name, without those that are null."""
    names = {name.lower(): name for name in properties}
    given: dict[str, str] = {}
    for key in value:
        if (name := names.get(folded(key))) is not None and given.setdefault(name, key) != key:
            raise InvalidArgumentError(f"{what} is invalid: it has both {shown(given[name])} and {shown(key)}")
    return {name: value[key] for name, key in given.items() if value[key] is not None}


def _resolved(schema: Schema, root: Schema) -> tuple[Schema, Schema]:
    """The schema behind a reference, with the document that the references in it are relative to."""
    while (reference := schema.get("$ref")) is not None:
        file, _, name = reference.partition("#/$defs/")
        root = _SCHEMAS[file] if file else root
        schema = root["$defs"][name] if name else root
    return schema, root


def _load() -> dict[str, Schema]:
    names = ("descriptor.json", "index.json", "manifest.json", "config.json")
    return {n: json.loads(resources.files(__package__).joinpath("schema", n).read_text()) for n in names}


def _load_validators() -> dict[str, jsonschema.Draft202012Validator]:
    registry: referencing.Registry[Any] = referencing.Registry().with_resources(
        [(name, referencing.Resource.from_contents(schema)) for name, schema in _SCHEMAS.items()]
    )
    return {name: jsonschema.Draft202012Validator(schema, registry=registry) for name, schema in _SCHEMAS.items()}


_SCHEMAS = _load()
_VALIDATORS = _load_validators()
