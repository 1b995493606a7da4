"""The JSON schema of the tool calls that a request demands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

#: Keywords of JSON schema whose value has schemas by name.
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
#: Keywords whose value is data.
_DATA = ("const", "enum", "default", "examples")
#: Keywords beside which ``properties`` are not all properties of an object.
_MORE_PROPERTIES = ("allOf", "anyOf", "oneOf", "$ref", "if", "patternProperties", "dependentSchemas")


def call_schema(
    functions: Sequence[Mapping[str, Any]], *, several: bool = False, answer: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the JSON schema of a call of one of several functions.

    Parameters
    ----------
    functions
        The functions, each with ``name``, and perhaps ``parameters``: a JSON schema.
    several
        True for a list of calls.
    answer
        Schema of an answer that may stand in place of a call.
    """
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": {"$ref": f"#/$defs/{i}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, function in enumerate(functions)
    ]
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if several:
        schema = {"type": "array", "items": schema, "minItems": 1}
    places = {
        str(i): _parameters(function.get("parameters") or {}, f"#/$defs/{i}") for i, function in enumerate(functions)
    }
    if answer is not None:
        schema = {"anyOf": [{"$ref": "#/$defs/answer"}, schema]}
        places["answer"] = deepcopy(dict(answer))
        _move(places["answer"], "#/$defs/answer")
    return schema | {"$defs": places}


def _parameters(schema: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the schema of a function's arguments, for its place in a larger schema.

    Without ``additionalProperties`` an object has no other properties than those that it lists: a small model would
    invent names until the end of ``max_tokens``. A schema that combines lists of properties stays as it is.
    """
    found = {"type": "object", "properties": {}, **deepcopy(dict(schema))}
    parts = list(_parts(found))
    listed = [part for part in parts if "properties" in part]
    closes = not any(key in part for part in listed for key in _MORE_PROPERTIES) and not any(
        "allOf" in part for part in parts
    )
    _move(found, place)
    if closes:
        for part in listed:
            part.setdefault("additionalProperties", False)
    return found


def _move(schema: dict[str, Any], place: str) -> None:
    """Change the references of a schema to itself for its place in a larger schema."""
    for part in _parts(schema):
        reference = part.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            part["$ref"] = place + reference[1:]


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield a schema, and the schemas in it."""
    if isinstance(schema, list):
        for part in schema:
            yield from _parts(part)
    if not isinstance(schema, dict):
        return
    yield schema
    for key, value in schema.items():
        if key in _NAMED_SCHEMAS and isinstance(value, dict):
            yield from _parts([*value.values()])
        elif key not in _DATA:
            yield from _parts(value)
