"""Objects behind the flat functions: they may be freed in any order, twice, or never."""

import pytest

from tests.support import need, run_python

SETUP = """
import gc, itertools, sys
from ggml_cffi.flat import *
from ggml_cffi.core.handle import live
def run(devices):
    gpus = [ggml_vulkan_init(i) for i in range(devices)]
    cpu = ggml_backend_cpu_init()
    sched = ggml_backend_sched_new([*gpus, cpu])
    ctx = ggml_init(1024)
    a = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 8)
    ggml_set_f32(a, range(8))
    b = ggml_scale(ctx, a, 2.0)
    graph = ggml_build_forward_expand(ctx, ggml_sum(ctx, b))
    return gpus, cpu, sched, ctx, graph, b
def compute(objects):
    ggml_backend_sched_graph_compute_async(objects[2], objects[4])
"""


def output_without_errors(code):
    done = run_python(SETUP + code)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.usefixtures("vulkan")
def test_objects_may_be_freed_in_any_order_and_twice():
    need(("Vulkan0",))
    code = """
for order in itertools.permutations(range(4)):
    objects = gpus, cpu, sched, ctx, graph, b = run(1)
    compute(objects)
    free = [lambda: [ggml_vulkan_free(g) for g in gpus], lambda: ggml_backend_free(cpu),
            lambda: ggml_backend_sched_free(sched), lambda: ggml_free(ctx)]
    for i in (*order, *order): free[i]()
    assert not live(), (order, live())
    for use in (lambda: ggml_get_f32(b), lambda: ggml_backend_sched_graph_compute(sched, graph),
                lambda: ggml_backend_sched_reserve(sched, graph), lambda: ggml_neg(ctx, b)):
        try: use()
        except Exception as error: assert "closed" in str(error), error
        else: raise AssertionError(use)
ggml_free(None), ggml_backend_free(None), ggml_backend_sched_free(None)
print("done")
"""
    assert output_without_errors(code) == "done\n"


def test_objects_that_are_never_freed_are_freed_without_a_warning():
    assert (
        output_without_errors("""
for _ in range(2):
    objects = run(0)
    compute(objects)
    del objects
    gc.collect()
    assert not live(), live()
kept = run(0)
compute(kept)
""")
        == ""
    )


def test_a_call_that_fails_leaves_no_objects():
    assert (
        output_without_errors("""
for call in (lambda: ggml_backend_sched_new([]), lambda: ggml_backend_sched_new(["nothing"]),
             lambda: ggml_build_forward_expand(ggml_init(1), ggml_new_tensor_1d(ggml_init(1), GGML_TYPE_F32, 1))):
    try: call()
    except ValueError: pass
gc.collect()
assert not live(), live()
""")
        == ""
    )
