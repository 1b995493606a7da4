"""BERT: random encoders against float64, all-MiniLM against sentence-transformers."""

import json

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.models.architectures.bert import Bert
from tests.support import DATA, bert_float64, relative_error
from tests.support.embedding import FEW, embedder, minilm_file, random_texts

GOLDEN = json.loads((DATA / "minilm.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """Return a function from a type to the GGUF file of all-MiniLM-L6-v2 with such weights."""
    source, folder = models.fetch("minilm"), tmp_path_factory.mktemp("minilm")
    return lambda dtype: minilm_file(folder, source, dtype)


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"dtype": ggml.F16},
        {"n_embd": 96, "n_heads": 3, "n_ff": 160, "n_layers": 2, "n_types": 1},
        {"bert.pooling_type": 2},
        {"bert.pooling_type": 3, "n_layers": 1},
    ],
    ids=lambda v: "+".join(f"{k}={getattr(x, 'name', x)}" for k, x in v.items()) or "plain",
)
def test_random_models_against_float64(devices, tmp_path, rng, variant):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng, **variant)
    texts = random_texts(rng, FEW)
    pooling = {1: "mean", 2: "cls", 3: "last"}[variant.get("bert.pooling_type", 1)]
    want = bert_float64.Reference(path).embed(texts, pooling)
    with embedder(path, devices) as model:
        got = model.embed(texts)
        assert got.dtype == np.float32
        assert got.shape == want.shape
        assert (got * want).sum(1).min() > 0.9999
        assert relative_error(got, want) < 5e-3
        alone = np.concatenate([model.embed([text]) for text in texts])
        assert relative_error(alone, got) < 2e-3
        used = {backend.name for _, backend in model.scheduler.assignment()}
        assert len(used & set(devices)) == min(len(devices), model.architecture.n_layers)


def test_embeddings_on_the_cpu_are_exact(tmp_path, rng):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng)
    texts = random_texts(rng, (9, 1, 21, 33))
    reference = bert_float64.Reference(path)
    with embedder(path) as model:
        for pooling in ("mean", "cls", "last"):
            want = reference.embed(texts, pooling)
            assert relative_error(model.embed(texts, pooling=pooling), want) < 1e-5
            plain = model.embed(texts, pooling=pooling, normalize=False)
            lengths = np.linalg.norm(plain, axis=1)
            assert not np.allclose(lengths, 1, atol=0.1)
            assert relative_error(plain / lengths[:, None], want) < 1e-5


def test_an_encoder_refuses_to_generate_text(tmp_path, rng):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng)
    with models.load(path, ["CPU"], n_threads=1) as model:
        message = r"m.gguf: 'bert' is an encoder, .* use Model.embed \(ggml-cffi embed\)"
        for call in (
            lambda: model.forward([1]),
            lambda: model.generate_tokens([1], stop_at_end=False),
            lambda: model.generate("a text"),
            lambda: model.generate([{"role": "user", "content": "a text"}]),
            lambda: model.perplexity([1] * 64, n_ctx=8),
            lambda: model.scheduler and model.batchers[0].logits([1], 1),
        ):
            with pytest.raises(ggml.GgmlError, match=message):
                call()
        with pytest.raises(TypeError, match="put the one text in a list"):
            model.embed("a text")
        with pytest.raises(TypeError, match="token ids must be integers"):
            model.embed([["a"]])
        with pytest.raises(ValueError, match="token id 50 is not in the vocabulary of 50"):
            model.embed([[50]])
        with pytest.raises(ggml.FormatError, match="tokenizer 'no_vocab'"):
            model.embed(["a text"])
        model.embed([[1]])
    with pytest.raises(ggml.ClosedError, match="model is closed"):
        model.embed([[1]])
    with pytest.raises(ValueError, match="n_ctx must be 1 to 40"):
        models.load(path, ["CPU"], n_ctx=41)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bert.block_count": 4}, "no tensor 'blk.3"),
        ({"bert.embedding_length": 32}, "shape"),
        ({"bert.context_length": 41}, r"'position_embd.weight' has shape \(40, 64\); \(41, 64\) is expected"),
        ({"bert.attention.head_count": 3}, "3 heads for 64 elements, or a norm's epsilon"),
        ({"bert.attention.layer_norm_epsilon": -1.0}, "epsilon of -1.0, are impossible"),
        ({"bert.attention.causal": True}, "attention.causal is True: only False is supported"),
        ({"bert.pooling_type": 4}, r"pooling type 4 is not supported; \[0, 1, 2, 3\] are"),
        ({"sentence_transformers.max_seq_length": "x"}, "max_seq_length' is 'x', not a number of tokens"),
    ],
)
def test_invalid_encoder_files_are_refused(tmp_path, rng, change, message):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng, **change)
    with ggml.GGUFFile(path) as file, pytest.raises(ggml.FormatError, match=message):
        Bert(file)


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_all_minilm_agrees_with_sentence_transformers(devices, minilm, dtype):
    cases = GOLDEN["cases"] if devices == ("CPU",) else GOLDEN["cases"][:3]
    tokens, want = [case["tokens"] for case in cases], np.array([case["embedding"] for case in cases])
    with embedder(minilm(dtype), devices, n_ctx=512, n_batch=512) as model:
        assert model.max_tokens == GOLDEN["max_seq_length"] == 256
        assert model.architecture.pooling == "mean"
        got = model.embed(tokens)
        assert (got * want).sum(1).min() >= 0.9999


def test_all_minilm_from_texts(minilm):
    cases = GOLDEN["cases"]
    texts = [case["text"] for case in cases]
    with models.load(minilm("f16"), ["CPU"], n_threads=1) as model:
        assert [model.tokenize(text) for text in texts] == [case["tokens"] for case in cases]
        got = model.embed(texts)
        assert (got * [case["embedding"] for case in cases]).sum(1).min() >= 0.9999
        np.testing.assert_array_equal(model.embed([case["tokens"] for case in cases]), got)
        assert model.embed([""]).shape == (1, 384)  # it has a beginning and an end
