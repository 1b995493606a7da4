"""Sentence encoders: the vectors of `Model.embed`, and cosines compared with numpy in float64."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from tests.support.byte_level_model import byte_level_model

TEXTS = ["How old are you?", "What is your age?", "The rain in Spain.", "a", "Grüße", "b c", "1 2 3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with models.load(byte_level_model(tmp_path_factory.mktemp("m") / "m.gguf"), ["CPU"], n_ctx=64) as model:
        yield model


@pytest.fixture(autouse=True)
def no_objects_left_behind():
    """Disable the check for leaked objects: the tests share a model, which keeps its last graphs."""


def test_encode_has_the_vectors_of_embed(model):
    encoder = models.SentenceEncoder(model)
    want = model.embed(TEXTS, normalize=False)
    vectors = encoder.encode(TEXTS, batch_size=3)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), encoder.get_sentence_embedding_dimension()) == (7, 64)
    np.testing.assert_allclose(vectors, want, rtol=1e-4, atol=1e-5)
    one = encoder.encode(TEXTS[2])
    assert one.shape == (64,)
    np.testing.assert_allclose(one, want[2], rtol=1e-4, atol=1e-5)
    unit = encoder.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(unit, model.embed(TEXTS), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(unit.astype(np.float64), axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(encoder.encode(TEXTS[0], prompt="query: "), encoder.encode("query: " + TEXTS[0]))
    several = encoder.encode(TEXTS, convert_to_numpy=False)
    assert isinstance(several, list)
    np.testing.assert_allclose(several, want, rtol=1e-4, atol=1e-5)
    assert encoder.encode([]).shape == (0, 64)
    last = models.SentenceEncoder(model, pooling="last").encode(TEXTS)
    np.testing.assert_allclose(last, model.embed(TEXTS, pooling="last", normalize=False), rtol=1e-4, atol=1e-5)
    assert not np.allclose(last, vectors, atol=1e-3)


def test_the_bar_counts_batches(model, capsys):
    models.SentenceEncoder(model).encode(TEXTS, batch_size=3, show_progress_bar=True)
    assert "3/3" in capsys.readouterr().err


def test_similarity_is_the_cosine(rng):
    a, b = (rng.standard_normal((n, 5)) for n in (3, 4))
    a[1] = 0

    def cosine(x, y):
        lengths = np.linalg.norm(x) * np.linalg.norm(y)
        return x @ y / lengths if lengths else 0

    got = models.SentenceEncoder.similarity(a.astype(np.float32), b.astype(np.float32))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [[cosine(x, y) for y in b] for x in a], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(models.SentenceEncoder.similarity(a[0], b), got[:1], rtol=1e-6)
    pairs = models.SentenceEncoder.similarity_pairwise(a, b[:3])
    assert pairs.shape == (3,)
    np.testing.assert_allclose(pairs, got.diagonal(), rtol=1e-5, atol=1e-6)
    large = 1e25 * np.ones((1, 2), np.float32)  # the squares are no float32
    np.testing.assert_allclose(models.SentenceEncoder.similarity(large, large), [[1]], rtol=1e-6)


def test_wrong_calls_say_what_to_do(model, rng):
    encoder = models.SentenceEncoder(model)
    for error, message, call in (
        (TypeError, "sentences must be a text or several texts, not 5", lambda: encoder.encode(["a", 5])),
        (ValueError, "batch_size must be at least 1", lambda: encoder.encode(["a"], batch_size=0)),
        (ValueError, "mean, cls, last", lambda: models.SentenceEncoder(model, pooling="max").encode("a")),
        (ValueError, "give devices to models.load", lambda: models.SentenceEncoder(model, ["CPU"])),
        (ValueError, "one length, not 4 and 5", lambda: encoder.similarity(np.ones(4), np.ones(5))),
        (ValueError, "not 2 and 3", lambda: encoder.similarity_pairwise(np.ones((2, 4)), np.ones((3, 4)))),
        (ValueError, r"the shape \(n, n_embd\)", lambda: encoder.similarity(np.ones((2, 2, 2)), np.ones(2))),
    ):
        with pytest.raises(error, match=message):
            call()


def test_an_encoder_closes_the_model_that_it_opened(tmp_path, model):
    with models.SentenceEncoder(byte_level_model(tmp_path / "m.gguf"), ["CPU"]) as encoder:
        assert encoder.encode("a").shape == (64,)
        assert repr(encoder) == "<SentenceEncoder of <Model m.gguf>>"
    encoder.close()
    with pytest.raises(ggml.ClosedError):
        encoder.encode("a")
    with models.SentenceEncoder(model) as borrowed:
        pass
    assert borrowed.encode("a").shape == (64,)
