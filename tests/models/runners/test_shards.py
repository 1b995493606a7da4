"""Stages of several devices, which share every layer: against float64, and combined with pipeline stages."""

import time
from contextlib import ExitStack, closing, contextmanager
from threading import Event, get_ident

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi.core.buffer import BufferType
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.architectures.gemma3 import Gemma3
from ggml_cffi.models.architectures.llama import Llama
from ggml_cffi.models.architectures.qwen3 import Qwen3
from ggml_cffi.models.runners import Batch, PipelineRunner, StageSpec, even_stages, link, pipeline
from ggml_cffi.parallel.program import ParallelProgram
from tests.support import llama_float64, need, relative_error, run_python
from tests.support.llama_float64 import HEAD, Reference, random_model

N_PROMPT, WINDOW = 12, 5
GEMMA = {"name": "gemma3", ".attention.sliding_window": WINDOW, ".attention.sliding_window_pattern": 2}


@contextmanager
def opened(path, devices, kind=Llama, **options):
    """Yield a runner with backends of its own."""
    with ExitStack() as stack:
        file = stack.enter_context(ggml.GGUFFile(path))
        threads = {"n_threads": 1} if devices[0] == "CPU" else {}
        backends = [stack.enter_context(ggml.Backend(device, **threads)) for device in devices]
        model = stack.enter_context(PipelineRunner(kind(file), backends, 256, **options))
        yield model
    assert model.closed


def shared(devices):
    """Return one stage of all devices, for the model of 3 layers."""
    return [StageSpec(range(3), tuple(range(len(devices))))]


def batch(ids, at, n_out=1):
    """Return a batch of tokens at positions from ``at`` on."""
    n = len(ids)
    positions = np.arange(at, at + n)
    back = positions[:, None] - np.arange(256)
    mask, window_mask = (
        np.where((back >= 0) & (back < window), np.float16(0), np.float16(-np.inf)) for window in (256, WINDOW)
    )
    outputs = np.arange(n - n_out, n, dtype=np.int32)
    return Batch(np.asarray(ids, np.int32), positions.astype(np.int32), positions, mask, outputs, window_mask)


def run(model, ids, at, n_out=1):
    return model.run(batch(ids, at, n_out)).copy()


def check(path, devices, rng, kind=Llama, most=1e-2, stages=None, **options):
    """Compare a prompt, then tokens one by one, with float64. Return the open runner's steps and KV heads."""
    reference = Reference(path)
    ids = rng.integers(0, 50, N_PROMPT + 2)
    want = reference.forward(ids)
    with opened(path, devices, kind, stages=stages or shared(devices), **options) as model:
        got = [run(model, ids[:N_PROMPT], 0, N_PROMPT), run(model, ids[:N_PROMPT], 0)]
        np.testing.assert_allclose(got.pop(), got[0][-1:], atol=max(1e-3, most / 10) * np.abs(got[0]).max())
        got += [run(model, ids[i : i + 1], i) for i in range(N_PROMPT, len(ids))]
        assert relative_error(np.concatenate(got), want) < most
        steps = []
        for stage, spec in zip(model.stages, model.weights.stages, strict=True):
            steps.append(len(stage.programs[0].step_graphs[0].graphs))
            # Only the first device has the last step of a stage that is not the last.
            computed = [4 * (steps[-1] - (rank > 0 and spec.layers.stop < 3)) for rank in range(len(spec.devices))]
            assert stage.group.executor.steps_computed == computed
        for device, own in zip(devices, model.weights.by_device, strict=True):
            assert {t.buffer_type.device.name for t in own.values()} == {device}
        first = model.weights.stages[0].devices
        heads = [model.weights.by_device[i]["blk.0.attn_k.weight"].shape[0] // HEAD for i in first]
    return steps if len(steps) > 1 else steps[0], heads


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Allow several ranks on the CPU."""
    monkeypatch.setattr(pipeline, "check_devices", lambda devices: None)


@pytest.fixture(params=[False, True], ids=["apart", "linked"])
def stages_on_the_cpu(request, on_the_cpu, monkeypatch):
    """Allow several stages on the CPU, apart and as if they were peers."""
    if request.param:
        monkeypatch.setattr(link, "are_peers", lambda devices: True)
    monkeypatch.setattr(pipeline, "Scheduler", lambda backends: None)  # it takes the CPU only once


@pytest.mark.parametrize(
    ("n", "kind", "changes", "heads"),
    [
        (1, Llama, {}, [2]),
        (2, Llama, {}, [1, 1]),
        (2, Llama, {"biases": True, "tied": True}, [1, 1]),
        (2, Llama, {"dtype": ggml.Q8_0}, [1, 1]),
        (2, Llama, {"n_heads": 6, "n_kv": 3}, [1, 2]),
        (3, Llama, {}, [2, 2, 2]),  # fewer KV heads than devices: each device has all heads
        (2, Qwen3, {"name": "qwen3"}, [1, 1]),
        (2, Gemma3, GEMMA, [1, 1]),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_ranks_agree_with_float64(on_the_cpu, tmp_path, rng, n, kind, changes, heads):
    path = tmp_path / "model.gguf"
    random_model(path, rng, **changes)
    # ggml's CPU backend rounds the operand of a product with Q8_0 to 8 bits.
    steps, found = check(path, ["CPU"] * n, rng, kind, most=3e-2 if "dtype" in changes else 2e-3)
    assert found == heads
    assert steps == (1 if n == 1 else 4 if n == 3 else 7)


def test_gpus_agree_with_float64(two_gpus, tmp_path, rng):
    path = tmp_path / "model.gguf"
    random_model(path, rng)
    assert check(path, two_gpus, rng) == (7, [1, 1])


def products(path, devices, kind, **options):
    """Return the number of products with weights, and for each device the names of its attention weights of layer 1."""
    with opened(path, devices, kind, **options) as model:
        run(model, [1, 2, 3], 0)
        nodes = [t for t, _ in model.assignment() if t.op is ggml.Op.MUL_MAT]
        n = sum(t.ptr.src[0].op == ggml.Op.NONE for t in nodes)
        found = [
            {name.split(".")[2] for name in own if name.startswith("blk.1.attn_")} for own in model.weights.by_device
        ]
    return n, found


@pytest.mark.parametrize(
    ("kind", "changes", "v_type", "joined", "n"),
    [
        (Llama, {}, None, "attn_q+attn_k+attn_v", 15),
        (Llama, {"dtype": ggml.F16}, None, "attn_q+attn_k+attn_v", 15),
        (Llama, {"dtype": ggml.Q8_0, "biases": True}, ggml.F16, "attn_q+attn_k", 18),
        (Qwen3, {"name": "qwen3"}, None, "attn_q+attn_k+attn_v", 15),
    ],
    ids=["F32", "F16", "types", "qwen3"],
)
@pytest.mark.parametrize("gpus", [False, True], ids=["CPU", "GPU"])
def test_weights_of_one_type_for_the_same_tokens_are_one_product(
    request, on_the_cpu, tmp_path, rng, gpus, kind, changes, v_type, joined, n
):
    devices = list(request.getfixturevalue("two_gpus")) if gpus else ["CPU", "CPU"]
    path = tmp_path / "model.gguf"
    v = {f"blk.{i}.attn_v.weight": (v_type, rng.standard_normal((64, 64)) / 8) for i in range(3)} if v_type else {}
    random_model(path, rng, more=v, **changes)
    check(path, devices, rng, kind, most=3e-2 if "dtype" in changes else 1e-2)
    for own in ([devices[0]], devices) if gpus else (devices,):
        found, names = products(path, own, kind, stages=shared(own))
        assert found == (n + 1 - (0 if gpus else 3)) * len(own)  # the CPU joins the gate as well
        assert all(joined in each for each in names)


def test_results_at_places_that_gpus_cannot_read_are_products_of_their_own(monkeypatch, two_gpus, tmp_path, rng):
    monkeypatch.setattr(llama_float64, "HEAD", 8)
    path = tmp_path / "model.gguf"
    random_model(path, rng)
    reference, ids = Reference(path), rng.integers(0, 50, N_PROMPT)
    for alignment, joined in (
        (32, True),
        (64, True),
        (128, False),
        (256, False),
    ):  # keys begin at byte 128, values at 192
        monkeypatch.setattr(BufferType, "alignment", alignment)
        with opened(path, two_gpus[:1], stages=shared(two_gpus[:1])) as model:
            assert ("blk.0.attn_q+attn_k+attn_v.weight" in model.weights.by_device[0]) == joined
            assert relative_error(run(model, ids, 0, N_PROMPT), reference.forward(ids)) < 1e-2


@pytest.mark.parametrize("changes", [{}, {"more": {"rope_freqs.weight": np.linspace(1.0, 8.0, 16)}}], ids=["", "rope"])
def test_two_stages_of_two_ranks_agree_with_float64(on_the_cpu, tmp_path, rng, changes):
    path = tmp_path / "model.gguf"
    random_model(path, rng, **changes)
    stages = even_stages(3, [(0, 1), (2, 3)])
    assert check(path, ["CPU"] * 4, rng, most=2e-3, stages=stages) == ([3, 5], [1, 1])


def test_batches_in_flight_through_two_stages_of_two_ranks(on_the_cpu, tmp_path, rng):
    path = tmp_path / "model.gguf"
    random_model(path, rng)
    ids = rng.integers(0, 50, 4 * N_PROMPT)
    want = Reference(path).forward(ids)
    stages = even_stages(3, [(0, 1), (2, 3)])
    with opened(path, ["CPU"] * 4, stages=stages) as model:
        assert model.n_in_flight == 2
        batches = [batch(ids[i : i + N_PROMPT], i, N_PROMPT) for i in range(0, len(ids), N_PROMPT)]
        got = [logits.copy() for logits in model.run_all(batches)]
        assert relative_error(np.concatenate(got), want) < 2e-3


@pytest.mark.parametrize("stages", [[(0,), (1,), (2,)], [(0,), (1, 2)]], ids=["linked", "shards"])
@pytest.mark.parametrize("n_batch", [16, 7])
def test_peers_hand_results_over_in_their_own_memory(on_the_cpu, monkeypatch, tmp_path, rng, stages, n_batch):
    monkeypatch.setattr(link, "are_peers", lambda devices: True)
    monkeypatch.setattr(pipeline, "Scheduler", lambda backends: None)  # it takes the CPU only once
    path = tmp_path / "model.gguf"
    random_model(path, rng)
    ids = rng.integers(0, 50, 9 * n_batch)
    want = Reference(path).forward(ids)
    with opened(path, ["CPU"] * 3, stages=even_stages(3, stages), n_batch=n_batch) as model:
        assert [stage.sends is not None for stage in model.stages] == [len(each) == 1 for each in stages[1:]] + [False]
        for _ in range(2):
            starts = range(0, len(ids) - n_batch, n_batch)
            results = model.run_all(batch(ids[i : i + n_batch], i, n_batch) for i in starts)
            got = [logits.copy() for logits in results]
            got += [run(model, ids[i : i + 1], i) for i in range(starts.stop, len(ids))]
            assert relative_error(np.concatenate(got), want) < 2e-3


@pytest.mark.parametrize("n_devices", [2, 3])
def test_devices_take_turns(stages_on_the_cpu, tmp_path, rng, n_devices):
    path = tmp_path / "model.gguf"
    random_model(path, rng, n_layers=7)
    ids = rng.integers(0, 50, 63)
    want = Reference(path).forward(ids)
    stages = even_stages(7, [(i,) for i in range(n_devices)] * 2)
    with opened(path, ["CPU"] * n_devices, stages=stages, n_batch=7) as model:
        assert model.n_in_flight == n_devices
        assert len({id(stage.group) for stage in model.stages}) == n_devices
        for _ in range(2):
            batches = [batch(ids[i : i + 7], i, 7) for i in range(0, 56, 7)]
            got = [logits.copy() for logits in model.run_all(batches)]
            got += [run(model, ids[i : i + 1], i) for i in range(56, 63)]
            assert relative_error(np.concatenate(got), want) < 2e-3


def test_linked_devices_wait_for_one_another_without_the_host(on_the_cpu, monkeypatch, tmp_path, rng):
    monkeypatch.setattr(link, "are_peers", lambda devices: True)
    monkeypatch.setattr(pipeline, "Scheduler", lambda backends: None)
    calls = []
    for name in ("event_record", "event_wait", "event_free", "graph_compute_async", "synchronize"):
        real = getattr(ggml.c, f"ggml_backend_{name}")
        call = real if name in ("graph_compute_async", "synchronize") else lambda *args: None
        note = lambda *args, name=name, call=call: (calls.append((name, args)), call(*args))[1]  # noqa: E731
        monkeypatch.setattr(ggml.c, f"ggml_backend_{name}", note)
    monkeypatch.setattr(ggml.c, "ggml_backend_event_new", lambda device: ggml.c.ffi.cast("ggml_backend_event_t", 1))
    path = tmp_path / "model.gguf"
    random_model(path, rng)
    ids = rng.integers(0, 50, 3)
    want = Reference(path).forward(ids)
    with opened(path, ["CPU"] * 2, stages=even_stages(3, [(0,), (1,)])) as model:
        run(model, ids[:1], 0)
        calls.clear()
        assert relative_error(np.concatenate([run(model, ids[1:2], 1), run(model, ids[2:], 2)]), want[1:]) < 2e-3
        model.run(batch(ids[2:], 2), lambda: calls.append(("work", ())))
        first, second = (stage.group.backends[0].ptr for stage in model.stages)
        noted = [name for name, _ in calls]
    names = ["graph_compute_async", "event_record", "event_wait", "graph_compute_async", "synchronize", "synchronize"]
    assert noted == [*names * 2, *names[:4], "work", *names[4:]]
    assert calls[1][1][1] == calls[0][1][0] == first
    assert calls[2][1][0] == calls[3][1][0] == second


def test_all_stages_are_done_after_a_failure_at_the_last_one(on_the_cpu, monkeypatch, tmp_path, rng):
    monkeypatch.setattr(pipeline, "Scheduler", lambda backends: None)  # it takes the CPU only once
    path = tmp_path / "model.gguf"
    random_model(path, rng)
    with opened(path, ["CPU"] * 2, stages=even_stages(3, [(0,), (1,)])) as model:
        first, last = model.stages
        write, failed, done = first.write, Event(), []

        def write_late(*args):
            failed.wait()
            time.sleep(0.2)
            done.append(True)
            return write(*args)

        def fail(*args):
            failed.set()
            raise ValueError("no")

        monkeypatch.setattr(first, "write", write_late)
        monkeypatch.setattr(last, "write", fail)
        with pytest.raises(ValueError, match="no"):
            list(model.run_all([batch([1, 2, 3], 0)]))
        assert done == [True]


def test_inputs_stay_until_a_batch_is_computed_that_fails_at_the_next_stage(on_the_cpu, monkeypatch, tmp_path, rng):
    monkeypatch.setattr(pipeline, "Scheduler", lambda backends: None)  # it takes the CPU only once
    path = tmp_path / "model.gguf"
    random_model(path, rng)
    with opened(path, ["CPU"] * 2, stages=even_stages(3, [(0,), (1,)])) as model:
        first, last = model.stages
        write, compute, begun, calls = first.write, ParallelProgram.compute, Event(), []

        def note_write(*args):
            calls.append("write")
            if len(calls) == 2:
                begun.set()
            return write(*args)

        def compute_late(self, *args):
            if self.executor is first.group.executor:
                begun.wait()
                time.sleep(0.2)
                calls.append("compute")
            compute(self, *args)

        def fail(*args):
            raise ValueError("no")

        monkeypatch.setattr(first, "write", note_write)
        monkeypatch.setattr(last, "write", fail)
        monkeypatch.setattr(ParallelProgram, "compute", compute_late)
        with pytest.raises(ValueError, match="no"):
            list(model.run_all([batch([1, 2, 3], 3 * i) for i in range(3)]))
        assert calls[:3] == ["write", "write", "compute"]  # the third batch has the memory of the first


def test_a_run_between_batches_in_flight_waits_for_them(stages_on_the_cpu, monkeypatch, tmp_path, rng):
    path = tmp_path / "model.gguf"
    random_model(path, rng, n_layers=4)
    ids = rng.integers(0, 50, 56)
    want = Reference(path).forward(ids)
    compute, running = ParallelProgram.compute, []

    def compute_late(self, *args):
        entry = self, get_ident()  # a first run calls this function again
        assert not any(own is self and thread != entry[1] for own, thread in running), "it runs twice at the same time"
        running.append(entry)
        time.sleep(0.02)
        compute(self, *args)
        running.remove(entry)

    monkeypatch.setattr(ParallelProgram, "compute", compute_late)
    with opened(path, ["CPU"] * 2, stages=even_stages(4, [(0,), (1,)] * 2), n_batch=7) as model:
        batches = [batch(ids[i : i + 7], i, 7) for i in range(0, 56, 7)]
        with closing(model.run_all(batches)) as results:
            got = [next(results).copy()]
            again = run(model, ids[:7], 0, 7)
            assert not running
            with closing(model.run_all(batches[:2])) as others:
                others_got = next(others).copy()
            got += [logits.copy() for logits in results]
    assert relative_error(np.concatenate(got), want) < 2e-3
    assert relative_error(again, want[:7]) < 2e-3
    assert relative_error(others_got, want[:7]) < 2e-3


@pytest.mark.parametrize("n_stages", [2, 4])
def test_closing_a_model_ends_its_batches_in_flight(on_the_cpu, monkeypatch, tmp_path, rng, n_stages):
    monkeypatch.setattr(pipeline, "Scheduler", lambda backends: None)  # it takes the CPU only once
    path = tmp_path / "model.gguf"
    random_model(path, rng, n_layers=4)
    with opened(path, ["CPU"] * 2, stages=even_stages(4, [(0,), (1,)] * (n_stages // 2)), n_batch=7) as model:
        results = model.run_all(batch([1, 2, 3], 3 * i) for i in range(20))
        next(results)
        model.close()
        with pytest.raises(ggml.ClosedError):
            next(results)


CODE = """
import sys
from pathlib import Path
import numpy as np
from ggml_cffi.models.runners import even_stages
from tests.models.runners.test_shards import opened, run, shared
from tests.support import relative_error
path, ids = Path(sys.argv[1]), np.arange(1, 13)
found = []
four = ["Vulkan0", "Vulkan1", "Vulkan2", "Vulkan3"]
for devices, stages in ((four[:1], shared(four[:1])), (four, even_stages(3, [(0, 1), (2, 3)]))):
    with opened(path, devices, stages=stages) as model:
        found.append([run(model, ids, 0), run(model, [13], 12), run(model, [14], 13)])
for one, several in zip(*found):
    assert relative_error(several, one) < 1e-2, relative_error(several, one)
"""


@pytest.mark.usefixtures("vulkan")
def test_two_stages_of_two_gpus_give_the_logits_of_one(tmp_path, rng):
    need(("Vulkan0",))
    path = tmp_path / "model.gguf"
    random_model(path, rng)
    code = CODE.replace("sys.argv[1]", repr(str(path)))
    run_python(code, GGML_VK_VISIBLE_DEVICES="0,0,0,0")


def test_models_that_cannot_be_shared(on_the_cpu, tmp_path, rng):
    path = tmp_path / "model.gguf"
    random_model(path, rng, dtype=ggml.Q8_0)
    too_few = r"model\.gguf: the feed-forward part has 3 .*: too few for 4 devices"
    with pytest.raises(ValueError, match=too_few), opened(path, ["CPU"] * 4, stages=shared("abcd")):
        pass
    with ggml.GGUFFile(path) as file, pytest.raises(ValueError, match="'llama' has no tensor parallelism"):
        Architecture.tensor_parallel(Llama(file), 2)


def test_impossible_stages_are_refused(tmp_path, rng):
    path = tmp_path / "model.gguf"
    random_model(path, rng)
    for devices, stages, message in (
        (["CPU"], even_stages(2, [(0,)]), r"stages have layers \[0, 1\]: each of the 3 layers must be there once"),
        (["CPU"], even_stages(3, [(1,)]), r"stages have devices \[1\]: they are numbers of 1 backends"),
        (["CPU"] * 3, even_stages(3, [(0, 1), (1, 2)]), r"those of two stages must be the same, .*, or all different"),
        (["CPU"] * 2, even_stages(3, [(0, 1)]), "a device is listed twice"),
    ):
        with pytest.raises(ValueError, match=message), opened(path, devices, stages=stages):
            pass


def test_progress_and_a_closed_runner(on_the_cpu, tmp_path, rng):
    path = tmp_path / "model.gguf"
    random_model(path, rng)
    seen = []
    with opened(path, ["CPU"] * 2, stages=shared("ab"), progress=lambda *a: seen.append(a)) as model:
        assert not model.closed
        assert seen[-1][0] == seen[-1][1]
        with pytest.raises(ValueError, match="token ids are 50 to 50: they must be 0 to 49"):
            batch([50], 0).check(50, 256)
    with pytest.raises(ggml.ClosedError):
        run(model, [1], 0)
