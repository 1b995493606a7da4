"""Steps of optimizers. Their weights must have memory; operands of ``cases`` have none."""

import mmap

import numpy as np
import pytest

import ggml_cffi as ggml
from tests.cases import backward, training
from tests.support import relative_error

ALPHA, BETA1, BETA2, EPS, WD = 0.05, 0.9, 0.99, 1e-8, 0.1


@pytest.fixture
def ctx():
    with ggml.Context() as made:
        yield made


def weights(ctx, shape=(3, 5), on="CPU", n=1):
    made = [ctx.new_tensor("f32", shape) for _ in range(n)]
    ctx.alloc(on, made)
    return made if n > 1 else made[0]


def adamw(w, g, m, v, t):
    m = BETA1 * m + (1 - BETA1) * g
    v = BETA2 * v + (1 - BETA2) * g**2
    step = (m / (1 - BETA1**t)) / (np.sqrt(v / (1 - BETA2**t)) + EPS)
    return w - ALPHA * WD * w - ALPHA * step, m, v


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 33)])
def test_adamw_over_several_steps(ctx, devices, rng, shape):
    w, m, v = weights(ctx, shape, devices[0], 3)
    grad, params = ctx.new_tensor("f32", shape), ctx.new_tensor("f32", (7,))
    stepped = ggml.opt_step_adamw(w, grad, m, v, params)
    want = rng.standard_normal(shape), np.zeros(shape), np.zeros(shape)
    w.set(want[0])
    with ggml.Scheduler(devices) as s, ggml.Graph(stepped) as graph:
        s.alloc(graph)
        for t in range(1, 5):
            g = rng.standard_normal(shape)
            grad.set(g)
            params.set([ALPHA, BETA1, BETA2, EPS, WD, 1 / (1 - BETA1**t), 1 / (1 - BETA2**t)])
            s.compute(graph)
            want = adamw(want[0], g, want[1], want[2], t)
            assert relative_error(stepped.numpy(), want[0]) < 1e-5
            for got, wanted in zip((w, m, v), want, strict=True):
                assert relative_error(got.numpy(), wanted) < 1e-5


@pytest.mark.parametrize("shape", [(7,), (2, 3, 4, 33)])
def test_sgd_over_several_steps(ctx, devices, rng, shape):
    w = weights(ctx, shape, devices[0])
    grad, params = ctx.new_tensor("f32", shape), ctx.new_tensor("f32", (2,))
    stepped = ggml.opt_step_sgd(w, grad, params)
    want = rng.standard_normal(shape)
    w.set(want)
    with ggml.Scheduler(devices) as s, ggml.Graph(stepped) as graph:
        s.alloc(graph)
        params.set([ALPHA, WD])
        for _ in range(3):
            g = rng.standard_normal(shape)
            grad.set(g)
            s.compute(graph)
            want = want - ALPHA * WD * want - ALPHA * g
            assert relative_error(stepped.numpy(), want) < 1e-5
            assert relative_error(w.numpy(), want) < 1e-5


def test_sgd_learns_a_linear_function(ctx, devices, rng):
    """Compute a whole step in one graph: the prediction, its gradient, and the new weights."""
    x, noise = rng.standard_normal((64, 4)), 1e-3 * rng.standard_normal((64, 1))
    truth = np.array([[1.0, -2.0, 0.5, 3.0]])
    w = weights(ctx, (1, 4), devices[0])
    inputs, wanted = ctx.constant(x), ctx.constant(x @ truth.T + noise)
    turned = ctx.constant(x.T)
    params = ctx.constant([0.1, 0.0])
    error = ggml.sub(ggml.mul_mat(w, inputs), wanted)
    grad = ggml.mul_mat(turned, error.reshape(1, 64)) * (2 / 64)
    stepped = ggml.opt_step_sgd(w, grad, params)
    with ggml.Scheduler(devices) as s, ggml.Graph(stepped) as graph:
        s.alloc(graph)
        for _ in range(100):
            s.compute(graph)
        np.testing.assert_allclose(stepped.numpy(), truth, atol=1e-2)


def test_the_reference_of_the_loss_gradient_agrees_with_differences(rng):
    """Compare with central differences, for labels whose rows sum to 1."""
    logits, grad = rng.standard_normal((3, 5)), np.array(0.7)
    labels = rng.uniform(0.1, 1, (3, 5))
    labels /= labels.sum(-1, keepdims=True)
    want = backward.differences(lambda x: training.cross_entropy_loss(x, labels), logits, grad)
    np.testing.assert_allclose(training.cross_entropy_loss_back(grad, logits, labels), want, atol=1e-9)


def test_a_step_leaves_no_flag_on_the_weights(ctx):
    w = weights(ctx)
    flags = w.ptr.flags
    ggml.opt_step_sgd(w, ctx.new_tensor("f32", (3, 5)), ctx.new_tensor("f32", (2,)))
    assert w.ptr.flags == flags


def test_weights_and_moments_must_be_on_one_device(ctx, two_gpus):
    w, m = weights(ctx, on=two_gpus[0], n=2)
    v = weights(ctx, on=two_gpus[1])
    with pytest.raises(ValueError, match="a, m, v must be in memory of one device"):
        ggml.opt_step_adamw(w, ctx.new_tensor("f32", (3, 5)), m, v, ctx.new_tensor("f32", (7,)))


def adam(ctx, n=7, **changed):
    w, m, v = weights(ctx, n=3)
    given = {"a": w, "grad": ctx.new_tensor("f32", (3, 5)), "m": m, "v": v, "params": ctx.new_tensor("f32", (n,))}
    return lambda: ggml.opt_step_adamw(**{**given, **changed})


def closed(ctx):
    t = ctx.new_tensor("f32", (3, 5))
    ctx.alloc("CPU", [t])[0].close()
    return t


def read_only(ctx):
    t = ctx.new_tensor("f32", (3, 5))
    memory = ggml.Buffer.over(memoryview(mmap.mmap(-1, 4096)).toreadonly())
    start = ggml.c.ggml_backend_buffer_get_base(memory.ptr)
    ctx.put(t, memory, ggml.c.ffi.cast("char *", start))
    return t


WRONG = {
    "a, m, v and grad differ in shape": lambda ctx: adam(ctx, grad=ctx.new_tensor("f32", (5, 3))),
    r"params must be of shape \(7,\)": lambda ctx: adam(ctx, n=2),
    "a must be contiguous F32": lambda ctx: adam(ctx, a=ctx.new_tensor("f16", (3, 5))),
    "m must be contiguous F32": lambda ctx: adam(ctx, m=weights(ctx, (5, 3)).T),
    "grad must be contiguous F32": lambda ctx: adam(ctx, grad=ctx.new_tensor("f32", (5, 3)).T),
    "a, m, v must be different": lambda ctx: adam(ctx, **dict.fromkeys(("m", "v"), weights(ctx))),
    "a must be neither computed nor a view": lambda ctx: adam(ctx, a=ggml.relu(weights(ctx))),
    "v must be neither computed nor a view": lambda ctx: adam(ctx, v=weights(ctx, (15,)).reshape(3, 5)),
    "m persists from step to step": lambda ctx: adam(ctx, m=ctx.new_tensor("f32", (3, 5))),
    "v persists from step to step": lambda ctx: adam(ctx, v=closed(ctx)),
    "a is in read-only memory": lambda ctx: adam(ctx, a=read_only(ctx)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_operands_name_the_rule(ctx, message):
    call = WRONG[message](ctx)
    with pytest.raises(ValueError, match=f"opt_step_adamw: {message}"):
        call()


def test_sgd_has_the_same_rules(ctx):
    grad, params = ctx.new_tensor("f32", (3, 5)), ctx.new_tensor("f32", (2,))
    with pytest.raises(ValueError, match="opt_step_sgd: a persists from step to step"):
        ggml.opt_step_sgd(ctx.new_tensor("f32", (3, 5)), grad, params)
    with pytest.raises(ValueError, match=r"opt_step_sgd: params must be of shape \(2,\)"):
        ggml.opt_step_sgd(weights(ctx), grad, ctx.new_tensor("f32", (7,)))
