"""Text for terminals: tables, and sizes in bytes."""

from __future__ import annotations

import json
from types import MappingProxyType

import pytest

from ggml_cffi.core.text import size, table, to_json


def test_a_table_aligns_its_columns():
    assert table([("a", "bbb"), ("cc", "d")], right=(1,)) == "a   bbb\ncc    d"


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0.0 KiB"), (512, "0.5 KiB"), (2**20, "1.0 MiB"), (3 * 2**29, "1.5 GiB"), (2**41, "2048.0 GiB")]
)
def test_sizes_are_in_binary_units(n, text):
    assert size(n) == text


def test_json_has_no_nan_and_no_infinity():
    value = {"a": [1.5, float("nan"), (float("inf"), "NaN")], "b": -float("inf"), "c": "é"}
    assert json.loads(to_json(value), parse_constant=pytest.fail) == {
        "a": [1.5, None, [None, "NaN"]],
        "b": None,
        "c": "é",
    }
    assert to_json(MappingProxyType({"a": (1, float("inf"))})) == '{"a": [1, null]}'
    assert to_json("é") == '"\\u00e9"'
    assert to_json("é", ascii_only=False) == '"é"'
