"""Every operation against numpy in float64 on every set of devices; see ``cases``."""

import inspect

import numpy as np
import pytest

import ggml_cffi as ggml
from tests import cases
from tests.support import relative_error, skip_if_newer_needed


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_against_numpy(case, devices, rng):
    with skip_if_newer_needed():
        got, want, allowed = case.run(devices, rng)
    assert got.shape == want.shape
    if got.dtype.kind == "i":
        np.testing.assert_array_equal(got, want)
    else:
        finite = np.isfinite(want)
        np.testing.assert_array_equal(got[~finite], want[~finite])
        assert relative_error(got[finite], want[finite]) <= allowed


@pytest.mark.parametrize("message", cases.WRONG)
def test_wrong_operands_name_the_rule(message):
    with ggml.Context() as ctx, skip_if_newer_needed(), pytest.raises((ValueError, TypeError, IndexError)) as caught:
        cases.WRONG[message](lambda *shape, dtype="f32": ctx.new_tensor(dtype, shape))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", sorted(cases.REFERENCE))
def test_references_have_the_parameters_of_their_operations(name):
    operation = inspect.signature(getattr(ggml, name)).parameters
    assert set(inspect.signature(cases.REFERENCE[name]).parameters) <= set(operation) - {"ctx"}


def test_every_operation_has_cases_of_two_shapes():
    """Look for two shapes of each operation; ``elsewhere`` lists operations with a test of their own."""
    found = {}
    for case in cases.CASES:
        found.setdefault(case.op, set()).add(tuple(spec.shape for spec in case.operands().values()))
    elsewhere = {"opt_step_adamw", "opt_step_sgd", "custom_4d", "custom_inplace", "arange", "view"}
    functions = {n for n in ggml.ops.__all__ if inspect.isfunction(getattr(ggml, n))} - elsewhere
    assert {n for n in functions if len(found.get(n, ())) < 2} == set()
