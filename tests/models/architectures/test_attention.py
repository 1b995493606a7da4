"""Attention over the KV cache against float64: of a prompt, and of one token of each of several sequences."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi.core.dtypes import as_type
from ggml_cffi.models.architectures.attention import attend, store, store_both, store_transposed
from ggml_cffi.models.architectures.base import Inputs, LayerCache
from ggml_cffi.models.runners.inputs import DeviceInputs, InputMemory
from ggml_cffi.models.runners.kv_length import KVLength
from tests.support import relative_error

N_SLOTS, START, STRIDE, N_KV, BUILT = 512, 32, 96, 48, 32  # Vulkan needs views at multiples of 64 bytes


def expected(q, k, v, mask, cap):
    """Return the attention of one token ``(heads, size)`` over the slots of one range."""
    group = len(q) // k.shape[1]
    scores = np.stack([k[:, head // group] @ one for head, one in enumerate(q)]) / np.sqrt(q.shape[1])
    if cap:
        scores = cap * np.tanh(scores / cap)
    p = np.exp(scores + mask - (scores + mask).max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return np.concatenate([one @ v[:, head // group] for head, one in enumerate(p)])


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "size", "dtype"), [(4, 2, 64, "f16"), (3, 3, 32, "f32")])
@pytest.mark.parametrize("layout", ["two products", "flash attention", "written at once"])
def test_each_token_attends_to_its_range(device_name, vulkan, rng, layout, n_heads, n_kv_heads, size, dtype, cap):
    """Three tokens have ranges 2, 0 and 3 of four. The second range belongs to no token.

    Views change in place, after the checks: the layouts are those that a processor and Vulkan's kernels take.
    """
    transposed, at_once = layout == "two products", layout == "written at once"
    result_ids = np.array([2, 0, 3], np.int32)
    query_ids, n_ranges, n = np.array([1, 0, 0, 2], np.int32), 4, 3
    starts = START + STRIDE * result_ids.astype(np.int64)
    slots = starts + np.array([7, 30, 47])  # of the new tokens
    mask = np.full((n_ranges, N_KV), -np.inf, np.float32)
    mask[1] = 0
    for place, start, slot in zip(result_ids, starts, slots, strict=True):
        mask[place, : slot - start + 1] = 0
    q, new_k, new_v = (rng.standard_normal((n, heads, size)) for heads in (n_heads, n_kv_heads, n_kv_heads))
    old_k, old_v = (rng.standard_normal((N_SLOTS, n_kv_heads * size)) for _ in "kv")
    others = [] if device_name == "CPU" else ["CPU"]
    with (
        ggml.Context() as context,
        ggml.Backend(device_name) as backend,
        ggml.Scheduler([backend, *others]) as scheduler,
    ):
        shapes = {"kv_slots": (n,), "query_ids": (n_ranges,), "result_ids": (n,), "mask": (n_ranges, 1, 1, N_KV)}
        given = DeviceInputs(context, shapes, InputMemory(backend, shapes, context), BUILT)
        given.write({"kv_slots": slots, "query_ids": query_ids, "result_ids": result_ids, "mask": mask}, 0)
        given.send(0)
        t = given.tensors
        none = t["result_ids"]  # for the inputs that attention does not read
        inputs = Inputs(
            none, none, t["kv_slots"], t["mask"], none, query_ids=t["query_ids"], result_ids=t["result_ids"]
        )
        cached = [np.stack([old_k, old_v])] if at_once else [old_k, old_v.T if transposed else old_v]
        stored = [context.new_tensor(as_type(dtype), values.shape) for values in cached]
        context.alloc(backend.buffer_type, stored)
        for tensor, values in zip(stored, cached, strict=True):
            tensor.set(values)
        cache = LayerCache(stored[0], stored[-1], transposed)
        rows = [x.reshape(n, -1) for x in (new_k, new_v)]
        if at_once:
            k, v = store_both(stored[0], context.constant(np.stack(rows)), size, inputs, inputs.mask)
        else:
            new = [context.constant(x) for x in rows]
            k = store(cache.k, new[0], size, inputs, inputs.mask)
            v = (store_transposed if transposed else store)(cache.v, new[1], size, inputs, inputs.mask)
        out = attend(context.constant(q), k, v, cache, inputs, inputs.mask, scale=1 / np.sqrt(size), cap=cap)
        length = KVLength(inputs.kv_views, [inputs.mask], BUILT, inputs.kv_results, ranges=True)
        length.set(N_KV)
        with ggml.Graph(out) as graph:
            scheduler.alloc(graph)
            length.move(START, STRIDE)
            scheduler.compute(graph)
            got = out.numpy()
    for old, new in ((old_k, new_k), (old_v, new_v)):
        old[slots] = new.reshape(n, -1)
    all_k, all_v = (old.reshape(N_SLOTS, n_kv_heads, size) for old in (old_k, old_v))
    want = [
        expected(q[i], all_k[start : start + N_KV], all_v[start : start + N_KV], mask[place], cap)
        for i, (place, start) in enumerate(zip(result_ids, starts, strict=True))
    ]
    assert got.shape == (n, n_heads * size)
    assert relative_error(got, np.stack(want)) < 5e-3


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize(
    ("n", "n_heads", "n_kv_heads", "size", "dtype", "is_tiled"),
    [
        (80, 4, 2, 64, "f16", True),
        (128, 2, 1, 128, "f32", True),
        (127, 2, 1, 128, "f16", False),  # large heads need more rows
        (63, 4, 2, 64, "f16", False),
        (80, 4, 2, 8, "f16", False),  # less than a vector
        (80, 4, 4, 32, "bf16", False),
    ],
)
def test_a_prompt_attends_tile_by_tile_on_the_cpu(rng, n, n_heads, n_kv_heads, size, dtype, is_tiled, cap):
    """The slots before the prompt are those of another sequence, and the number of slots changes in place."""
    first, n_kv = 20, 160
    slots = np.arange(first, first + n)
    mask = np.full((n, n_kv), -np.inf, np.float32)
    for i in range(n):
        mask[i, first : first + i + 1] = 0
    q, new_k, new_v = (rng.standard_normal((n, heads, size)) for heads in (n_heads, n_kv_heads, n_kv_heads))
    with ggml.Context() as context, ggml.Backend("CPU") as cpu, ggml.Scheduler([cpu]) as scheduler:
        shapes = {"kv_slots": (n,), "mask": (n, N_SLOTS)}
        given = DeviceInputs(context, shapes, InputMemory(cpu, shapes, context))
        none = given.tensors["kv_slots"]  # for the inputs that attention does not read
        inputs = Inputs(none, none, none, given.tensors["mask"], none)
        stored = [
            context.new_tensor(as_type(dtype), s) for s in ((N_SLOTS, n_kv_heads * size), (n_kv_heads * size, N_SLOTS))
        ]
        context.alloc("CPU", stored)
        cache = LayerCache(*stored, v_transposed=True, tiled=True)
        rows = [context.constant(x.reshape(n, -1)) for x in (new_k, new_v)]
        k = store(cache.k, rows[0], size, inputs, inputs.mask)
        v = store_transposed(cache.v, rows[1], size, inputs, inputs.mask)
        out = attend(context.constant(q), k, v, cache, inputs, inputs.mask, scale=1 / np.sqrt(size), cap=cap)
        length = KVLength(inputs.kv_views, [inputs.mask], N_SLOTS, inputs.kv_results)
        length.set(n_kv)
        with ggml.Graph(out) as graph:
            assert (ggml.Op.FLASH_ATTN_EXT in [node.op for node in graph.nodes]) is is_tiled
            scheduler.alloc(graph)
            given.write({"kv_slots": slots, "mask": mask}, 0)
            given.send(0)
            scheduler.compute(graph)
            got = out.numpy()
    all_k, all_v = (np.concatenate([np.zeros((first, *new.shape[1:])), new]) for new in (new_k, new_v))
    want = [expected(q[i], all_k, all_v, mask[i, : first + n], cap) for i in range(n)]
    assert relative_error(got, np.stack(want)) < (2e-2 if dtype == "bf16" else 2e-3)
