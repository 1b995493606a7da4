"""Embedding of texts: order, batches, truncation, threads, and embeddings of decoders."""

import threading

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.core.handle import live
from ggml_cffi.models.architectures.gemma3 import Gemma3
from ggml_cffi.models.architectures.llama import Llama
from ggml_cffi.models.runners.embedding import batches
from tests.support import bert_float64, llama_float64, relative_error
from tests.support.embedding import FEW, embedder, random_texts


def test_many_texts_in_several_batches_keep_their_order(tmp_path, rng):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng)
    texts = random_texts(rng, rng.integers(1, 30, 50))
    with embedder(path) as model:
        model.reserve()
        before = live()["Graph"]
        got = model.embed(texts)
        assert live()["Graph"] - before < 6
        want = np.concatenate([model.embed([text]) for text in texts])
    assert relative_error(got, want) < 1e-5


def test_a_text_may_be_longer_than_a_batch(tmp_path, rng):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng)
    texts = random_texts(rng, (33, 3, 40))
    with embedder(path, n_batch=8) as model:
        assert relative_error(model.embed(texts), bert_float64.Reference(path).embed(texts, "mean")) < 1e-5


@pytest.mark.parametrize(("n_ctx", "changes"), [(16, {}), (40, {"sentence_transformers.max_seq_length": 16})])
def test_long_texts_are_truncated_before_their_end_token(tmp_path, rng, n_ctx, changes):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng, **changes)
    (long,) = random_texts(rng, (40,))
    with embedder(path, n_ctx=n_ctx) as model:
        assert model.max_tokens == 16
        np.testing.assert_array_equal(model.embed([long]), model.embed([[*long[:15], long[-1]]]))
        assert relative_error(model.embed([long]), model.embed([long[:16]])) > 1e-3


def test_graphs_are_reused_and_others_may_use_the_scheduler_in_between(tmp_path, rng):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng)
    texts = random_texts(rng, (5, 7))
    with embedder(path, n_batch=400) as model, ggml.Context() as ctx:
        before = live()["Graph"]
        want = model.embed(texts)
        graph = model.scheduler.graph
        np.testing.assert_array_equal(model.embed(texts[::-1])[::-1], want)
        assert model.scheduler.graph is graph
        other = ctx.new_tensor("f32", (3,))
        with ggml.Graph(ggml.relu(other)) as foreign:
            model.scheduler.alloc(foreign)
            model.scheduler.compute(foreign)
            np.testing.assert_array_equal(model.embed(texts), want)
            assert model.scheduler.graph is graph
        for n in range(1, 130, 7):  # more sizes than are kept
            model.embed(random_texts(rng, [3] * n))
        assert live()["Graph"] - before == 8
        np.testing.assert_array_equal(model.embed(texts), want)
        model.close()
        assert model.scheduler.graph is None
        with pytest.raises(ggml.ClosedError, match="model is closed"):
            model.embed(texts)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [(Llama, {}), (Gemma3, {".attention.sliding_window": 4, ".attention.sliding_window_pattern": 2})],
    ids=["llama", "gemma3 with a window"],
)
def test_decoders_embed_texts_too(tmp_path, rng, architecture, changes):
    """Compare the logits of each text's embedding with the reference, for several texts in one batch."""
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, name=architecture.name, **changes)
    texts = random_texts(rng, (9, 1, 21, 30))
    reference = llama_float64.Reference(path)
    want = np.array([reference.forward(tokens)[-1] for tokens in texts])
    with embedder(path, n_ctx=64, n_batch=64, architecture=architecture) as model:
        vectors = model.embed(texts, pooling="last", normalize=False)
        assert relative_error(vectors @ reference.w["output.weight"].T, want) < 1e-3
        assert model.embed(texts).shape == (4, 64)
        cut = model.embed([texts[0] * 8], pooling="last")
        np.testing.assert_array_equal(cut, model.embed([(texts[0] * 8)[:64]], pooling="last"))


def test_embedding_and_generation_of_one_model_do_not_disturb_each_other(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    texts = random_texts(rng, (9, 30))
    with models.load(path, ["CPU"], n_ctx=64, n_threads=1) as model:
        want, answer = model.embed(texts), list(model.generate_tokens([1, 2, 3], 8, stop_at_end=False))
        made = []
        for token in model.generate_tokens([1, 2, 3], 8, stop_at_end=False):
            made.append(token)
            np.testing.assert_array_equal(model.embed(texts), want)
        assert made == answer
        assert relative_error(model.embed([texts[0] * 5], pooling="last"), want[:1]) > 1e-3  # a larger cache is made
        assert list(model.generate_tokens([1, 2, 3], 8, stop_at_end=False)) == answer


def test_two_threads_may_use_one_model(tmp_path, rng):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng)
    texts = [random_texts(rng, lengths) for lengths in ((3, 5), (30, 2, 20))]
    wrong = []
    with models.load(path, ["CPU"], n_threads=1) as model:
        want = [model.embed(some) for some in texts]

        def work(i):
            for _ in range(10):
                if not np.array_equal(model.embed(texts[i]), want[i]):
                    wrong.append(i)

        jobs = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
    assert not wrong


def test_batches_are_filled_up_to_their_token_limit():
    assert [*batches([], 8)] == []
    texts = [[0] * n for n in (3, 5, 1, 9, 8, 2)]
    assert [[len(t) for t in run] for run in batches(texts, 8)] == [[3, 5], [1], [9], [8], [2]]


def test_a_loaded_encoder_embeds_texts(devices, tmp_path, rng):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng)
    texts = random_texts(rng, FEW)
    with models.load(path, devices, n_threads=1) as model:
        got = model.embed(texts)
        assert relative_error(got, bert_float64.Reference(path).embed(texts, "mean")) < 5e-3
        assert model.embed(iter(texts), pooling="cls").shape == (4, 64)
        assert not np.allclose(np.linalg.norm(model.embed(texts, normalize=False), axis=1), 1, atol=0.1)
        assert [layer for share in model.placement for layer in share.layers] == [0, 1, 2]
        assert not any(share.cache_bytes or share.has_output for share in model.placement)
        assert model.placement[0].compute_bytes > 0


def test_wrong_texts_and_arguments_are_refused(tmp_path, rng):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng)
    with embedder(path) as model:
        assert model.embed([]).shape == (0, 64)
        assert model.embed([]).dtype == np.float32
        with pytest.raises(ValueError, match="text 1 has no tokens"):
            model.embed([[1], []])
        with pytest.raises(ValueError, match="pooling 'max' does not exist: use one of mean, cls, last"):
            model.embed([[1]], pooling="max")
        with pytest.raises(ValueError, match="50"):
            model.embed([[50]])
        np.testing.assert_array_equal(model.embed([[1]]), model.embed(np.array([[1]])))
        with pytest.raises(ggml.GgmlError, match="'bert' is an encoder"):
            model.architecture.logits(model.weights.tensors, model.weights.tensors["token_embd.weight"])
