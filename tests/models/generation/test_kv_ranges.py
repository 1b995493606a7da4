"""KV slots of sequences that are neighbours, and the ranges to which a batch attends."""

import numpy as np
import pytest

from ggml_cffi import models
from ggml_cffi.models import Sampler, Timings
from ggml_cffi.models.generation import Request, generate_many
from ggml_cffi.models.generation.kv_ranges import NeighborSlots
from ggml_cffi.models.generation.kv_slots import KVRanges
from tests.support import llama_float64, need, relative_error
from tests.support.generation import batcher_of, generate_alone, random_prompts


def test_sequences_begin_lanes_of_a_context_and_then_parts_of_lanes():
    slots = NeighborSlots(1024, 500)  # two lanes of 512
    assert slots.allocate(1, 0, 3).tolist() == [0, 1, 2]
    assert slots.allocate(2, 0, 2).tolist() == [512, 513]
    assert slots.allocate(3, 0, 1).tolist() == [256]
    assert slots.allocate_one(1, 3) == 3
    assert slots.allocate_one(3, 1) == 257
    assert slots.slots_of(1).tolist() == [0, 1, 2, 3]
    slots.release(2)
    assert slots.allocate(4, 0, 2).tolist() == [512, 513]


def test_a_sequence_goes_on_after_its_last_kept_token():
    slots = NeighborSlots(256, 256)
    slots.allocate(1, 0, 5)
    slots.release(1, 3)
    assert slots.allocate(1, 3, 2).tolist() == [3, 4]
    slots.release(1)
    assert (slots.n_free, slots.end) == (256, 0)


def test_tokens_get_any_free_slots_if_the_next_ones_are_taken():
    slots = NeighborSlots(64, 64)
    slots.begin(1, 0)
    slots.allocate(1, 0, 30)
    slots.begin(2, 32)
    slots.allocate(2, 0, 30)
    assert slots.allocate(1, 30, 4).tolist() == [30, 31, 62, 63]
    assert slots.n_free == 0
    assert slots.range_of([1]) == KVRanges(0, 64)
    slots.release(2)
    assert slots.allocate_one(1, 34) == 32  # after slot 63 there is none
    assert slots.slots_of(1).tolist() == [*range(32), 62, 63, 32]


def test_a_new_sequence_prefers_slots_without_an_eviction():
    slots = NeighborSlots(256, 256)
    slots.allocate(1, 0, 100)
    assert slots.find_start(100, [1]) == (128, True)
    assert slots.find_start(200, [1]) == (0, False)
    lanes = NeighborSlots(512, 128)
    for sequence in range(4):
        lanes.allocate(sequence, 0, 20)
    assert lanes.find_start(100, [0, 1]) == (0, False)  # rather than the half of a lane in use


def test_each_sequence_has_a_range_at_equal_distances():
    slots = NeighborSlots(4 * 128, 128)
    for sequence, n in ((1, 3), (2, 40), (3, 5)):
        slots.allocate(sequence, 0, n)
    assert slots.ranges_of([1], 99) == KVRanges(0, 32)
    assert slots.ranges_of([3, 1, 2], 99) == KVRanges(0, 64, 128, (2, 0, 1))
    assert slots.ranges_of([3, 1], 99) == KVRanges(0, 32, 256, (1, 0))
    slots.release(2)
    slots.allocate(4, 0, 1)
    slots.allocate(5, 0, 100)
    assert slots.ranges_of([3, 5], 99) == KVRanges(256, 128, 128, (0, 1))
    found = slots.ranges_of([1, 5], 99)
    assert (found.n, found.places) == (2, (0, 1))


def test_one_range_serves_all_sequences_where_that_is_less():
    slots = NeighborSlots(128, 128)
    for sequence, start in ((1, 0), (2, 10), (3, 20), (4, 30)):
        slots.begin(sequence, start)
        slots.allocate(sequence, 0, 8)
    assert slots.ranges_of([1, 2, 3, 4], 99) == KVRanges(0, 64)


@pytest.mark.parametrize("seed", range(20))
def test_ranges_have_all_slots_of_their_sequences(seed):
    rng = np.random.default_rng(seed)
    slots = NeighborSlots(int(rng.integers(1, 8)) * 256, int(rng.integers(40, 300)))
    lengths = {}
    for sequence in range(200):
        for other in [s for s in lengths if rng.random() < 0.2]:
            slots.release(other)
            del lengths[other]
        n = int(rng.integers(1, 60))
        if n + len(lengths) + 1 > slots.n_free or len(lengths) > 15:
            continue
        slots.allocate(sequence, 0, n)
        lengths[sequence] = n
        for other in lengths:
            slots.allocate_one(other, lengths[other])
            lengths[other] += 1
        ids = [*lengths]
        found = slots.ranges_of(ids, 99)
        assert len(set(found.places)) == len(found.places)
        assert found.start + max(found.n - 1, 0) * found.stride + found.n_kv <= len(slots)
        for sequence_id, place in zip(ids, found.places or [0] * len(ids), strict=True):
            start = found.start + place * found.stride
            of = slots.slots_of(sequence_id)
            assert len(of) == lengths[sequence_id]
            assert start <= of.min()
            assert of.max() < start + found.n_kv
            assert np.isfinite(slots.last_token_mask(sequence_id, found.n_kv, start)).sum() == len(of)


# ---------------------------------------------------------------------- models


class Recorder(Sampler):
    """A greedy sampler that keeps the logits with the tokens before them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __call__(self, logits, previous=()):
        self.seen.append((list(previous), logits.copy()))
        return super().__call__(logits, previous)


GEMMA = {"name": "gemma3", ".attention.sliding_window": 8, ".attention.sliding_window_pattern": 3}


@pytest.mark.parametrize(
    ("variant", "kv_dtype", "tolerance"),
    [({}, "f16", 1e-2), ({"n_kv": 4}, "f32", 1e-2), ({}, "q8_0", 5e-2), (GEMMA, "f16", 1e-2)],
    ids=["f16", "f32, a KV head for each head", "q8_0", "gemma3"],
)
def test_logits_of_sequences_that_come_and_go_are_those_of_each_alone(
    devices, tmp_path, rng, variant, kv_dtype, tolerance
):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, **variant)
    prompts = random_prompts(rng, [3, 45, 9, 1, 28, 17, 50, 6])
    answers = [12, 3, 8, 14, 5, 10, 4, 9]
    recorders = [Recorder() for _ in prompts]
    requests = [Request(*given, frozenset()) for given in zip(prompts, recorders, answers, strict=True)]
    with models.load(path, devices, n_ctx=64, kv_slots=4 * 64, kv_dtype=kv_dtype, n_batch=32) as model:
        for _ in generate_many(batcher_of(model), enumerate(requests), 4, Timings()):
            pass
    reference = llama_float64.Reference(path)
    for prompt, n, recorder in zip(prompts, answers, recorders, strict=True):
        assert len(recorder.seen) == n
        ids, _ = recorder.seen[-1]
        want = reference.forward(ids)[len(prompt) - 1 :]
        assert relative_error(np.stack([logits for _, logits in recorder.seen]), want) < tolerance


def test_prompts_of_one_token_that_begin_together_get_slots_apart(path, rng):
    with models.load(path, ["CPU"], n_ctx=128, kv_slots=4 * 128) as model:
        batcher = batcher_of(model)
        requests = [Request(ids, Sampler(), 5, frozenset()) for ids in random_prompts(rng, [1, 1, 1])]
        for _ in generate_many(batcher, enumerate(requests), 3, Timings()):
            pass
        slots = batcher.cache.slots
        assert [slots.slots_of(kept).tolist() for kept in batcher.cache.kept] == [
            [*range(start, start + 5)] for start in (0, 128, 256)
        ]


def test_a_gpu_computes_large_batches_of_layers_on_the_cpu(tmp_path, rng):
    """From 32 tokens on, ggml copies views of the CPU's cache to the GPU: ranges of KV slots would end the process."""
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    prompts = random_prompts(rng, [9] * 33)
    recorders = [Recorder() for _ in prompts]
    requests = [Request(ids, recorder, 3, frozenset()) for ids, recorder in zip(prompts, recorders, strict=True)]
    with models.load(path, [*need(("Vulkan0",)), "CPU"], n_ctx=64, kv_slots=40 * 64, balance=[0, 1]) as model:
        for _ in generate_many(batcher_of(model), enumerate(requests), len(prompts), Timings()):
            pass
    reference = llama_float64.Reference(path)
    for recorder in recorders:
        ids, _ = recorder.seen[-1]
        want = reference.forward(ids)[8:]
        assert relative_error(np.stack([logits for _, logits in recorder.seen]), want) < 1e-2


def test_the_cpu_attends_to_the_slots_of_each_sequence_only(path, rng, monkeypatch):
    batches = []
    with models.load(path, ["CPU"], n_ctx=128, kv_slots=4 * 128) as model:
        runner = batcher_of(model).runner
        run = runner.run
        monkeypatch.setattr(runner, "run", lambda batch, *more: batches.append(batch) or run(batch))
        requests = [Request(ids, Sampler(), 4, frozenset()) for ids in random_prompts(rng, [20, 40, 30])]
        for _ in generate_many(batcher_of(model), enumerate(requests), 3, Timings()):
            pass
    prompts, tokens = [b for b in batches if b.query_ids is None], [b for b in batches if b.query_ids is not None]
    assert [(len(b.tokens), b.kv_start, b.mask.shape[1]) for b in prompts] == [
        (20, 0, 32),
        (30, 128, 32),
        (40, 256, 64),
    ]
    assert {(b.kv_start, b.kv_stride, b.mask.shape) for b in tokens} == {(0, 128, (3, 64))}


def test_sequences_that_come_and_go_build_no_graph_after_a_warm_up(path, rng):
    """The warm-up has each number of sequences, and each number of tokens of a prompt."""
    with models.load(path, ["CPU"], n_ctx=128, kv_slots=4 * 128) as model:
        batcher = batcher_of(model)

        def generate(sizes, n):
            model.clear_cache()
            requests = [Request(ids, Sampler(), n, frozenset()) for ids in random_prompts(rng, sizes)]
            for _ in generate_many(batcher, enumerate(requests), 4, Timings()):
                pass

        for size in [*range(1, 32), *range(32, 64, 2), *range(64, 129, 4)]:
            generate([size], 2)
        for holes in range(3):
            for n in range(2, 5):
                generate([9] * holes + [20] * n, 5 + holes)
        generate([9, 30, 11, 70, 5, 16, 27, 8, 90, 10], 12)
        built = batcher.runner.n_built
        for sizes in ([31, 7, 66, 18, 101, 3], [12, 90, 55, 14, 20], [40, 41, 42, 43, 44, 45, 46]):
            generate(sizes, 16)
        assert batcher.runner.n_built == built


def test_a_kept_sequence_gives_way_to_the_tokens_of_its_neighbor(path, rng):
    """The second prompt begins in the middle of the cache, and the first one needs these slots later."""
    first, second = random_prompts(rng, [100, 20])
    with models.load(path, ["CPU"], n_ctx=256) as model:
        want = generate_alone(model, first, 60)
        model.clear_cache()
        tokens = model.generate_tokens(first, 60, stop_at_end=False)
        got = [next(tokens)]
        list(model.generate_tokens(second, 2, stop_at_end=False))
        assert model.cached[0][:20] == second
        got += tokens
        assert got == want
        assert [ids[:100] for ids in model.cached] == [first]
        slots = batcher_of(model).cache.slots
        assert np.flatnonzero(slots.sequence >= 0).tolist() == [*range(159)]


def test_after_a_failed_prompt_the_tokens_of_other_sequences_are_computed_again(path, rng, monkeypatch):
    """The step computes the next token of the first sequence, and then fails at the prompt of the second one."""
    prompts = random_prompts(rng, [10, 20])
    with models.load(path, ["CPU"], n_ctx=128, kv_slots=4 * 128) as model:
        want = [generate_alone(model, ids, 5) for ids in prompts]
        model.clear_cache()
        batcher = batcher_of(model)
        one, two = (batcher.add(ids, Sampler()) for ids in prompts)
        got = [batcher.next(one)]
        run = batcher.runner.run

        def fail(batch, *more):
            if len(batch.tokens) > 1:
                raise ValueError("no")
            return run(batch)

        monkeypatch.setattr(batcher.runner, "run", fail)
        one.ask()
        two.ask()
        with pytest.raises(ValueError, match="no"):
            batcher.step(one)
        monkeypatch.undo()
        assert len(batcher.cache.slots.slots_of(one.cache_id)) == one.n_cached == 10
        got += [batcher.next(one) for _ in range(4)]
        assert [got, [batcher.next(two) for _ in range(5)]] == want
        batcher.finish(one)
        batcher.finish(two)
