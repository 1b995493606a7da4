"""Shards of weights."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi.core import dtypes
from ggml_cffi.parallel import COLUMNS, MIRROR, ROWS, split_evenly
from ggml_cffi.parallel.shard import shard_bytes, spec_for
from tests.support.ranks import Ranks


def test_units_are_split_evenly():
    assert split_evenly(8, 2) == (4, 4)
    assert split_evenly(3, 2) == (1, 2)
    assert split_evenly(9, 4) == (2, 2, 2, 3)
    assert split_evenly(7, 2, whole=2) == (4, 3)
    with pytest.raises(ValueError, match="the heads has 3 parts that stay whole, 2 at a time: too few for 3 devices"):
        split_evenly(3, 3, "the heads", whole=2)


@pytest.mark.parametrize(
    ("dtype", "shape", "cut", "shapes"),
    [
        ("f32", (6, 4), MIRROR, [(6, 4), (6, 4)]),
        ("f32", (5, 4), ROWS, [(2, 4), (3, 4)]),
        ("f16", (6, 4), ROWS.of(1, 2), [(2, 4), (4, 4)]),
        ("f32", (2, 5), COLUMNS, [(2, 2), (2, 3)]),
        ("q8_0", (3, 96), COLUMNS, [(3, 32), (3, 64)]),
        ("q4_k", (2, 1024), COLUMNS.of(3, 1), [(2, 768), (2, 256)]),
        ("q8_0", (4, 32), ROWS, [(2, 32), (2, 32)]),
        ("f32", (7,), ROWS, [(3,), (4,)]),
        ("f32", (4, 2, 3), ROWS, [(2, 2, 3), (2, 2, 3)]),
        ("f32", (4, 2, 4), COLUMNS, [(4, 2, 2), (4, 2, 2)]),
    ],
    ids=str,
)
def test_shard_bytes(dtype, shape, cut, shapes, rng):
    kind = ggml.Type[dtype.upper()]
    raw = ggml.quantize(rng.standard_normal(shape), kind).reshape(-1) if "q" in dtype else None
    if raw is None:
        raw = rng.standard_normal(shape).astype(dtypes.numpy_dtype(kind)).reshape(-1).view(np.uint8)
    values = lambda data, s: (  # noqa: E731
        ggml.dequantize(data, kind, s) if "q" in dtype else data.view(dtypes.numpy_dtype(kind)).reshape(s)
    )
    assert cut.shapes(kind, shape, 2) == shapes
    found = [values(data, s) for data, s in zip(shard_bytes(kind, shape, raw, cut, 2), shapes, strict=True)]
    whole = values(raw, shape)
    if cut is MIRROR:
        assert all((part == whole).all() for part in found)
    else:
        np.testing.assert_array_equal(np.concatenate(found, cut.axis), whole)


def test_impossible_shards_are_refused():
    kind = ggml.F32
    for cut, dtype, shape, message in (
        (ROWS.of(1, 2, 3), kind, (6, 4), r"shares \(1, 2, 3\) are not one number above 0 for each of 2 devices"),
        (ROWS.of(0, 2), kind, (6, 4), "are not one number above 0"),
        (ROWS.of(1, 2), kind, (7, 4), "an axis of 7 cannot be divided 1:2$"),
        (COLUMNS.of(1, 3), ggml.Q4_K, (2, 512), r"cannot be divided 1:3 into whole blocks of 256 \(Q4_K\)"),
        (COLUMNS, ggml.Q8_0, (2, 32), r"Q8_0 \(2, 32\) has 1 parts that stay whole: too few for 2 devices"),
        (ROWS, kind, (), "a tensor without axes cannot be sharded"),
    ):
        with pytest.raises(ValueError, match=message):
            cut.spans(dtype, shape, 2)
    with Ranks() as group, pytest.raises(ValueError, match=r"^a\.down: F32 \(4, 1\) has 1 parts"):
        group.weights({"a.down": np.ones((4, 1), np.float32)}, {"*.down": COLUMNS})


def test_the_first_rule_that_fits_a_name_counts():
    rules = {"*.up": ROWS, "a.*": COLUMNS}
    assert [spec_for(name, rules) for name in ("a.up", "a.down", "b.down")] == [ROWS, COLUMNS, MIRROR]
