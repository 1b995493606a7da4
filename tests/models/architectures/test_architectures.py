"""Architectures: small random models against float64 and transformers, Gemma 3 against llama.cpp and float64."""

import json
from dataclasses import replace

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import c, models
from ggml_cffi.enums import Op, Prec
from ggml_cffi.models import ARCHITECTURES
from ggml_cffi.models.architectures.base import Inputs, LayerCache
from tests.scripts import make_transformers
from tests.support import DATA, golden, llama_float64, relative_error

TRANSFORMERS = json.loads((DATA / "transformers.json").read_text())["logits"]
GOLDEN = json.loads((DATA / "gemma3.json").read_text())["cases"]
EXACT = json.loads((DATA / "gemma3_float64.json").read_text())["cases"]

LINEAR = {".rope.scaling.type": "linear", ".rope.scaling.factor": 4.0}
YARN = {
    ".rope.scaling.type": "yarn",
    ".rope.scaling.factor": 4.0,
    ".rope.scaling.original_context_length": 256,
    ".rope.scaling.yarn_beta_fast": 16.0,
    ".rope.scaling.yarn_beta_slow": 4.0,
    ".rope.scaling.attn_factor": 1.2,
    ".rope.freq_base": 100.0,
}
WINDOW = {"name": "gemma3", ".attention.sliding_window": 4}
#: Every key of gemma3's metadata, with a window shorter than the text.
GEMMA3 = {
    "name": "gemma3",
    ".attention.sliding_window": 8,
    ".attention.sliding_window_pattern": 3,
    ".attn_logit_softcapping": 2.0,
    ".final_logit_softcapping": 3.0,
    ".rope.freq_base": 1e6,
    ".rope.freq_base_swa": 1000.0,
    **LINEAR,
}
ON_ALL_DEVICES = {"gemma3": GEMMA3, "qwen2": {"name": "qwen2", "biases": True}, "qwen3": {"name": "qwen3"}}
ON_THE_CPU = {
    "gemma3 without a window": {"name": "gemma3"},
    "gemma3, local layers only": WINDOW,
    "gemma3, the sixth layer is global": {**WINDOW, "n_layers": 7},
    "gemma3, a list of local layers": {**WINDOW, ".attention.sliding_window_pattern": [1, 0, 1]},
    "gemma3, a window of one": {**WINDOW, ".attention.sliding_window": 1, ".attention.sliding_window_pattern": 2},
    "gemma3, scale": {"name": "gemma3", ".attention.scale": 0.5},
    "qwen3, yarn, tied": {"name": "qwen3", "tied": True, **YARN},
    "qwen3, F16": {"name": "qwen3", "dtype": ggml.F16},
    "qwen2 without biases": {"name": "qwen2"},
    "llama, scale": {".attention.scale": 0.5},
    "llama 3": {"more": {"rope_freqs.weight": np.linspace(1.0, 8.0, 16)}},
    "llama, linear by default": {".rope.scaling.factor": 4.0},
    "llama, a factor for no scaling": {".rope.scaling.type": "none", ".rope.scaling.factor": 4.0},
}


# ---------------------------------------------------------------------- small models


def check_against_float64(path, devices, rng):
    """Compare the logits of a prompt in two batches, and the tokens that are generated after it."""
    reference = llama_float64.Reference(path)
    tokens = [int(t) for t in rng.integers(0, 50, 21)]
    want = reference.forward(tokens)
    greedy, margins = reference.greedy(tokens, 4)
    follows = golden.decided({"greedy": greedy, "margins": margins}, 0.02)
    with models.load(path, devices, n_batch=11, n_threads=1) as model:
        assert relative_error(model.forward(tokens), want) < 1e-2
        assert relative_error(model.forward(tokens, last=True), want[-1]) < 1e-2
        assert list(model.generate_tokens(tokens, len(follows), stop_at_end=False)) == follows
        used = {backend.name for _, backend in model.assignment()}
        assert set(devices) <= used


@pytest.mark.parametrize("variant", ON_ALL_DEVICES)
def test_random_models_against_float64(devices, tmp_path, rng, variant):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, **ON_ALL_DEVICES[variant])
    check_against_float64(path, devices, rng)


@pytest.mark.parametrize("variant", ON_THE_CPU)
def test_each_variant_of_metadata_and_tensors_against_float64(tmp_path, rng, variant):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, **ON_THE_CPU[variant])
    check_against_float64(path, ["CPU"], rng)


@pytest.mark.parametrize("which", TRANSFORMERS)
def test_logits_agree_with_transformers(tmp_path, which):
    """Compare with Hugging Face's implementation with the same weights; see ``make_transformers.py``."""
    path, want = make_transformers.build(which, tmp_path), np.array(TRANSFORMERS[which])
    np.testing.assert_allclose(llama_float64.Reference(path).forward(make_transformers.TOKENS), want, atol=5e-6)
    with models.load(path, ["CPU"], n_threads=1) as model:
        assert relative_error(model.forward(make_transformers.TOKENS), want) < 5e-3


@pytest.mark.parametrize(("change", "scale"), [({}, 1 / 4), ({".attention.scale": 0.5}, 0.5)])
def test_gemma3_27b_scales_its_scores_by_the_embedding_size(tmp_path, rng, change, scale):
    """Expect a scale by 64 / 4 elements, not by the head size of 32, unless the file has a scale."""
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, name="gemma3", n_layers=62, **change)
    with ggml.GGUFFile(path) as file:
        assert ARCHITECTURES["gemma3"](file).scale == scale


# ---------------------------------------------------------------------- the real gemma3


@pytest.fixture(scope="module")
def gemma3():
    return models.fetch("gemma3")


def test_gemma3_on_the_cpu_generates_the_tokens_of_llama_cpp(gemma3):
    with models.load(gemma3, ["CPU"], n_ctx=256, n_threads=2) as model:
        assert model.architecture.window == 512
        assert [i for i in range(18) if not model.architecture.is_local(i)] == [5, 11, 17]
        for case in GOLDEN:
            n = len(case["greedy"])
            got = list(model.generate_tokens(case["tokens"], n, stop_at_end=False))
            golden.assert_follows(got, case, golden.ROUNDED)
            logits = model.forward(case["tokens"] + case["greedy"][:-1])[-n:]
            golden.assert_decides(logits, case, golden.ROUNDED)
        exact = EXACT[0]["logits"]
        assert relative_error(model.forward(exact["tokens"])[:, exact["of"]], np.array(exact["values"])) < 0.1


@pytest.mark.nightly  # small random models of it are compared with float64 on two GPUs in every run
def test_gemma3_on_two_gpus_generates_the_tokens_of_exact_arithmetic(gemma3, two_gpus):
    with models.load(gemma3, two_gpus, n_ctx=256, n_batch=1) as model:
        for case in EXACT:
            want = golden.decided(case, golden.EXACT)[:8]
            assert list(model.generate_tokens(case["tokens"], len(want), stop_at_end=False)) == want
        used = {backend.name for _, backend in model.assignment()}
        assert set(two_gpus) <= used


# ---------------------------------------------------------------------- graphs


class Parts:
    """An architecture with its weights, caches and inputs as constants, for graphs."""

    def __init__(self, path, n=5, n_out=5):
        self.file = ggml.GGUFFile(path)
        self.architecture = ARCHITECTURES[self.file.metadata["general.architecture"]](self.file)
        self.context, self.n = ggml.Context(), n
        past = np.where(np.tri(n, dtype=bool), 0, -np.inf)
        self.inputs = Inputs(
            tokens=self.constant(np.arange(n), "i32"),
            positions=self.constant(np.arange(n), "i32"),
            kv_slots=self.constant(np.arange(n), "i64"),
            mask=self.constant(past, "f16"),
            output_ids=self.constant(np.arange(n - n_out, n), "i32"),
            window_mask=self.constant(past, "f16"),
        )

    def constant(self, values, dtype="f32"):
        return self.context.constant(values, dtype)

    def weights(self, cuts=None):
        """Return the weights; ``cuts`` selects rows and columns of some: name to ``(rows, columns)``."""
        cut = lambda name: (cuts or {}).get(name.removeprefix("blk.0."), ())  # noqa: E731
        found = {name: self.constant(self.file.array(name)[cut(name)]) for name in self.architecture.shapes}
        return {"output.weight": found["token_embd.weight"]} | found

    def cache(self, size=64):
        return LayerCache(*(self.constant(np.zeros((self.n, size)), "f16") for _ in range(2)))

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.context.close()
        self.file.close()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_shards_of_a_part_sum_to_the_whole_part(tmp_path, rng, name):
    """Compute a part of a layer with some of its heads or columns, as each of several devices does."""
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, **(ON_ALL_DEVICES | {"llama": {}})[name])
    h_values = rng.standard_normal((5, 64)).astype(np.float32)
    with Parts(path) as it, ggml.Scheduler(["CPU"]) as scheduler:
        part, h = it.architecture, it.constant(h_values)
        whole = it.weights()

        def half(i):
            q, kv, ff = (slice(i * n, i * n + n) for n in (64, 32, 48))
            columns = {"attn_output.weight": (slice(None), q), "ffn_down.weight": (slice(None), ff)}
            rows = {"attn_q": q, "attn_k": kv, "attn_v": kv, "ffn_gate": ff, "ffn_up": ff}
            return it.weights(columns | {f"{k}.{kind}": (rows[k],) for k in rows for kind in ("weight", "bias")})

        slices = [(whole, 64), (half(0), 32), (half(1), 32)]  # weights, and columns of the cache
        results = [part.attention(0, h, w, it.cache(size), it.inputs) for w, size in slices]
        results += [part.feed_forward(0, h, w) for w, _ in slices]
        with ggml.Graph(*results) as graph:
            scheduler.compute(graph)
            attention, a0, a1, feed_forward, f0, f1 = (t.numpy() for t in results)
    assert relative_error(a0 + a1, attention) < 1e-5
    assert relative_error(f0 + f1, feed_forward) < 1e-5
    reference, h64 = llama_float64.Reference(path), h_values.astype(np.float64)
    assert relative_error(attention, reference.attention(h64, 0)) < 1e-2
    assert relative_error(feed_forward, reference.feed_forward(h64, 0)) < 1e-2


#: Sequences of adjacent nodes that ggml's Vulkan backend fuses, with their number in three layers.
FUSED = {
    "llama": {"RMS_NORM MUL": 7, "ROPE VIEW SET_ROWS": 3, "MUL_MAT ADD": 6},
    "qwen2": {"RMS_NORM MUL": 7, "ROPE VIEW SET_ROWS": 3, "MUL_MAT ADD": 6 + 9},
    "qwen3": {"RMS_NORM MUL ROPE": 6, "RMS_NORM MUL ROPE VIEW SET_ROWS": 3, "MUL_MAT ADD": 6},
    "gemma3": {"RMS_NORM MUL ROPE": 6, "RMS_NORM MUL ROPE VIEW SET_ROWS": 3, "MUL ADD RMS_NORM": 6},
}


@pytest.mark.parametrize("name", FUSED)
def test_nodes_that_vulkan_fuses_are_adjacent(tmp_path, rng, name):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, **(ON_ALL_DEVICES | {"llama": {}})[name])
    for n_out in (1, 5):
        with Parts(path, n_out=n_out) as it:
            hidden = it.architecture.hidden(it.weights(), [it.cache() for _ in range(3)], it.inputs)
            assert hidden.shape == (n_out, 64)
            with ggml.Graph(hidden) as graph:
                nodes = " ".join(t.op.name for t in graph.nodes)
                gates = {t.ptr.op_params[0] for t in graph.nodes if t.op is Op.GLU}
        # The results of the exact form of GeGLU are too similar to tell the two apart.
        assert gates == {c.GGML_GLU_OP_GEGLU if name == "gemma3" else c.GGML_GLU_OP_SWIGLU}
        # Tokens without an output are dropped after the attention of the last layer.
        assert nodes.count("GET_ROWS") == (1 if n_out == 5 else 3)
        for run, count in FUSED[name].items():
            broken = n_out == 1 and run in (
                "MUL_MAT ADD",
                "MUL ADD RMS_NORM",
            )  # GET_ROWS, which drops tokens, lies between
            assert nodes.count(run) == count - broken, run


def test_a_layer_with_a_sliding_window_needs_its_mask(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, **GEMMA3)
    with Parts(path) as it:
        inputs, h = replace(it.inputs, window_mask=None), it.constant(np.ones((it.n, 64)))
        weights = it.weights()
        it.architecture.attention(2, h, weights, it.cache(), inputs)
        with pytest.raises(ValueError, match=r"layer 1 has a sliding window of 8 tokens: set inputs.window_mask"):
            it.architecture.attention(1, h, weights, it.cache(), inputs)


def test_scores_of_attention_as_products_are_summed_in_f32(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    with Parts(path) as it:
        cache = LayerCache(*(it.constant(np.zeros(shape), "f16") for shape in ((it.n, 64), (64, it.n))), True)
        out = it.architecture.attention(0, it.constant(np.ones((it.n, 64))), it.weights(), cache, it.inputs)
        with ggml.Graph(out) as graph:
            (weights,) = (p for p in graph.node_pointers() if p.op == Op.SOFT_MAX)
            scores = weights.src[0]
            assert (scores.op, scores.op_params[0]) == (Op.MUL_MAT, Prec.F32)


# ---------------------------------------------------------------------- invalid files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "mamba"}, "architecture 'mamba' is not supported; .*gemma3, llama, qwen2, qwen3.* are"),
        (
            {"more": {"blk.1.attn_output.bias": np.ones(64)}},
            "architecture llama does not use 1 tensors, such as 'blk.1",
        ),
        (
            {"name": "qwen2", "more": {"blk.0.attn_q_norm.weight": np.ones(32)}},
            "architecture qwen2 does not use 1 tensors",
        ),
        ({"name": "qwen3", "n_layers": 2, ".block_count": 3}, "no tensor 'blk.2"),
        ({".attention.scale": -1.0}, "attention.scale is -1.0, not a number of 0 or more"),
        ({".attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is nan, not a number of 0 or more"),
        ({".rope.freq_base": 0.0}, "impossible rotary parameters: .*freq_base=0.0"),
        ({".rope.dimension_count": 34}, "impossible rotary parameters: .*n_dims=34.* for heads of 32"),
        ({**YARN, ".rope.scaling.yarn_beta_slow": 0.0}, "impossible rotary parameters: .*beta_slow=0.0"),
        ({".rope.scaling.type": "longrope"}, "rope scaling 'longrope' is not supported; none, linear and yarn are"),
        ({".rope.scaling.factor": -2.0}, "rope.scaling.factor is -2.0"),
        ({**YARN, ".rope.scaling.original_context_length": 0}, "original_context_length is 0, not a positive number"),
        ({**WINDOW, ".attention.sliding_window": 2**31}, "the sliding window of 2147483648 tokens is impossible"),
        ({**WINDOW, ".attention.sliding_window_pattern": 0}, "sliding_window_pattern is 0, not a positive number"),
        ({**WINDOW, ".attention.sliding_window_pattern": [1, 0]}, "sliding_window_pattern has 2 flags for 3 layers"),
        ({**WINDOW, ".attention.sliding_window_pattern": "x"}, "sliding_window_pattern' is 'x', not a int"),
        ({"name": "gemma3", ".final_logit_softcapping": float("inf")}, "final_logit_softcapping is inf"),
        ({".attention.causal": False}, "llama.attention.causal is False: only True is supported"),
        ({".expert_count": 8}, "llama.expert_count is 8: only 0 is supported"),
        ({"name": "qwen3", ".nextn_predict_layers": 1}, "nextn_predict_layers is 1: only 0 is supported"),
        ({".embedding_length_out": 32}, "embedding_length_out is 32: only 64 is supported"),
        ({".attention.head_count_kv": [2, 1, 2]}, "head_count_kv' differs from layer to layer"),
        ({**WINDOW, ".attention.key_length_swa": 16}, "key_length_swa differs from that of other layers, 32"),
        ({**WINDOW, ".rope.dimension_count_swa": 16}, "dimension_count_swa differs from that of other layers, 32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_model_files_are_refused(tmp_path, rng, change, message):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, **change)
    with pytest.raises(ggml.FormatError, match=message):
        models.load(path, ["CPU"])


# ---------------------------------------------------------------------- keys and types that other writers choose

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def logits(path):
    with models.load(path, ["CPU"], n_ctx=64, n_threads=1) as model:
        return model.forward(TOKENS)


def test_the_old_key_of_linear_rope_scaling_is_read(tmp_path):
    def model(**changes):
        return logits(llama_float64.random_model(tmp_path / "m.gguf", np.random.default_rng(0), **changes))

    new = model(**{".rope.scaling.type": "linear", ".rope.scaling.factor": 4.0})
    np.testing.assert_array_equal(model(**{".rope.scale_linear": 4.0}), new)
    np.testing.assert_array_equal(model(**{".rope.scale_linear": 2.0, ".rope.scaling.factor": 4.0}), new)
    assert relative_error(model(), new) > 1e-3


def test_the_attention_factor_of_rope_applies_to_every_kind_of_scaling(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, **{".rope.scaling.attn_factor": 1.25})
    want = llama_float64.Reference(path).forward(TOKENS)
    assert relative_error(logits(path), want) < 2e-3


def test_a_number_for_each_layer_is_read_if_all_are_equal(tmp_path):
    def model(**changes):
        return logits(llama_float64.random_model(tmp_path / "m.gguf", np.random.default_rng(0), **changes))

    arrays = {".attention.head_count": [4] * 3, ".attention.head_count_kv": [2] * 3, ".feed_forward_length": [96] * 3}
    np.testing.assert_array_equal(model(**arrays), model())


def test_an_unknown_key_of_the_architecture_gives_a_warning(tmp_path, rng, caplog):
    keys = {".vocab_size": 50, ".rope.scaling.finetuned": False, ".future.scale": 2.0, "other.future": 1}
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, **keys)
    with caplog.at_level("WARNING", "ggml_cffi"):
        logits(path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: the key 'llama.future.scale' is not known, and has no effect"
    ]


@pytest.mark.parametrize("dtype", [ggml.F16, ggml.BF16])
def test_norms_and_biases_may_be_stored_in_half_precision(devices, tmp_path, rng, dtype):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, name="qwen2", biases=True)
    with ggml.GGUFFile(path) as file:
        stored = {name: dtype if len(info.shape) == 1 else info.dtype for name, info in file.tensors.items()}
        tensors = {name: (file.array(name), kind) for name, kind in stored.items()}
        ggml.write_gguf(tmp_path / "half.gguf", file.fields, tensors)
    want = llama_float64.Reference(tmp_path / "half.gguf").forward(TOKENS)
    with models.load(tmp_path / "half.gguf", devices, n_ctx=64, n_threads=1) as model:
        assert relative_error(model.forward(TOKENS), want) < 5e-3
