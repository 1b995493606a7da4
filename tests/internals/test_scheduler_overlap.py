"""Operands that nothing reads, which let splits start at once. They are visible in the C struct of a node only."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import c
from ggml_cffi.c import library
from tests.support import need, relative_error


@pytest.mark.parametrize("inputs", [("Vulkan0", "Vulkan1"), ("Vulkan0", "Vulkan0")])
def test_no_split_of_two_branches_waits_for_the_other_branch(two_gpus, rng, inputs):
    inputs = need(inputs)
    W, X = rng.standard_normal((2, 32, 32), dtype=np.float32) / 6, rng.standard_normal((2, 4, 32), dtype=np.float32)
    with ggml.Context() as ctx, ggml.Scheduler(two_gpus) as scheduler:
        branches = []
        for i in range(2):
            w, x = ctx.new_tensor("f32", (32, 32)), ctx.new_tensor("f32", (4, 32))
            ctx.alloc(two_gpus[i], [w], usage=ggml.Usage.WEIGHTS)
            ctx.alloc(inputs[i], [x])
            w.set(W[i])
            x.set(X[i])
            branches.append(ggml.sum_rows(ggml.linear(x, w)))
        with ggml.Graph(ggml.add(*branches)) as graph:
            before = [p.src[9] for p in graph.node_pointers()]
            assert not any(before)
            for _ in range(2):
                scheduler.alloc(graph)
                assert len(scheduler.splits) == 3
                _, second, _ = (split.nodes for split in scheduler.splits)
                copied = any(src and src not in graph.members for p in second for src in p.ptr.src)
                assert copied == (library.provides("ggml_prec_set_acc") or inputs[1] == two_gpus[0])
                assert not any(t.ptr.src[9] for t, _ in scheduler.copies)
                for _ in range(2):
                    scheduler.compute()
                want = sum((x @ w.T).sum(-1, keepdims=True) for w, x in zip(W, X, strict=True))
                assert relative_error(graph.outputs[0].numpy(), want) < 5e-3
                scheduler.reset()
                assert [p.src[9] for p in graph.node_pointers()] == before
                assert c.ggml_nelements(branches[0].ptr) == 4
