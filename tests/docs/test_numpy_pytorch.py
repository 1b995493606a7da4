"""The page of names of numpy and PyTorch: it has the names that errors know, and the ways to write them are right."""

import re

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi.core.known_names import KNOWN_NAMES
from tests.docs.test_docs import DOCS
from tests.support import relative_error

TEXT = (DOCS / "numpy-pytorch.md").read_text()

#: For each name the values in numpy, one for each way to write it.
REFERENCES = {
    "abs": ["abs(x)", "abs(x)"],
    "amax": ["x.argmax(-1)"],
    "amin": ["x.argmin(-1)"],
    "argmax": ["x.argmax(-1)"],
    "argmin": ["x.argmin(-1)"],
    "argsort": ["x.argsort(-1)"],
    "astype": ["x"],
    "bfloat16": ["x"],
    "bmm": ["x @ y"],
    "broadcast_to": ["np.broadcast_to(x, shape)"],
    "cat": ["np.concatenate([a, b], axis)"],
    "ceil": ["np.ceil(x)"],
    "chunk": ["x[:n]", "x[n:]"],
    "clamp": ["x.clip(low, high)"],
    "clip": ["x.clip(low, high)"],
    "clone": ["x"],
    "concatenate": ["np.concatenate([a, b], axis)"],
    "contiguous": ["x"],
    "copy": ["x"],
    "cos": ["np.cos(x)"],
    "cumsum": ["x.cumsum(-1)"],
    "dot": ["x @ y"],
    "embedding": ["weights[rows]"],
    "exp": ["np.exp(x)"],
    "expand": ["np.broadcast_to(x, shape)"],
    "flatten": ["x.flatten()"],
    "float": ["x"],
    "floor": ["np.floor(x)"],
    "floor_divide": ["a // b"],
    "full_like": ["np.full_like(x, number)"],
    "gather": ["x[rows]"],
    "half": ["x"],
    "hstack": ["np.hstack([a, b])"],
    "index_select": ["x[rows]"],
    "l1_loss": ["np.abs(a - b).mean()"],
    "layer_norm": ["(x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias"],
    "log": ["np.log(x)"],
    "log_softmax": ["x - np.log(np.exp(x).sum(-1, keepdims=True))"],
    "logsumexp": ["np.log(np.exp(x).sum(-1))"],
    "masked_fill": ["np.where(mask == 1, x, 0)"],
    "matmul": ["x @ y"],
    "max": ["x.argmax(-1)"],
    "maximum": ["np.maximum(x, number)", "np.maximum(a, b)"],
    "min": ["x.argmin(-1)"],
    "minimum": ["np.minimum(x, number)", "np.minimum(a, b)"],
    "mm": ["x @ y"],
    "moveaxis": ["np.moveaxis(x, 0, 1)"],
    "movedim": ["np.moveaxis(x, 0, 1)"],
    "mse_loss": ["((a - b) ** 2).mean()"],
    "negative": ["-x"],
    "norm": ["np.linalg.norm(x, axis=-1)"],
    "normalize": ["x / np.linalg.norm(x, axis=-1, keepdims=True)"],
    "ones_like": ["np.ones_like(x)"],
    "outer": ["np.multiply.outer(row, row)"],
    "pow": ["x**number"],
    "power": ["x**number"],
    "ravel": ["x.ravel()"],
    "reciprocal": ["1 / x"],
    "relu": ["np.maximum(x, 0)"],
    "relu6": ["np.clip(x, 0, 6)"],
    "remainder": ["a % b"],
    "repeat": ["np.broadcast_to(x, shape)"],
    "roll": ["np.roll(x, shift, axis)"],
    "round": ["np.round(x)"],
    "rsqrt": ["1 / np.sqrt(x)"],
    "sigmoid": ["1 / (1 + np.exp(-x))"],
    "sign": ["np.sign(x)"],
    "silu": ["x / (1 + np.exp(-x))"],
    "sin": ["np.sin(x)"],
    "softmax": ["np.exp(x) / np.exp(x).sum(-1, keepdims=True)"],
    "softplus": ["np.log1p(np.exp(x))"],
    "sort": ["x.argsort(-1)"],
    "split": ["x[:n]", "x[n:]"],
    "sqrt": ["np.sqrt(x)"],
    "square": ["x**2"],
    "stack": ["np.stack([a, b])"],
    "std": ["x.std(-1)"],
    "t": ["x.T"],
    "take": ["np.take(x, rows, axis=0)"],
    "tanh": ["np.tanh(x)"],
    "tile": ["np.tile(x, (2, 1, 1))"],
    "tril": ["np.tril(x)"],
    "triu": ["np.triu(x)"],
    "type": ["x"],
    "unsqueeze": ["x[None]", "x[:, None]"],
    "var": ["x.var(-1)"],
    "view": ["x.reshape(shape)"],
    "vstack": ["np.vstack([a, b])"],
    "where": ["np.where(mask == 1, a, b)"],
    "zeros_like": ["np.zeros_like(x)"],
}
#: Names without a formula: values after a run, numbers, and functions whose arguments `tests/ops` covers.
NOT_COMPUTED = {
    "all",
    "any",
    "avg_pool2d",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "cpu",
    "cross_entropy",
    "cuda",
    "detach",
    "dim",
    "einsum",
    "gelu",
    "item",
    "max_pool2d",
    "numel",
    "scaled_dot_product_attention",
    "squeeze",
    "to",
    "tolist",
    "topk",
}


def rows():
    """Return for each name in the first column of a table the way to write it."""
    found = {}
    for names, write in re.findall(r"^\| (`[^|]*`) \| ([^|]*) \| [^|]*\|$", TEXT, re.M):
        for name in re.findall(r"`(\w+)`", names):
            found.setdefault(name, write)
    return found


def test_the_page_has_the_names_that_errors_know_with_the_same_ways_to_write_them():
    page = {name: write.replace("`", "") for name, write in rows().items() if name in KNOWN_NAMES}
    assert page == {name: text.replace("ggml_cffi.", "ggml.") for name, text in KNOWN_NAMES.items()}


def test_the_functions_of_numpy_that_the_page_lists_take_tensors():
    sentence = re.search(r"These functions of numpy take tensors: (.*?)\.", TEXT, re.S)[1]
    names = re.findall(r"`(\w+)`", sentence)
    assert len(names) > 20
    x = np.array([[0.5, 1.5], [2.25, 3.0]], np.float32)
    with ggml.Session(["CPU"]) as session:
        for name in names:
            function = getattr(np, name)
            operands = [2.0] if name in ("maximum", "minimum") else [x] * (function.nin - 1)
            got = session.compile(lambda x, function=function, operands=operands: function(x, *operands))(x)
            assert relative_error(got, function(x, *operands)) < 1e-5, name


def test_every_known_name_is_computed_or_known_not_to_be():
    assert set(REFERENCES) | NOT_COMPUTED == set(KNOWN_NAMES)
    assert not set(REFERENCES) & NOT_COMPUTED


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_a_way_to_write_a_name_gives_the_values_of_numpy(name, rng):
    written = [text for text in re.findall(r"`([^`]*)`", rows()[name]) if re.search(r"[(*/@\[-]|\.T", text)]
    written = [text for text in written if "top_k" not in text and text != "numpy()"]
    assert len(written) == len(REFERENCES[name])
    # Values in the middle between integers' edges, so that rounding does not decide a result of round or floor.
    signed = (rng.permutation(12).reshape(3, 4) - 5.3) / 2.1
    arrays = {
        "x": np.abs(signed) if name in ("log", "pow", "power", "rsqrt", "sqrt") else signed,
        "y": rng.standard_normal((4, 5)),
        "a": signed,
        "b": (rng.permutation(12).reshape(3, 4) + 1.7) / 3.3,
        "mask": rng.integers(0, 2, (3, 4)).astype(np.float64),
        "weights": rng.standard_normal((6, 4)),
        "rows": np.array([2, 0, 2], np.int32),
        "weight": rng.standard_normal(4),
        "bias": rng.standard_normal(4),
        "row": signed[0],
    }
    if name in ("tril", "triu"):
        arrays["x"] = signed[:, :3]
    if name == "outer":
        arrays["x"] = arrays["y"] = signed[0]
    numbers = {
        "number": 0.5,
        "low": -1.0,
        "high": 0.75,
        "inf": np.inf,
        "eps": 1e-5,
        "n": 1,
        "axis": -1,
        "axes": (1, 0),
        "shift": 1,
        "shape": (2, 6) if name == "view" else (2, 3, 4),
        "dtype": "f32",
        "kind": ggml.TriType.LOWER_DIAG if name == "tril" else ggml.TriType.UPPER_DIAG,
    }
    numbers["axis"] = 1 if name == "hstack" else 0 if name == "vstack" else -1
    with ggml.Session(["CPU"]) as session:
        for ours, reference in zip(written, REFERENCES[name], strict=True):
            compiled = session.compile(lambda ours=ours, **t: eval(ours, {"ggml": ggml, **numbers, **t}))
            used = {key: value for key, value in arrays.items() if re.search(rf"\b{key}\b", ours)}
            want = np.asarray(eval(reference, {"np": np, **numbers, **arrays}))
            got = compiled(**used)
            assert got.shape == want.shape
            assert relative_error(got, want) < (1e-2 if name in ("bfloat16", "half") else 1e-5)
