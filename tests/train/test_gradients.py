"""Gradients, compared with central differences of the float64 references; optimizers, compared with numpy."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import Type
from tests.cases import In, case
from tests.support import relative_error

POSITIVE = (0.5, 2.0)
UNARY = ["abs", "neg", "relu", "exp", "expm1", "softplus", "silu", "tanh", "sigmoid", "elu", "gelu", "gelu_quick"]
UNARY += ["sqr", "sin", "cos", "sum", "sum_rows", "mean", "cumsum", "rms_norm", "norm", "cont", "leaky_relu"]
CASES = [
    *(case(name, a=In(shape)) for name in UNARY for shape in ((7,), (2, 3, 5)) if name != "leaky_relu"),
    *(case("leaky_relu", a=In(shape), negative_slope=0.1) for shape in ((7,), (3, 5))),
    *(case(name, a=In((3, 5), values=POSITIVE)) for name in ("sqrt", "log")),
    *(case(name, a=In((2, 4, 6)), b=In((2, 6), values=POSITIVE)) for name in ("add", "sub", "mul", "div")),
    *(case(name, a=In((4, 6)), b=In((4, 6), values=POSITIVE)) for name in ("add", "sub", "mul", "div")),
    case("scale", a=In((3, 5)), factor=-2.5),
    case("scale_bias", a=In((3, 5)), factor=-2.5, bias=1.0),
    case("mul_mat", a=In((5, 8)), b=In((3, 8))),
    case("mul_mat", a=In((2, 5, 8)), b=In((6, 3, 8))),
    case("mul_mat", a=In((5, 8)), b=In((2, 2, 3, 8))),
    case("mul_mat", a=In((5, 8)), b=In((9, 8)), prec=ggml.Prec.F32),
    case("mul_mat", a=In((2, 5, 8)), b=In((6, 3, 8)), prec=ggml.Prec.F32),
    case("soft_max_ext", a=In((3, 7)), scale=0.5),
    case("repeat", a=In((2, 3)), shape=(4, 6)),
    case("concat", a=In((2, 3)), b=In((4, 3)), axis=0),
    case("concat", a=In((2, 3)), b=In((2, 2)), axis=1),
    case("reshape", a=In((2, 6)), shape=(3, 4)),
    case("permute", a=In((2, 3, 4)), axes=(2, 0, 1)),
    case("permute", a=In((2, 3, 4)), axes=(1, 0, 2)),
    case("transpose", a=In((3, 4))),
    case("view", a=In((3, 4)), shape=(2, 2), strides=(16, 4), offset=20),
    case("swiglu_split", x=In((3, 4)), y=In((3, 4))),
    case("reglu_split", x=In((3, 4)), y=In((3, 4))),
    case("geglu_split", x=In((3, 4)), y=In((3, 4))),
    case("diag_mask_zero", a=In((4, 4)), n_past=0),
    case("get_rows", a=In((5, 4)), rows=In((3,), Type.I32, values=5)),
    case("cross_entropy_loss", logits=In((4, 6)), labels=In((4, 6), values=np.eye(6)[[1, 0, 5, 2]])),
    case("rope_ext", a=In((3, 2, 8)), positions=In((3,), Type.I32, values=9), n_dims=8),
    case("rope_ext", a=In((3, 2, 8)), positions=In((3,), Type.I32, values=9), n_dims=4, offset=2),
    case("rope_ext", a=In((3, 2, 8)), positions=In((3,), Type.I32, values=9), n_dims=6, mode=ggml.RopeMode.NEOX),
]


def differences(function, x, step=1e-4):
    """Return the gradient of a function of an array, by central differences."""
    found = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        found[i] = (function(up) - function(down)) / (2 * step)
    return found


@pytest.mark.parametrize("one", CASES, ids=str)
def test_gradients_match_central_differences(one, devices, rng):
    operands = one.operands()
    values = {name: spec.draw(rng) for name, spec in operands.items()}
    weights = rng.standard_normal(one.want(values).shape)
    with ggml.Context() as ctx, ggml.Scheduler(devices) as s:
        result, inputs = one.build(ctx)
        factor = ctx.new_tensor("f32", weights.shape)
        loss = ggml.sum(ggml.mul(ggml.cont(result), factor))
        wanted = [name for name, spec in operands.items() if spec.dtype is Type.F32 and name != "labels"]
        with ggml.Graph.backward(loss, [inputs[name] for name in wanted]) as graph:
            s.alloc(graph)
            for name, base in inputs.items():
                operands[name].store(base, values[name])
            factor.set(weights)
            s.compute(graph)
            for name in wanted:
                got = graph.gradients[inputs[name]].numpy()
                want = differences(lambda x, name=name: (one.want({**values, name: x}) * weights).sum(), values[name])
                assert got.shape == values[name].shape
                assert relative_error(got, want) < 2e-3, name


def test_gradients_of_shared_tensors_and_through_quantized_weights(devices, rng):
    x0, w0 = rng.standard_normal((3, 32)), rng.standard_normal((5, 32))
    with ggml.Context() as ctx, ggml.Scheduler(devices) as s:
        x, w = ctx.new_tensor("f32", (3, 32)), ctx.new_tensor("q8_0", (5, 32))
        loss = ggml.sum(ggml.sqr(ggml.linear(ggml.add(x, ggml.mul(x, x)), w)))
        with ggml.Graph.backward(loss, [x]) as graph:
            s.alloc(graph)
            x.set(x0)
            w.set(w0)
            s.compute(graph)
            rounded = w.numpy().astype(np.float64)
            want = (2 * (x0 + x0**2) @ rounded.T @ rounded) * (1 + 2 * x0)
            assert relative_error(graph.gradients[x].numpy(), want) < 3e-2  # activations are rounded to 8 bits, twice


def test_operations_without_gradient_raise():
    with ggml.Context() as ctx:
        x = ctx.new_tensor("f32", (4, 4))
        for wrong, name in (
            (ggml.hardswish(x), "hardswish"),
            (ggml.roll(x, 1, 0), "roll"),
            (ggml.swiglu(x), "<Tensor"),
        ):
            with pytest.raises(ggml.UnsupportedOpError, match=f"there is no gradient of {name}"):
                ggml.gradients(ggml.sum(wrong), [x])


def test_wrong_arguments_raise():
    with ggml.Context() as ctx:
        x, y = ctx.new_tensor("f32", (4,)), ctx.new_tensor("f32", (4,))
        half = ctx.new_tensor("f16", (4,))
        for loss in (x, ggml.argmax(ctx.new_tensor("f32", (1, 4)))):
            with pytest.raises(ValueError, match="a loss is one F32 element, not <Tensor"):
                ggml.gradients(loss, [x])
        with pytest.raises(ValueError, match="is not F32: parameters must be"):
            ggml.gradients(ggml.sum(x), [half])
        with pytest.raises(ValueError, match="the loss does not depend on <Tensor"):
            ggml.gradients(ggml.sum(x), [y])
        with pytest.raises(ValueError, match="in a way that has a gradient"):
            ggml.gradients(ggml.sum(ggml.step(x)), [x])
        with pytest.raises(TypeError, match="a tensor and a sequence of tensors"):
            ggml.gradients(1.0, [x])
        with pytest.raises(ggml.UnsupportedOpError, match="is in place: its gradient needs"):
            ggml.gradients(ggml.sum(ggml.relu_inplace(ggml.scale(x, 1.0))), [x])
        with ggml.Scheduler(["CPU"]) as s:
            with pytest.raises(ValueError, match=r"has no memory: use Context\.alloc"):
                ggml.AdamW(s, ggml.sum(x), [x])
            ctx.alloc("CPU", [x])
            for wrong in ({"lr": 0}, {"lr": float("nan")}, {"betas": (1, 0.9)}, {"eps": -1}, {"weight_decay": 2}):
                with pytest.raises(ValueError, match="must be"):
                    ggml.AdamW(s, ggml.sum(x), [x], **wrong)


def adamw(w, g, m, v, t, lr, b1, b2, eps, wd):
    m[:] = b1 * m + (1 - b1) * g
    v[:] = b2 * v + (1 - b2) * g * g
    w[:] = (1 - lr * wd) * w - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_optimizer_steps_match_numpy(devices, kind, rng):
    x0, y0 = rng.standard_normal((9, 4)), rng.standard_normal((9, 3))
    w0, b0 = rng.standard_normal((3, 4)), rng.standard_normal(3)
    with ggml.Context() as weights, ggml.Context() as ctx, ggml.Scheduler(devices) as s:
        w, b = weights.new_tensor("f32", (3, 4)), weights.new_tensor("f32", (3,))
        weights.alloc(devices[-1])
        w.set(w0)
        b.set(b0)
        x, y = ctx.new_tensor("f32", (9, 4)), ctx.new_tensor("f32", (9, 3))
        out = ggml.linear(x, w, b)
        loss = ggml.scale(ggml.sum(ggml.sqr(ggml.sub(out, y))), 1 / 27)
        settings = {"lr": 0.05, "weight_decay": 0.1}
        made = (
            ggml.AdamW(s, loss, [w, b], [out], **settings) if kind == "adamw" else ggml.SGD(s, loss, [w, b], **settings)
        )
        with made as optimizer:
            optimizer.alloc()
            x.set(x0)
            y.set(y0)
            state = [np.zeros_like(v) for v in (w0, w0, b0, b0)]
            for t in range(1, 6):
                error = x0 @ w0.T + b0 - y0
                got = optimizer.step()
                assert got == pytest.approx((error**2).mean(), rel=1e-3)
                grads = 2 / 27 * error.T @ x0, 2 / 27 * error.sum(0)
                if kind == "adamw":
                    adamw(w0, grads[0], *state[:2], t, 0.05, 0.9, 0.999, 1e-8, 0.1)
                    adamw(b0, grads[1], *state[2:], t, 0.05, 0.9, 0.999, 1e-8, 0.1)
                else:
                    w0 = (1 - 0.05 * 0.1) * w0 - 0.05 * grads[0]
                    b0 = (1 - 0.05 * 0.1) * b0 - 0.05 * grads[1]
            assert relative_error(w.numpy(), w0) < 2e-3
            assert relative_error(b.numpy(), b0) < 2e-3
            assert optimizer.steps_done == 5
            optimizer.reset()
            assert optimizer.steps_done == 0
