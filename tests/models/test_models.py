"""Models: the real one against llama.cpp and float64, small random ones against float64, and what is refused."""

import json
import threading

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.models.generation.chat import render
from ggml_cffi.models.generation.sampling import Sampler
from ggml_cffi.models.runners.weights import layer_of
from tests.support import DATA, llama_float64, relative_error

GOLDEN = json.loads((DATA / "smollm2.json").read_text())["cases"]
EXACT = json.loads((DATA / "smollm2_float64.json").read_text())["cases"]
CLOSE = 0.1  # two logits nearer than this may change places with another kernel


def decided(case):
    """The greedy tokens before the first one that was a close call."""
    margins = case["margins"]
    return case["greedy"][: next((i for i, m in enumerate(margins) if m < CLOSE), len(margins))]


# ---------------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def on_cpu(smollm2):
    with models.load(smollm2, ["CPU"], n_ctx=1024, n_threads=2) as model:
        model.forward([1])  # from now on it holds one graph
        yield model


@pytest.fixture(scope="module")
def on_two_gpus(smollm2):
    from tests.support import need

    with models.load(smollm2, need(("Vulkan0", "Vulkan1")), n_ctx=512) as model:
        model.forward([1])
        yield model


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Tests share the models above, which keep their last graphs: what is left is counted elsewhere."""


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["prompt"][:10])
def test_token_ids_are_llama_cpps(on_cpu, case):
    assert on_cpu.tokenize(case["prompt"]) == case["tokens"]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["prompt"][:10])
def test_the_cpu_continues_as_llama_cpp_does(on_cpu, case):
    want = decided(case)
    got = list(on_cpu.generate_tokens(case["tokens"], len(want), stop_at_end=False))
    assert got == want
    if len(want) == len(case["greedy"]):
        assert "".join(on_cpu.generate(case["prompt"], len(want))) == case["text"]


@pytest.mark.parametrize(("case", "golden"), list(zip(EXACT, GOLDEN, strict=True)), ids=["capital", "fibonacci"])
def test_two_gpus_continue_as_exact_arithmetic_does(on_two_gpus, case, golden):
    """The GPUs' kernels keep activations in floating point; llama.cpp's CPU kernels, which the golden file is from,
    round them to 8 bits. Exact arithmetic decides between the two where they differ.
    """
    want = decided(case)
    got = list(on_two_gpus.generate_tokens(case["tokens"], len(want), stop_at_end=False))
    assert got == want
    agreed = next((i for i, (a, b) in enumerate(zip(want, decided(golden), strict=False)) if a != b), len(want))
    assert got[:agreed] == golden["greedy"][:agreed]


def test_logits_of_every_token(on_cpu, on_two_gpus, smollm2):
    tokens = GOLDEN[0]["tokens"] + GOLDEN[0]["greedy"][:3]
    want = llama_float64.Reference(smollm2).forward(tokens)
    # The CPU's 8-bit activations cost some percent with this model's large activations.
    for model, tolerance in ((on_cpu, 0.1), (on_two_gpus, 5e-3)):
        got = model.forward(tokens)
        assert got.shape == want.shape
        assert got.dtype == np.float32
        assert relative_error(got, want) < tolerance
        assert relative_error(model.forward(tokens, last=True), got[-1]) < tolerance


def test_both_gpus_computed_layers(on_two_gpus):
    """By the scheduler's own word."""
    model = on_two_gpus
    list(model.generate_tokens([1, 2, 3], 1, stop_at_end=False))
    computed = {t.name: backend.name for t, backend in model.assignment()}
    n = model.architecture.n_layers
    planned = {f"layer {i}": model.layer_backend(i).name for i in range(n)}
    assert {name: computed[name] for name in planned} == planned
    assert set(planned.values()) == {"Vulkan0", "Vulkan1"}
    first, second, cpu = model.placement
    assert first.layers == list(range(len(first.layers)))
    assert second.layers == list(range(len(first.layers), n))
    assert abs(len(first.layers) - len(second.layers)) <= n // 2
    assert second.has_output
    assert computed["logits"] == "Vulkan1"
    assert first.has_embeddings
    assert not cpu.layers
    assert not cpu.weight_bytes
    assert all(share.cache_bytes > 0 and share.compute_bytes > 0 for share in (first, second))


def test_two_gpus_answer_as_one(smollm2, on_two_gpus):
    tokens = GOLDEN[1]["tokens"]
    with models.load(smollm2, ["Vulkan0"], n_ctx=512) as one:
        assert relative_error(one.forward(tokens), on_two_gpus.forward(tokens)) < 1e-3
        assert {backend.name for _, backend in one.assignment()} == {"Vulkan0"}


def test_a_chat(on_cpu):
    messages = [{"role": "user", "content": "Hi!"}]
    text = on_cpu.apply_chat_template(messages)
    assert text.endswith("<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n")
    ids = on_cpu.tokenize(text)
    assert ids[0] == on_cpu.tokenizer.bos
    pieces = list(on_cpu.generate(messages, 8))
    assert pieces
    assert "<|im_end|>" not in "".join(pieces)
    assert on_cpu.timings.prompt_tokens == len(ids)
    assert on_cpu.timings.decoded_tokens <= 8
    assert on_cpu.timings.prompt_rate > 0


def test_text_and_back(on_cpu):
    for text in ("", "Hello world", "  spaces\n\n\ttabs", "größe 🙂 漢字 עברית", "12345 67", "a\x00b", "don't"):
        assert on_cpu.detokenize(on_cpu.tokenize(text)) == text
    assert on_cpu.tokenize("<|im_end|>") == [2]
    assert len(on_cpu.tokenize("<|im_end|>", special=False)) > 1
    assert on_cpu.detokenize(on_cpu.tokenize("<|im_end|>", special=False)) == "<|im_end|>"
    assert on_cpu.detokenize([2]) == ""
    with pytest.raises(ValueError, match="token id 50000 is not in the vocabulary of 49152"):
        on_cpu.detokenize([50000])
    with pytest.raises(TypeError, match="text must be a str"):
        on_cpu.tokenize(b"x")
    assert on_cpu.detokenize(on_cpu.tokenize("lone \ud800 surrogate")).startswith("lone ")


def test_pieces_are_whole_characters(on_cpu):
    ids = on_cpu.tokenize("🙂漢🦄")
    assert len(ids) > 3
    stream = on_cpu.tokenizer.stream()
    pieces = [stream.push(i) for i in ids] + [stream.finish()]
    assert "".join(pieces) == "🙂漢🦄"
    assert not any("\ufffd" in piece for piece in pieces)


def test_seeds_repeat(on_cpu):
    def text(seed):
        return "".join(on_cpu.generate("Once upon a time", 12, temperature=1.0, seed=seed))

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


def test_a_long_prompt_in_batches(smollm2, on_cpu):
    tokens = (on_cpu.tokenize("The quick brown fox jumps over the lazy dog. ") * 40)[:300]
    with models.load(smollm2, ["CPU"], n_ctx=320, n_batch=64) as model:
        assert relative_error(model.forward(tokens, last=True), on_cpu.forward(tokens, last=True)) < 0.1
        made = list(model.generate_tokens(tokens, stop_at_end=False))
        assert len(made) == 320 - 300 + 1  # the last token needs no place in the context


def test_the_cpu_reads_a_prompt_in_parts(on_cpu, monkeypatch):
    """What is read first need not look at cache rows of what comes after."""
    runner = on_cpu._runners[0]
    assert runner.batch_ranges(0, 512) == [(0, 256), (256, 512)]
    tokens = (on_cpu.tokenize("The quick brown fox jumps over the lazy dog. ") * 40)[:300]
    looked_at = []
    run = runner.run
    monkeypatch.setattr(runner, "run", lambda batch: looked_at.append(batch.mask.shape) or run(batch))
    in_parts = on_cpu.forward(tokens)
    assert looked_at == [(150, 256), (150, 512)]
    monkeypatch.setattr(runner, "best_prefill_batch", None)
    assert relative_error(in_parts, on_cpu.forward(tokens)) < 0.1
    assert looked_at[2:] == [(300, 512)]


@pytest.mark.parametrize(("name", "want"), [("smollm2", 14.371341), ("gemma3", 18.211288)])
def test_perplexity_is_llama_cpps(name, want):
    """``want`` is by llama-cpp-python 0.3.36 on the CPU: windows of 256 tokens of tests/data/prose.txt."""
    text = (DATA / "prose.txt").read_text(encoding="utf-8")
    with models.load(models.fetch(name), ["CPU"], n_ctx=256, n_threads=2) as model:
        found = model.perplexity(text, n_ctx=256)
    assert found.n_tokens == 635
    assert abs(found.value / want - 1) < 0.01


# ---------------------------------------------------------------------- small models


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"tied": True},
        {"biases": True},
        {"dtype": ggml.F16},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.dimension_count": 16},
    ],
    ids=lambda v: "+".join(v) or "plain",
)
def test_random_models_against_float64(devices, tmp_path, rng, variant):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, **variant)
    tokens = [int(t) for t in rng.integers(0, 50, 21)]
    want = llama_float64.Reference(path).forward(tokens)
    with models.load(path, devices) as model:
        assert relative_error(model.forward(tokens), want) < 1e-2
        assert model.n_ctx == 512
        made = list(model.generate_tokens(tokens[:5], 3, stop_at_end=False))
        assert made[0] == model.forward(tokens[:5])[-1].argmax()
        used = {backend.name for _, backend in model.assignment()}
        assert set(devices) <= used


def test_layers_go_to_the_cpu_where_gpus_are_full(two_gpus, tmp_path, rng, monkeypatch):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    tokens = list(range(12))
    with models.load(path, ["CPU"]) as model:
        want = model.forward(tokens)
    real, room = ggml.Device.memory, 600_000  # one layer of weights and cache, the output, and what a run takes
    monkeypatch.setattr(ggml.Device, "memory", lambda self: real(self) if self.is_cpu else ggml.Memory(room, room))
    with models.load(path, two_gpus, n_batch=16) as model:
        assert [model.layer_backend(i).name for i in range(3)] == ["CPU", "Vulkan0", "Vulkan1"]
        assert relative_error(model.forward(tokens), want) < 1e-2
    monkeypatch.setattr(ggml.Device, "memory", lambda self: real(self) if self.is_cpu else ggml.Memory(0, 0))
    with models.load(path, two_gpus) as model:
        assert {model.layer_backend(i).name for i in range(3)} == {"CPU"}


def test_what_a_gpu_cannot_read_stays_with_the_cpu(two_gpus, tmp_path, rng, monkeypatch):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    for name in ("_can_look_up", "_can_multiply"):
        monkeypatch.setattr(f"ggml_cffi.models.weights.{name}", lambda backend, _: backend.device.is_cpu)
    with models.load(path, two_gpus) as model:
        model.forward([1, 2, 3] * 4)
        computed = {t.name: backend.name for t, backend in model.assignment()}
        assert computed["logits"] == "CPU"
        assert computed["layer 2"] == "Vulkan1"
        assert model.placement[-1].has_output
        assert model.placement[-1].has_embeddings
        assert not any(share.has_output or share.has_embeddings for share in model.placement[:2])


def test_closed_models(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    with models.load(path, ["CPU"]) as model:
        running = model.generate_tokens([1], stop_at_end=False)
        next(running)
        assert "m.gguf" in repr(model)
    model.close()
    with pytest.raises(ggml.GgmlError):
        next(running)
    with pytest.raises(ggml.ClosedError, match="model is closed"):
        model.forward([1])
    assert "closed" in repr(model)


def test_a_stopped_iteration_leaves_the_model_usable(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    with models.load(path, ["CPU"]) as model:
        first = model.generate_tokens([1, 2], stop_at_end=False)
        tokens = [next(first), next(first)]
        first.close()
        again = model.generate_tokens([1, 2], stop_at_end=False)
        assert [next(again), next(again)] == tokens
        model.forward([3])
        next(again)


def test_two_models_in_two_threads(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    with models.load(path, ["CPU"]) as one, models.load(path, ["CPU"]) as two:
        want = one.forward(range(20))
        results = []

        def work(model):
            results.extend(model.forward(range(20)) for _ in range(10))

        jobs = [threading.Thread(target=work, args=(m,)) for m in (one, two)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
    assert len(results) == 20
    assert all(relative_error(r, want) < 1e-5 for r in results)


def test_progress_is_told(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    seen = []
    models.load(path, ["CPU"], progress=lambda done, total: seen.append((done, total))).close()
    assert seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported; .*llama.* are"),
        ({"general.architecture": 7}, "architecture 7 is not supported"),
        ({"llama.block_count": 4}, "no tensor 'blk.3"),
        ({"llama.block_count": 0}, "block_count is 0, not a positive number"),
        ({"llama.block_count": "x"}, "'llama.block_count' is 'x', not a int"),
        ({"llama.embedding_length": 32}, "shape"),
        ({"llama.attention.head_count_kv": 3}, "4 query heads are not a multiple of 3 KV heads"),
        ({"llama.rope.dimension_count": 7}, "impossible rotary"),
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope' is not supported"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "epsilon is -1.0, not a number of 0 or more"),
    ],
)
def test_files_that_are_no_model(tmp_path, rng, change, message):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, **change)
    with pytest.raises(ggml.FormatError, match=message):
        models.load(path, ["CPU"])


def test_wrong_arguments(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    for arguments, message in (
        ({"devices": ["Vulkan99"]}, "there is no device 'Vulkan99'"),
        ({"devices": ["CPU", "CPU"]}, "the CPU comes last"),
        ({"split": "sideways"}, "split 'sideways' is not known"),
        ({"n_ctx": 513}, "n_ctx must be 1 to 512"),
        ({"n_ctx": 0}, "n_ctx must be 1 to 512"),
        ({"n_batch": 0}, "n_batch must be at least 1"),
        ({"devices": ["CPU"], "n_threads": 0}, "n_threads must be 1 to 512"),
    ):
        with pytest.raises(ValueError, match=message):
            models.load(path, **arguments)
    with pytest.raises(TypeError, match="put the one device in a list"):
        models.load(path, "CPU")
    with pytest.raises(FileNotFoundError):
        models.load(tmp_path / "none.gguf")
    with models.load(path, ["CPU"], n_ctx=8) as model:
        for tokens, error, text in (
            ([], ValueError, "no tokens"),
            (range(9), ValueError, "9 tokens do not fit the context of 8"),
            ([50], ValueError, "token id 50 is not in the vocabulary of 50"),
            ([-1], ValueError, "token id -1"),
            (["a"], TypeError, "token ids are integers"),
            (7, TypeError, "token ids are integers"),
        ):
            with pytest.raises(error, match=text):
                model.forward(tokens)
            with pytest.raises(error, match=text):
                model.generate_tokens(tokens, stop_at_end=False)
        with pytest.raises(ggml.FormatError, match="tokenizer 'no_vocab' is not supported"):
            model.tokenize("x")
        with pytest.raises(ggml.FormatError, match="no chat template"):
            model.generate([{"role": "user", "content": "x"}])
        for wrong in ({"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"temperature": float("nan")}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                model.generate_tokens([1], 1, **wrong)
        with pytest.raises(ValueError, match="max_tokens"):
            model.generate_tokens([1], -1)


def test_too_large_a_context_for_memory_is_an_error(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, **{"llama.context_length": 2**31 - 512})
    with pytest.raises(ggml.OutOfMemoryError):
        models.load(path, ["CPU"], n_ctx=2**31 - 512, n_batch=2**20)


def test_cut_models_are_refused(smollm2, tmp_path):
    cut = tmp_path / "cut.gguf"
    with open(smollm2, "rb") as f:
        start = f.read(3_000_000)
    for n in (0, 3, 100, 100_000, 1_700_000, 3_000_000):
        cut.write_bytes(start[:n])
        with pytest.raises(ggml.FormatError):
            models.load(cut, ["CPU"])


def test_mutated_models_are_refused_or_work(tmp_path, rng):
    whole = llama_float64.random_model(tmp_path / "m.gguf", rng).read_bytes()
    path = tmp_path / "changed.gguf"
    worked = 0
    for _ in range(150):
        data = bytearray(whole)
        data[rng.integers(0, 3000)] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            with models.load(path, ["CPU"], n_ctx=8) as model:
                model.forward([1, 2, 3])
                worked += 1
        except (ggml.GgmlError, ValueError):
            pass
    assert worked


# ---------------------------------------------------------------------- parts


def test_sampler(rng):
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    assert Sampler()(logits) == 0
    many = [Sampler(1.0, 0, 1.0, seed)(logits) for seed in range(2000)]
    np.testing.assert_allclose(np.bincount(many, minlength=4) / 2000, [0.5, 0.3, 0.15, 0.05], atol=0.04)
    assert {Sampler(1.0, 2, 1.0, seed)(logits) for seed in range(200)} == {0, 1}
    assert {Sampler(1.0, 0, 0.75, seed)(logits) for seed in range(200)} == {0, 1}
    assert {Sampler(1.0, 0, 1e-9, seed)(logits) for seed in range(50)} == {0}
    assert {Sampler(0.01, 0, 1.0, seed)(logits) for seed in range(50)} == {0}


def test_chat_templates():
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ eos_token }}"
    assert render(template, [{"role": "user", "content": "hi"}], bos="<s>", eos="</s>") == "<s>[user]hi</s>"
    with pytest.raises(ValueError, match="a message is a dict with 'role' and 'content'"):
        render(template, [{"role": "user"}])
    for wrong in ("{% if %}", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}"):
        with pytest.raises(ggml.FormatError, match="chat template failed"):
            render(wrong, [])


def test_layer_numbers():
    assert layer_of("blk.12.attn_q.weight") == 12
    assert layer_of("token_embd.weight") is None
    assert layer_of("blk.x.weight") is None
