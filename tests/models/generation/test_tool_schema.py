"""JSON schemas of Python functions, as ``transformers`` makes them."""

import json
from functools import partial

import pytest

from ggml_cffi import models
from ggml_cffi.models import ChatParser, tool_schema
from ggml_cffi.models.generation import ChatTemplate
from tests.support import ROOT
from tests.support.tool_functions import FUNCTIONS, Store, clock, weather

EXPECTED = json.loads((ROOT / "tests" / "data" / "tool_schemas.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_schema_is_that_of_transformers(name):
    found = tool_schema(FUNCTIONS[name])
    assert found == EXPECTED[name]
    assert json.dumps(found) == json.dumps(EXPECTED[name])  # templates write the keys in their order


def test_docstrings_of_numpy_are_read():
    def f(city: str, days: int = 1) -> str:
        """Return the weather.

        Parameters
        ----------
        city : str
            Name of the city,
            with its country.
        days
            Number of days.

        Returns
        -------
        str
        """
        return city * days

    assert tool_schema(f)["function"] == {
        "name": "f",
        "description": "Return the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city, with its country."},
                "days": {"type": "integer", "description": "Number of days."},
            },
            "required": ["city"],
        },
        "return": {"type": "string", "description": "str"},
    }


def test_a_parameter_may_have_no_description():
    def f(city: str):
        """Return the weather."""

    assert tool_schema(f)["function"]["parameters"]["properties"] == {"city": {"type": "string"}}


def no_type(city):
    """Return the weather."""


def no_docstring(city: str):
    pass


def other_type(city: Store):
    """Return the weather."""


def no_choices(city: str):
    """Return the weather.

    Args:
        city: Name (choices: Rome)
    """


def several_values(*cities: str):
    """Return the weather."""


def by_place(city: str, /):
    """Return the weather."""


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (no_type, "the parameter 'city' of the function no_type has no type"),
        (no_docstring, "the function no_docstring has no docstring"),
        (other_type, "the parameter 'city' of other_type has the type .*Store.* write the schema as a dict"),
        (no_choices, "the choices 'Rome' are no JSON list"),
        (several_values, r"the parameter '\*cities: str' of the function several_values cannot be given by its name"),
        (by_place, "the parameter 'city: str' of the function by_place cannot be given by its name"),
    ],
)
def test_a_function_that_says_too_little_is_refused(function, match):
    with pytest.raises(ValueError, match=match):
        tool_schema(function)


def test_tools_may_be_functions():
    template = ChatTemplate("{{ tools | tojson }}")
    schemas = [EXPECTED["weather"], EXPECTED["clock"]]
    assert template.render([], tools=[weather, schemas[1]]) == json.dumps(schemas)
    message = ChatParser("llama3", tools=[clock]).parse('{"name": "clock", "parameters": {}}')
    assert message.tool_calls[0].name == "clock"
    for wrong in ("weather", {"name": "f"}, 3):
        with pytest.raises(TypeError, match="tools must be a list of JSON schemas or functions"):
            template.render([], tools=wrong)
    for wrong in (["weather"], [Store], [partial(weather)]):
        with pytest.raises(TypeError, match="a tool must be a JSON schema or a function"):
            template.render([], tools=wrong)


def test_the_function_is_public():
    assert models.tool_schema is tool_schema
