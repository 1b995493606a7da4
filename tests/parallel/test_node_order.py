"""Order of nodes for GPUs."""

from itertools import pairwise

import ggml_cffi as ggml
from ggml_cffi import ops
from ggml_cffi.parallel.node_order import by_levels


def test_independent_nodes_are_neighbours():
    """Independent products are neighbours, fused nodes stay together, and views follow their sources."""
    with ggml.Context() as ctx:
        x, w = ctx.new_tensor("f32", (1, 64)), ctx.new_tensor("f32", (64, 64))
        cache, rows = ctx.new_tensor("f16", (8, 64)), ctx.new_tensor("i64", (1,))
        positions = ctx.new_tensor("i32", (1,))
        h = ops.mul(ops.rms_norm(x), ctx.new_tensor("f32", (64,)))
        q, k, v = (ops.reshape(ops.linear(h, w), (1, 2, 32)) for _ in range(3))
        q, k = (ops.rope_ext(t, positions, n_dims=32) for t in (q, k))
        written = ops.set_rows(cache, ops.view(k, (1, 64)), rows)
        with ggml.Graph(
            ops.add(ops.add(ops.view(q, (1, 64)), ops.get_rows(written, positions)), ops.view(v, (1, 64)))
        ) as g:
            before = g.node_pointers()
            order = by_levels(before)
            assert sorted(map(hash, order)) == sorted(map(hash, before))
            place = {p: i for i, p in enumerate(order)}
            for p in order:
                assert all(place[q] < place[p] for q in p.src if q in place)
            names = [ggml.Op(p.op).name for p in order if ggml.Op(p.op).name not in ("RESHAPE", "PERMUTE")]
            assert names[:5] == ["RMS_NORM", "MUL", "MUL_MAT", "MUL_MAT", "MUL_MAT"]
            i = names.index("SET_ROWS")
            assert names[i - 2 : i] == ["ROPE", "VIEW"]
            assert names[-2:] == ["ADD", "ADD"]
        assert all(a != b for a, b in pairwise(order))
