"""BERT and sentence embeddings: random encoders against float64, all-MiniLM against sentence-transformers."""

import io
import json
import threading
from contextlib import contextmanager

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import cli, models
from ggml_cffi.models.architectures.bert import Bert
from ggml_cffi.models.architectures.gemma3 import Gemma3
from ggml_cffi.models.architectures.llama import Llama
from ggml_cffi.models.placement.place import split_layers
from ggml_cffi.models.runners.embedding import Embedder, batches
from ggml_cffi.models.runners.weights import Weights, stages_of
from tests.support import DATA, bert_float64, llama_float64, relative_error

#: Lengths of texts for GPUs, 29 tokens in all: for more than 32, software devices compile other shaders for minutes.
FEW = (9, 1, 4, 15)
GOLDEN = json.loads((DATA / "minilm.json").read_text(encoding="utf-8"))


@contextmanager
def embedder(path, devices=("CPU",), n_ctx=40, n_batch=64, architecture=Bert):
    """Open an embedder with weights and a scheduler of its own."""
    with ggml.GGUFFile(path) as file, ggml.Scheduler(devices) as scheduler:
        scheduler.backends[-1].n_threads = 1
        model = architecture(file)
        stages = stages_of(split_layers(model, scheduler.backends, 0))
        weights = Weights(model, scheduler.backends, 256, ggml.F16, stages)
        try:
            with Embedder(model, weights, scheduler, n_ctx, n_batch) as found:
                yield found
        finally:
            weights.close()


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """Return a function from a type to the GGUF file of all-MiniLM-L6-v2 with such weights."""
    folder, made = models.fetch("minilm"), tmp_path_factory.mktemp("minilm")

    def file(dtype):
        path = made / f"{dtype}.gguf"
        if not path.exists():
            models.convert(folder, path, dtype)
        return path

    return file


def random_texts(rng, lengths):
    return [[int(t) for t in rng.integers(0, 50, n)] for n in lengths]


# ---------------------------------------------------------------------- small models


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


def test_many_texts_in_several_batches_keep_their_order(tmp_path, rng):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng)
    texts = random_texts(rng, rng.integers(1, 30, 50))
    with embedder(path) as model:
        model.reserve()
        got = model.embed(texts)
        assert len(model._runs) < 6
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
        assert len(model._runs) == 8
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
    """Compare the logits that follow from each text's embedding with the reference, for several texts in one batch."""
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


# ---------------------------------------------------------------------- through the model


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


def test_an_encoder_refuses_to_generate_text(tmp_path, rng):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng)
    with models.load(path, ["CPU"], n_threads=1) as model:
        for call in (lambda: model.forward([1]), lambda: next(model.generate_tokens([1], stop_at_end=False))):
            with pytest.raises(ggml.GgmlError, match="is an encoder: it has no logits and generates no text"):
                call()
        with pytest.raises(TypeError, match="put the one text in a list"):
            model.embed("a text")
        with pytest.raises(TypeError, match="token ids are integers"):
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


# ---------------------------------------------------------------------- what is refused


def test_wrong_texts_and_arguments_are_refused(tmp_path, rng):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng)
    with embedder(path) as model:
        assert model.embed([]).shape == (0, 64)
        assert model.embed([]).dtype == np.float32
        with pytest.raises(ValueError, match="text 1 has no tokens"):
            model.embed([[1], []])
        with pytest.raises(ValueError, match="pooling 'max' is not known; mean, cls, last are"):
            model.embed([[1]], pooling="max")
        with pytest.raises(ValueError, match="50"):
            model.embed([[50]])
        np.testing.assert_array_equal(model.embed([[1]]), model.embed(np.array([[1]])))
        with pytest.raises(ggml.GgmlError, match="an encoder has no logits"):
            model.architecture.logits(model.weights.tensors, model.weights.tensors["token_embd.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bert.block_count": 4}, "no tensor 'blk.3"),
        ({"bert.embedding_length": 32}, "shape"),
        ({"bert.context_length": 41}, r"'position_embd.weight' has shape \(40, 64\); \(41, 64\) is expected"),
        ({"bert.attention.head_count": 3}, "3 heads for 64 elements, or a norm's epsilon"),
        ({"bert.attention.layer_norm_epsilon": -1.0}, "epsilon of -1.0, are impossible"),
        ({"bert.attention.causal": True}, "causal attention is not supported"),
        ({"bert.pooling_type": 4}, r"pooling type 4 is not supported; \[0, 1, 2, 3\] are"),
        ({"sentence_transformers.max_seq_length": "x"}, "max_seq_length' is 'x', not a number of tokens"),
    ],
)
def test_invalid_encoder_files_are_refused(tmp_path, rng, change, message):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng, **change)
    with ggml.GGUFFile(path) as file, pytest.raises(ggml.FormatError, match=message):
        Bert(file)


# ---------------------------------------------------------------------- the real model


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


# ---------------------------------------------------------------------- the command


def test_the_command_prints_a_line_for_each_text(minilm, capsys, monkeypatch):
    arguments = ["embed", str(minilm("f16")), "--devices", "CPU", "--threads", "1"]
    texts = [case["text"] for case in GOLDEN["cases"][:3]]
    want = np.array([case["embedding"] for case in GOLDEN["cases"][:3]])
    assert cli.main([*arguments, "--text", *texts[:2], "-t", texts[2]]) == 0
    got = np.array([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert (got * want).sum(1).min() >= 0.9999
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{text}\r\n" for text in texts)))
    assert cli.main([*arguments, "--raw", "--pooling", "mean"]) == 0
    raw = np.array([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert ((raw * want).sum(1) / np.linalg.norm(raw, axis=1)).min() >= 0.9999
    assert np.linalg.norm(raw, axis=1).min() > 1.1


def test_the_command_writes_an_array(minilm, tmp_path, capsys):
    path = tmp_path / "vectors"
    assert cli.main(["embed", str(minilm("f16")), "-t", "Hello", "--devices", "CPU", "-o", str(path)]) == 0
    assert np.load(path) @ np.array(GOLDEN["cases"][0]["embedding"]) >= 0.9999
    assert capsys.readouterr().out == ""


def test_the_command_reports_an_error_in_one_line(tmp_path, rng, capsys):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng)
    for arguments, message in (
        (["-t", "x", "--devices", "CPU"], "tokenizer 'no_vocab'"),
        (["-t", "x", "--devices", "Vulkan99"], "no device 'Vulkan99'"),
    ):
        assert cli.main(["embed", str(path), *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
