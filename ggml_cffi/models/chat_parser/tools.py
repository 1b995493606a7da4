"""The functions that the caller offers to a model, as far as a parser needs them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ggml_cffi.models.generation.tool_schema import Tool, tool_schemas

#: Python's names of values as some templates write them, and JSON's.
_PYTHON = {"True": "true", "False": "false", "None": "null"}


class Tools:
    """The functions that a model may call.

    Parameters
    ----------
    tools
        Their JSON schemas in the form of OpenAI's API, or Python functions; None if they are not known.
    """

    def __init__(self, tools: Sequence[Tool] | None) -> None:
        functions = [_function(tool) for tool in tool_schemas(tools) or ()]
        self._parameters = {function["name"]: _properties(function) for function in functions}
        self._are_known = tools is not None

    @property
    def names(self) -> Collection[str]:
        """The names of the known functions."""
        return self._parameters.keys()

    def knows(self, name: str) -> bool:
        """Return whether there is a function of this name; without known functions there may be any."""
        return not self._are_known or name in self._parameters

    def parameters(self, name: str) -> list[str]:
        """Return the names of a function's parameters, in order."""
        return list(self._parameters.get(name, ()))

    def to_json(self, name: str, parameter: str, value: str) -> str:
        """Return an argument as JSON that a model wrote as bare text.

        A parameter that may be a string gets the text itself. Another one, and one without a known type, gets the JSON
        value that the text is, or else the text.
        """
        kinds = _kinds(self._parameters.get(name, {}).get(parameter))
        text = value.strip()
        if "string" not in kinds or ("null" in kinds and text in ("null", "None")):
            try:
                found = json.loads(_PYTHON.get(text, text), parse_constant=_refuse)
                return json.dumps(found, ensure_ascii=False, allow_nan=False)
            except (ValueError, RecursionError):  # no JSON, a number beyond float, or too many brackets
                pass
        return json.dumps(value, ensure_ascii=False)


def _refuse(name: str) -> Any:
    """Raise ValueError: JSON has no number of this name."""
    raise ValueError(f"{name} is not JSON")


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the function of a JSON schema; raise ValueError if it has no name."""
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"a tool must be {{'type': 'function', 'function': {{'name': ...}}}}, not {tool!r:.80}")
    return function


def _properties(function: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def _kinds(schema: Any) -> set[str]:
    """Return the JSON types that a schema names, at least those of its texts and null."""
    if not isinstance(schema, Mapping):
        return set()
    kinds = schema.get("type")
    found = {kinds} if isinstance(kinds, str) else {kind for kind in _items(kinds) if isinstance(kind, str)}
    if any(isinstance(value, str) for value in (*_items(schema.get("enum")), schema.get("const"))):
        found.add("string")
    if schema.get("nullable") is True:  # as tool_schema and transformers write it
        found.add("null")
    return found.union(*(_kinds(each) for key in ("anyOf", "oneOf", "allOf") for each in _items(schema.get(key))))


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()
