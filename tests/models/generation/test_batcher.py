"""Texts that grow in one cache: cells, several at once, taking over, running out of room, threads."""

import gc
import threading
from contextlib import suppress

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.models.generation.batcher import common_length
from ggml_cffi.models.generation.detokenize import Pieces, stop_strings
from ggml_cffi.models.generation.kv_slots import Cells
from ggml_cffi.models.generation.sampling import Sampler
from tests.support import llama_float64, relative_error


@pytest.fixture
def path(tmp_path, rng):
    return llama_float64.random_model(tmp_path / "m.gguf", rng)


def prompts(rng, sizes):
    return [[int(t) for t in rng.integers(0, 50, n)] for n in sizes]


def alone(model, ids, n):
    """What a text becomes with the cache to itself."""
    model.clear_cache()
    return list(model.generate_tokens(ids, n, stop_at_end=False, reuse=False))


# ---------------------------------------------------------------------- cells


def test_cells():
    cells = Cells(8)
    assert cells.take(1, 0, 3).tolist() == [0, 1, 2]
    assert cells.take(2, 0, 2).tolist() == [3, 4]
    cells.drop(1, 1)
    assert (cells.n_free, cells.end) == (5, 5)
    assert cells.take(2, 2, 3).tolist() == [1, 2, 5]
    assert cells.rows(2).tolist() == [3, 4, 1, 2, 5]
    mask = cells.mask(np.array([1, 2], np.int32), np.array([0, 3], np.int32), 6)
    assert mask.dtype == np.float16
    assert np.isfinite(mask).tolist() == [[True] + 5 * [False], [False, True, True, True, True, False]]
    near = cells.mask(np.array([2], np.int32), np.array([3], np.int32), 6, window=2)
    assert np.isfinite(near).tolist() == [[False, True, True, False, False, False]]
    cells.drop(2)
    cells.drop(1)
    assert (cells.n_free, cells.end) == (8, 0)


def test_common_beginnings():
    assert common_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_length([1, 2], [1, 2, 3]) == 2
    assert common_length([], [1]) == 0
    assert common_length([5], [6]) == 0


# ---------------------------------------------------------------------- several texts at once


def test_texts_at_once_are_each_as_alone(devices, path, rng):
    """Sixteen at once, more of them waiting; each run holds parts of prompts and single tokens of others."""
    ids = prompts(rng, [3, 40, 12, 9, 30, 21, 14, 10, 2, 33, 17, 28, 5, 19, 8, 25, 11, 16])
    with models.load(path, devices, n_ctx=512, n_batch=128) as model:
        want = [alone(model, one, 10) for one in ids]
        got = [[] for _ in ids]
        for number, token in several(model, ids, 10, max_sequences=16):
            got[number].append(token)
        same = sum(a == b for a, b in zip(got, want, strict=True))
    # Products of one row and of many round differently: a token may differ where two were about equal.
    assert same >= len(ids) - 2
    assert all(len(one) == 10 for one in got)


def several(model, ids, n, max_sequences):
    from ggml_cffi.models.generation.batcher import Timings
    from ggml_cffi.models.generation.requests import Request, follow_many

    requests = [Request(one, Sampler(), n, frozenset()) for one in ids]
    for number, token in follow_many(model._generators[0], iter([*enumerate(requests)]), max_sequences, Timings()):
        if token is not None:
            yield number, token


def test_a_list_of_prompts(smollm2):
    with models.load(smollm2, ["CPU"], n_ctx=256, n_threads=2) as model:
        texts = ["The capital of France is", "One, two, three,", "def add(a, b):"]
        want = ["".join(model.generate(text, 8)) for text in texts]
        got = ["", "", ""]
        for number, piece in model.generate(texts, 8, max_sequences=2):
            got[number] += piece
        assert got == want
        assert list(model.generate([], 8)) == []
        assert model.timings.decoded_tokens == 0
        chats = [[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Bye"}]]
        assert {number for number, _ in model.generate(chats, 4)} == {0, 1}
        with pytest.raises(ValueError, match="max_sequences must be at least 1"):
            model.generate(texts, 8, max_sequences=0)
        # Each has a seed of its own, and the seeds repeat.
        again = [dict.fromkeys(range(3), "") for _ in range(2)]
        for found in again:
            for number, piece in model.generate(3 * ["Once upon"], 6, temperature=1.5, seed=3):
                found[number] += piece
        assert again[0] == again[1]
        assert len(set(again[0].values())) > 1


def test_two_iterators_in_turns(path):
    with models.load(path, ["CPU"]) as model:
        want = [alone(model, ids, 6) for ids in ([1, 2], [3, 4])]
        one, two = (model.generate_tokens(ids, 6, stop_at_end=False) for ids in ([1, 2], [3, 4]))
        pairs = list(zip(one, two, strict=True))
        assert [[a for a, _ in pairs], [b for _, b in pairs]] == want
        model.forward([3])


def test_threads_share_runs(path, rng):
    ids = prompts(rng, [5, 9, 14, 30])
    with models.load(path, ["CPU"], n_ctx=256, n_batch=16) as model:
        want = [alone(model, one, 20) for one in ids]
        wrong = []

        def work(one, expected):
            for _ in range(10):
                got = list(model.generate_tokens(one, 20, stop_at_end=False))
                if got != expected:
                    wrong.append(got)

        jobs = [threading.Thread(target=work, args=pair) for pair in zip(ids, want, strict=True)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        assert not model._generators[0]._growing
    assert len(wrong) <= 2  # where two tokens were about equal


# ---------------------------------------------------------------------- taking over what the cache has


def test_a_beginning_is_taken_from_the_cache(path, rng):
    (ids,) = prompts(rng, [60])
    with models.load(path, ["CPU"], n_ctx=256) as model:
        first = list(model.generate_tokens(ids, 8, stop_at_end=False))
        assert model.timings.reused_tokens == 0
        assert model.cached == [ids + first[:7]]
        again = list(model.generate_tokens(ids, 8, stop_at_end=False))
        assert again == first
        assert model.timings.reused_tokens == 59
        longer = list(model.generate_tokens(ids + first, 4, stop_at_end=False))
        assert model.timings.reused_tokens == 67
        assert longer == alone(model, ids + first, 4)
        list(model.generate_tokens(ids, 2, stop_at_end=False, reuse=False))
        assert model.timings.reused_tokens == 0
        assert len(model.cached) == 2
        model.clear_cache()
        assert model.cached == []
        assert model._generators[0].cells.n_free == 256


def test_what_is_kept_goes_when_room_is_needed(path, rng):
    with models.load(path, ["CPU"], n_ctx=256) as model:
        for ids in prompts(rng, [100, 101, 102]):
            list(model.generate_tokens(ids, 2, stop_at_end=False))
        assert [len(ids) for ids in model.cached] == [102, 103]
        model.forward([1] * 200)
        assert model.cached == []


def test_texts_that_do_not_fit_together_wait(path, rng):
    """Two long texts in a cache that holds one and a half: the later one is computed anew where it must."""
    ids = prompts(rng, [150, 150])
    with models.load(path, ["CPU"], n_ctx=256) as model:
        want = [alone(model, one, 40) for one in ids]
        got = [[], []]
        for number, token in several(model, ids, 40, max_sequences=2):
            got[number].append(token)
        assert got == want
        one, two = (model.generate_tokens(text, 40, stop_at_end=False) for text in ids)
        assert [next(one), next(two), next(one), next(two)] == [want[0][0], want[1][0], want[0][1], want[1][1]]
        two.close()
        assert list(one) == want[0][2:]
        results = [None, None]

        def work(i):
            results[i] = list(model.generate_tokens(ids[i], 40, stop_at_end=False))

        jobs = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        assert results == want


def test_left_iterations_free_what_they_held(path):
    with models.load(path, ["CPU"]) as model:
        for leave in ("close", "forget"):
            text = model.generate_tokens([1, 2], stop_at_end=False)
            next(text)
            if leave == "close":
                text.close()
            del text
            gc.collect()
            assert not model._generators[0]._growing
        never_begun = model.generate_tokens([1, 2], stop_at_end=False)
        del never_begun
        model.clear_cache()
        assert model._generators[0].cells.n_free == len(model._generators[0].cells)


def test_a_failed_run_leaves_the_cache_whole(path, monkeypatch):
    with models.load(path, ["CPU"]) as model:
        want = alone(model, [1, 2, 3], 6)
        text = model.generate_tokens([1, 2, 3], 6, stop_at_end=False, reuse=False)
        got = [next(text), next(text)]
        run = model._runners[0].run

        def fail(batch):
            raise ggml.AbortedError("the run was stopped")

        monkeypatch.setattr(model._runners[0], "run", fail)
        other = model.generate_tokens([4], 1, stop_at_end=False)
        with pytest.raises(ggml.AbortedError):
            next(other)
        monkeypatch.setattr(model._runners[0], "run", run)
        assert got + list(text) == want


def test_closed_while_texts_grow(path):
    with models.load(path, ["CPU"]) as model:
        text = model.generate_tokens([1], stop_at_end=False)
        next(text)
    with pytest.raises(ggml.ClosedError, match="closed"):
        next(text)
    with pytest.raises(ggml.ClosedError):
        next(model.generate_tokens([1], stop_at_end=False))


# ---------------------------------------------------------------------- to a file and back


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_cache_to_a_file_and_back(devices, path, rng, tmp_path, kind):
    one, two = prompts(rng, [40, 25])
    file = tmp_path / "cache.gguf"
    with models.load(path, devices, n_ctx=256, kv_dtype=kind) as model:
        first = list(model.generate_tokens(one, 3, stop_at_end=False))
        list(model.generate_tokens(two, 3, stop_at_end=False))
        kept = model.cached
        assert model.save_cache(file) == 42 + 27
    with models.load(path, devices, n_ctx=256, kv_dtype=kind) as model:
        want = model.forward(one + first, last=True)
        model.forward([7] * 50)
        assert model.load_cache(file) == 42 + 27
        assert model.cached == kept
        got = list(model.generate_tokens(one + first, 1, stop_at_end=False))
        assert model.timings.reused_tokens == 42
        assert got == [want.argmax()]
        assert model._generators[0].cells.n_free == 256 - 43 - 27


def test_caches_of_others(path, rng, tmp_path):
    file, other = tmp_path / "cache.gguf", tmp_path / "other.gguf"
    with models.load(path, ["CPU"], n_ctx=256) as model:
        list(model.generate_tokens([1, 2, 3], 1, stop_at_end=False))
        model.save_cache(file)
        with pytest.raises(ggml.FormatError, match=r"not this model's cache: ggml_cffi.kv_cache.version is None"):
            model.load_cache(path)
        whole = file.read_bytes()
        for _ in range(100):
            data = bytearray(whole)
            data[rng.integers(0, len(data))] = rng.integers(0, 256)
            other.write_bytes(data)
            with suppress(ggml.FormatError, ValueError):
                model.load_cache(other)
            model.clear_cache()
        assert model._generators[0].cells.n_free == 256
    with (
        models.load(path, ["CPU"], kv_dtype="f32") as model,
        pytest.raises(ggml.FormatError, match="key_type is 'F16', not 'F32'"),
    ):
        model.load_cache(file)


# ---------------------------------------------------------------------- caches of other types, perplexity


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-2), ("bf16", 3e-2), ("q8_0", 3e-2)])
def test_types_of_the_cache(path, rng, kind, tolerance):
    (ids,) = prompts(rng, [40])
    want = llama_float64.Reference(path).forward(ids)
    with models.load(path, ["CPU"], kv_dtype=kind, n_batch=16) as model:
        assert relative_error(model.forward(ids), want) < tolerance
        assert model._runners[0].caches[0][0].k.dtype is ggml.dtypes.as_type(kind)


def test_impossible_types_of_the_cache(path):
    with pytest.raises(ValueError, match="kv_dtype"):
        models.load(path, ["CPU"], kv_dtype="i32")
    with pytest.raises(ValueError, match="blocks of 256"):
        models.load(path, ["CPU"], kv_dtype="q4_k")


def test_perplexity(path, rng):
    (ids,) = prompts(rng, [100])
    reference = llama_float64.Reference(path)
    losses = []
    for start in (0, 32, 64):
        window = ids[start : start + 32]
        logits = reference.forward(window)[16:31]
        logits -= logits.max(1, keepdims=True)
        losses += [np.log(np.exp(row).sum()) - row[t] for row, t in zip(logits, window[17:], strict=True)]
    with models.load(path, ["CPU"]) as model:
        found = model.perplexity(ids, n_ctx=32)
        assert abs(found.value / np.exp(np.mean(losses)) - 1) < 1e-3
        assert found.n_tokens == len(losses) == 45
        assert 0 < found.error < found.value
        assert "±" in str(found)
        with pytest.raises(ValueError, match="do not fill a window of 512"):
            model.perplexity(ids)
        with pytest.raises(ValueError, match="n_ctx must be at least 2"):
            model.perplexity(ids, n_ctx=1)


# ---------------------------------------------------------------------- parts


def test_min_p_and_repetitions():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    assert {Sampler(1.0, 0, 1.0, seed, min_p=0.5)(logits) for seed in range(200)} == {0, 1}
    assert {Sampler(5.0, 0, 1.0, seed, min_p=0.2)(logits) for seed in range(300)} == {0, 1, 2}  # before temperature
    assert Sampler(repeat_penalty=3.0)(np.array([2.0, 1.9, -1.0], np.float32), [0]) == 1
    assert Sampler(repeat_penalty=3.0, repeat_last_n=1)(np.array([2.0, 1.9], np.float32), [0, 1]) == 0
    assert Sampler(repeat_penalty=3.0, repeat_last_n=-1)(np.array([-1.0, -2.0], np.float32), [0, 9, 9][:1]) == 1
    assert Sampler(repeat_penalty=3.0, repeat_last_n=0)(np.array([2.0, 1.9], np.float32), [0]) == 0
    assert Sampler(1.0)(np.full(4, np.nan, np.float32)) in range(4)
    for wrong in ({"min_p": 2}, {"repeat_penalty": 0}, {"repeat_last_n": -2}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Sampler(**wrong)


class Letters:
    """A tokenizer of letters."""

    def stream(self):
        return self

    def push(self, token):
        return chr(token)

    def finish(self):
        return ""


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("hello world", "wor", "hello "),
        ("hello world", ("xyz", "lo w"), "hel"),
        ("aab", "ab", "a"),
        ("ababac", "abac", "ab"),
        ("abab", "abac", "abab"),
        ("stop", "stop", ""),
        ("hello", None, "hello"),
    ],
)
def test_stop_strings(text, stop, want):
    pieces = Pieces(Letters(), stop_strings(stop))
    got = []
    for letter in text:
        got.append(pieces.push(ord(letter)))
        if pieces.stopped:
            break
    assert "".join(got) + pieces.finish() == want


def test_stop_strings_that_are_none():
    with pytest.raises(TypeError, match="stop is a string"):
        stop_strings([1])
    with pytest.raises(ValueError, match="cannot be empty"):
        stop_strings("")


def test_stopping_a_model(smollm2):
    with models.load(smollm2, ["CPU"], n_ctx=256, n_threads=2) as model:
        whole = "".join(model.generate("The capital of France is", 12))
        assert "\n" in whole
        assert "".join(model.generate("The capital of France is", 12, stop="\n")) == whole.split("\n")[0]
        found = list(model.generate(["The capital of France is"], 12, stop=["\n"]))
        assert "".join(piece for _, piece in found) == whole.split("\n")[0]
        assert not model._generators[0]._growing
