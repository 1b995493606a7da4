"""The grammar of demanded tool calls: the properties that a schema lists, references, and several functions."""

import json

import numpy as np
import pytest

from ggml_cffi.models import Grammar, Sampler, SamplingParams
from ggml_cffi.server.call_schema import call_schema
from tests.support.byte_level_model import EOS
from tests.support.generation import tokenizer_of

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}}


@pytest.fixture
def allows(tiny):
    """A function: True if the schema of a call of one of some functions allows this call."""

    def allows(functions, call, *, several=False, answer=None):
        grammar = Grammar.json_schema(call_schema(functions, several=several, answer=answer))
        tokenizer = tokenizer_of(tiny)
        sampler = Sampler(SamplingParams(temperature=0, grammar=grammar), tokenizer=tokenizer)
        chosen = []
        for token in [*json.dumps(call).encode(), EOS]:
            wish = np.zeros(260, np.float32)
            wish[token] = 1
            if not sampler.complete:
                chosen.append(sampler(wish, chosen))
        return bytes(token for token in chosen if token < 256).decode() == json.dumps(call)

    return allows


def call(name, **arguments):
    return {"name": name, "arguments": arguments}


def test_arguments_have_only_the_properties_that_the_schema_lists(allows):
    nested = {"type": "object", "properties": {"at": POINT, "all": {"type": "array", "items": POINT}}}
    functions = [{"name": "f", "parameters": nested}]
    assert allows(functions, call("f", at={"x": 1}, all=[{"x": 2}]))
    assert allows(functions, call("f"))
    assert not allows(functions, call("f", other=1))
    assert not allows(functions, call("f", at={"x": 1, "y": 2}))
    assert not allows(functions, call("f", all=[{"y": 2}]))
    for parameters in (None, {}, {"type": "object"}):
        assert allows([{"name": "f", "parameters": parameters}], call("f"))
        assert not allows([{"name": "f", "parameters": parameters}], call("f", a=1))
    assert "additionalProperties" not in POINT


def test_an_answer_with_a_schema_of_its_own_may_stand_in_place_of_a_call(allows):
    city = {"type": "object", "properties": {"name": {"$ref": "#/$defs/city"}}, "required": ["name"]}
    answer = {**city, "$defs": {"city": {"enum": ["Paris", "Rome"]}}, "additionalProperties": False}
    for several in (False, True):
        found = call("f", x=1)
        functions = [{"name": "f", "parameters": POINT}]
        assert allows(functions, [found] if several else found, several=several, answer=answer)
        assert allows(functions, {"name": "Paris"}, several=several, answer=answer)
        assert not allows(functions, {"name": "Oslo"}, several=several, answer=answer)
        assert not allows(functions, call("g"), several=several, answer=answer)
    assert answer["properties"]["name"] == {"$ref": "#/$defs/city"}


def test_other_properties_are_allowed_where_the_schema_says_so(allows):
    for parameters in (
        {**POINT, "additionalProperties": True},
        {**POINT, "additionalProperties": {"type": "string"}},
        {**POINT, "anyOf": [{"properties": {"y": {"type": "string"}}, "required": ["y"]}]},
        {"allOf": [POINT, {"properties": {"y": {"type": "string"}}}]},
    ):
        assert allows([{"name": "f", "parameters": parameters}], call("f", x=1, y="a"))
    free = {"type": "object", "properties": {"options": {"type": "object"}}}
    assert allows([{"name": "f", "parameters": free}], call("f", options={"a": 1}))


def test_definitions_of_each_function_are_its_own(allows):
    def function(name, kind, place):
        parameters = {"type": "object", "properties": {"v": {"$ref": f"#/{place}/V"}}, place: {"V": {"type": kind}}}
        return {"name": name, "parameters": parameters}

    functions = [function("f", "integer", "$defs"), function("g", "boolean", "$defs")]
    functions += [function("h", "string", "definitions"), {"name": "list", "parameters": LINKED}]
    assert allows(functions, call("f", v=1))
    assert allows(functions, call("g", v=True))
    assert allows(functions, call("h", v="a"))
    assert allows(functions, call("list", value=1, rest={"value": 2}))
    assert not allows(functions, call("f", v=True))
    assert not allows(functions, call("list", value=1, rest={"name": "f", "arguments": {}}))


LINKED = {"type": "object", "properties": {"value": {"type": "integer"}, "rest": {"$ref": "#"}}, "required": ["value"]}


def test_values_that_look_like_schemas_stay(allows):
    value = {"properties": {"$ref": "#/a"}}
    properties = {"v": {"const": value}, "default": POINT, "properties": {"type": "integer"}}
    functions = [{"name": "f", "parameters": {"type": "object", "properties": properties}}]
    assert allows(functions, call("f", v=value, default={"x": 1}, properties=3))
    assert not allows(functions, call("f", default={"y": 1}))


def test_several_calls_are_a_list(allows):
    functions = [{"name": "f", "parameters": POINT}, {"name": "g"}]
    assert allows(functions, [call("f", x=1), call("g")], several=True)
    assert not allows(functions, [], several=True)
    assert not allows(functions, [call("g", x=1)], several=True)
