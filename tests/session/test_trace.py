"""Traces: the key of a call, and the structure of arguments and results."""

from __future__ import annotations

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi.session.trace import flatten, map_tensors


def test_calls_that_differ_in_type_shape_or_constant_have_different_keys():
    values = [1, 1.0, True, None, "1", (1,), [1], {"a": 1}, {"b": 1}, np.zeros(1), np.zeros(2), np.zeros(1, np.float32)]
    assert len({flatten(value, []) for value in values}) == len(values)


def test_calls_that_differ_in_the_values_of_arrays_only_share_a_key():
    arrays = []
    assert flatten(([np.zeros(3)], {"x": np.ones(2)}), arrays) == flatten(([np.ones(3)], {"x": np.zeros(2)}), [])
    assert [a.shape for a in arrays] == [(3,), (2,)]


def test_map_tensors_leaves_other_values_alone():
    with ggml.Context() as ctx:
        t = ctx.new_tensor(ggml.F32, (2, 3))
        mapped = map_tensors({"a": (t, 1, None), "b": [t, "c"]}, lambda tensor: tensor.shape)
    assert mapped == {"a": ((2, 3), 1, None), "b": [(2, 3), "c"]}


def test_an_argument_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match="numbers are needed, not object"):
        flatten((object(),), [])


def test_the_sign_of_zero_and_nan_are_part_of_the_key():
    keys = [flatten((value,), []) for value in (0.0, -0.0, float("nan"), float("nan"), np.float64(0.0))]
    assert keys[0] != keys[1]
    assert keys[2] == keys[3]
    assert keys[0] != keys[4]
    x = np.ones(2, np.float32)
    with ggml.Session(["CPU"]) as s:
        f = s.compile(lambda x, number: x * number)
        for number in (0.0, -0.0, 0.0):
            assert np.signbit(f(x, number)).tolist() == [bool(np.signbit(number))] * 2
        assert len(f.programs) == 2
        default = s.compile(lambda x, number: x * (2 if number != number else number))
        for _ in range(3):
            assert default(x, float("nan")).tolist() == [2, 2]
        assert len(default.programs) == 1
