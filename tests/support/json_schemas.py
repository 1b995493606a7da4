"""JSON schemas of answers with a bounded length, and the check of answers that a grammar of them produced."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema

from ggml_cffi.models import Grammar, Model


def _object(required: int | None = None, **properties: Any) -> dict[str, Any]:
    """Return a schema of an object with these properties, the first ``required`` of which must be there."""
    names = list(properties)[:required]
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def _array(items: Any, most: int, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


_TEXT = {"type": "string", "maxLength": 12}
_DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
_AGE = {"type": "integer", "minimum": 0, "maximum": 130}
_FLAG = {"type": "boolean"}
_COLOR = {"enum": ["red", "green", "blue"]}
_POINT = _object(x=_DIGIT, y=_DIGIT)

SCHEMAS: list[dict[str, Any]] = [
    _object(name=_TEXT, age=_AGE),
    _object(1, name=_TEXT, age=_AGE, member=_FLAG),  # optional properties
    _object(0, a=_DIGIT, b=_FLAG),  # all of them
    _object(color=_COLOR, size={"enum": [1, 2.5, None, "large"]}),
    {"enum": ["Grüße", "日本語", "naïve", "🙂👍"]},  # Unicode
    _object(größe=_DIGIT, 名前={"type": "string", "minLength": 1, "maxLength": 8}),
    _array(_DIGIT, 6, 2),
    _array(_array(_FLAG, 2, 1), 3, 1),
    _array(_POINT, 3),
    _object(person=_object(name=_TEXT, home=_object(city=_TEXT, number=_AGE))),
    _object(tags=_array(_COLOR, 4), count=_DIGIT),
    {"anyOf": [_POINT, _COLOR, {"type": "null"}]},
    _object(value={"anyOf": [_AGE, _TEXT]}),
    _object(kind={"const": "circle"}, radius={"type": "number", "minimum": 0, "maximum": 10, "multipleOf": 0.25}),
    _object(low={"type": "integer", "minimum": -50, "maximum": -7}, high={"type": "integer", "exclusiveMaximum": 1000}),
    _object(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    _object(
        at={"type": "string", "pattern": "^([01][0-9]|2[0-3]):[0-5][0-9]$"}, host={"type": "string", "format": "ipv4"}
    ),
    {"$defs": {"point": _POINT}} | _object(start={"$ref": "#/$defs/point"}, end={"$ref": "#/$defs/point"}),
    {"type": "array", "prefixItems": [_COLOR, _DIGIT, _FLAG], "items": False, "minItems": 3},
    _object(quote={"type": "string", "minLength": 3, "maxLength": 20}, nothing={"type": "null"}),
]


def invalid_answers(model: Model, n: int, *, max_tokens: int, n_threads: int = 16) -> list[str]:
    """Generate ``n`` answers at temperature 1 in turn for each schema, and return those that are not valid."""

    def answer(number: int) -> str:
        schema = SCHEMAS[number % len(SCHEMAS)]
        chat = [{"role": "user", "content": f"Write some JSON, number {number}."}]
        options: Any = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": number}
        text = "".join(model.generate(chat, max_tokens, grammar=Grammar.json_schema(schema), **options))
        try:
            jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
        except (ValueError, jsonschema.ValidationError) as error:
            return f"schema {number % len(SCHEMAS)}, seed {number}: {text!r}: {error!s:.200}"
        return ""

    with ThreadPoolExecutor(n_threads) as pool:
        return [wrong for wrong in pool.map(answer, range(n)) if wrong]
