"""JSON schemas of the functions that a model may call, from Python functions as ``transformers`` makes them."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from textwrap import dedent
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

#: A function that a model may call: its JSON schema in the form of OpenAI's API, or the function itself.
Tool = Mapping[str, Any] | Callable[..., Any]

_TYPES: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    NoneType: "null",
    list: "array",
    tuple: "array",
    dict: "object",
}
_HEADER = re.compile(
    r"^(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?|Notes?)(:|[ \t]*\n---+)[ \t]*$", re.MULTILINE
)
#: A parameter in a docstring: name, type or nothing, rest of the line, indented lines.
_PARAMETER = re.compile(r"^(\w+)(?:[ \t]*\([^()\n]*\))?[ \t]*:?[ \t]*(.*)((?:\n(?:[ \t]+.*)?)*)", re.MULTILINE)
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the JSON schema of a Python function for ``tools``.

    Name, parameters and types are those of the function, and the descriptions those of its docstring (Google's style or
    numpy's). A description may end with ``(choices: ["a", "b"])`` for the only values that are allowed. The schema is
    that of ``transformers.utils.get_json_schema``.

    Parameters
    ----------
    function
        The function. Each parameter needs a type: ``int``, ``float``, ``str``, ``bool``, ``None``, ``Any``, lists,
        tuples and dicts of them, unions, ``Literal``, or an ``Enum``.

    Raises
    ------
    TypeError
        If it is no function.
    ValueError
        If a parameter has no type, or another one, or cannot be given by its name; or the function has no docstring.

    Examples
    --------
    >>> def weather(city: str, days: int = 1):
    ...     '''Return the weather.
    ...
    ...     Args:
    ...         city: Name of the city
    ...         days: Number of days
    ...     '''
    >>> tool_schema(weather)["function"]["parameters"]["required"]
    ['city']
    """
    # From Python 3.14 on, isroutine says so of a partial too, which has no name.
    if not inspect.isroutine(function) or not hasattr(function, "__name__"):
        raise TypeError(f"a tool must be a JSON schema or a function, not {function!r:.80}")
    name = function.__name__
    doc = inspect.getdoc(function)
    if not doc:
        raise ValueError(f"the function {name} has no docstring, which tells the model its purpose")
    description, parameters, returns = _read_docstring(doc)
    hints = get_type_hints(function)
    properties: dict[str, Any] = {}
    required = []
    for number, parameter in enumerate(inspect.signature(function).parameters.values()):
        if parameter.name not in hints:
            if number == 0 and parameter.name in ("self", "cls"):
                continue
            raise ValueError(f"the parameter {parameter.name!r} of the function {name} has no type")
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"the parameter '{parameter}' of the function {name} cannot be given by its name")
        properties[parameter.name] = _of_type(hints[parameter.name], f"the parameter {parameter.name!r} of {name}")
        properties[parameter.name] |= _described(parameters.get(parameter.name))
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    schema: dict[str, Any] = {"type": "object", "properties": properties} | ({"required": required} if required else {})
    found = {"name": name, "description": description, "parameters": schema}
    if "return" in hints:
        with suppress(ValueError):  # the model does not write the result, so it may have any type
            found["return"] = _of_type(hints["return"], "the result") | _described(returns)
    return {"type": "function", "function": found}


def tool_schemas(tools: Sequence[Tool] | None) -> list[Mapping[str, Any]] | None:
    """Return the JSON schemas of functions, some of which may be Python functions.

    Raises
    ------
    TypeError
        If one is neither a dict nor a function.
    ValueError
        See :func:`tool_schema`.
    """
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Iterable):
        raise TypeError(f"tools must be a list of JSON schemas or functions, not {tools!r:.80}")
    return [_schema_of(tool) for tool in tools]


def _schema_of(tool: Tool) -> Mapping[str, Any]:
    return tool if isinstance(tool, Mapping) else tool_schema(tool)


def _of_type(hint: Any, owner: str) -> dict[str, Any]:
    """Return the JSON schema of a Python type."""
    kind, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if hint in _TYPES:
        return {"type": _TYPES[hint]}
    if kind is Literal:
        return _of_values(args, owner)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _of_values([member.value for member in hint], owner)
    if kind in (Union, UnionType):
        return _of_union(args, owner)
    if kind is list:
        return {"type": "array", "items": _of_type(args[0], owner)}
    if kind is tuple and ... not in args:
        return {"type": "array", "prefixItems": [_of_type(arg, owner) for arg in args]}
    if kind is dict:
        return {"type": "object", "additionalProperties": _of_type(args[1], owner)}
    raise ValueError(f"{owner} has the type {hint!r:.80}, which has no JSON schema: write the schema as a dict")


def _of_values(values: Sequence[Any], owner: str) -> dict[str, Any]:
    if not values or any(type(value) not in (int, float, str, bool, NoneType) for value in values):
        raise ValueError(f"{owner} has values that JSON has not: {values!r:.80}")
    kinds = list(dict.fromkeys(_TYPES[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(values)}


def _of_union(args: Sequence[Any], owner: str) -> dict[str, Any]:
    schemas = [_of_type(arg, owner) for arg in args if arg is not NoneType]
    if len(schemas) == 1:
        found = schemas[0]
    elif all(schema.keys() == {"type"} and isinstance(schema["type"], str) for schema in schemas):
        kinds = sorted({schema["type"] for schema in schemas})
        found = {"type": kinds[0] if len(kinds) == 1 else kinds}
    else:
        found = {"anyOf": schemas}
    return found | ({"nullable": True} if NoneType in args else {})


# ---------------------------------------------------------------------- docstrings


def _read_docstring(doc: str) -> tuple[str, dict[str, str], str | None]:
    """Return the description of a function, those of its parameters by name, and that of its result."""
    description, *sections = _HEADER.split(doc)
    parameters: dict[str, str] = {}
    returns = None
    for title, mark, body in zip(sections[::3], sections[1::3], sections[2::3], strict=True):
        if title in ("Args", "Arguments", "Parameters"):
            for name, rest, more in _PARAMETER.findall(dedent(body).strip()):
                parameters[name] = _one_line(rest + more if mark == ":" else more)
        elif title == "Returns":
            returns = body.strip()
    return description.strip(), parameters, returns


def _one_line(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text.strip())


def _described(text: str | None) -> dict[str, Any]:
    """Return the fields of a schema that a description gives."""
    if text is None:
        return {}
    choices = _CHOICES.search(text)
    if choices is None:
        return {"description": text}
    try:
        values = json.loads(choices[1])
    except ValueError:
        raise ValueError(f"the choices {choices[1]!r:.80} are no JSON list") from None
    return {"enum": values, "description": text[: choices.start()].strip()}
