"""Plans: predicted against what is taken, what is refused before anything is, and how layers are shared out."""

import json
import sys

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import cli, models
from ggml_cffi.cli._model_args import balance_of
from ggml_cffi.core import text as _text
from ggml_cffi.core.buffer import Buffer
from ggml_cffi.core.context import Context
from ggml_cffi.models.placement import arrange
from ggml_cffi.models.placement import calibration as calibrate
from ggml_cffi.models.runners.pipeline import StagedRunner
from ggml_cffi.models.runners.weights import split_layers
from tests.support import bert_float64, llama_float64

GIB = 2**30


@pytest.fixture
def path(tmp_path, rng):
    return llama_float64.random_model(tmp_path / "m.gguf", rng)


@pytest.fixture
def counted(monkeypatch):
    """Bytes of every buffer that is made, by name of its device."""
    made = {}
    plain = Buffer.__init__

    def init(self, kind, size, **options):
        plain(self, kind, size, **options)
        name = self.buffer_type.device.name
        if name == "CPU" or not self.is_host:  # a GPU's pinned memory is the host's
            made[name] = made.get(name, 0) + size

    monkeypatch.setattr(Buffer, "__init__", init)
    return made


def memory(monkeypatch, **free):
    """Have devices of these names say that they have so much free; others have what they have."""
    real = ggml.Device.memory

    def fake(self):
        return ggml.Memory(free[self.name], free[self.name]) if self.name in free else real(self)

    monkeypatch.setattr(ggml.Device, "memory", fake)


def close(predicted, actual):
    return abs(predicted - actual) <= 0.03 * actual


def check(path, devices, counted, **options):
    """A plan has the bytes that loading and a first run take, on each device, and takes none of them itself."""
    plan = models.plan(path, devices, **options)
    assert not counted
    assert plan.fits
    with models.load(path, devices, **options) as model:
        loaded = dict(counted)
        runner = model._runners[0]
        staged = isinstance(runner, StagedRunner)
        if staged:
            model.forward([1] * plan.n_batch, last=True)
        else:
            runner._prepared((plan.n_batch, runner.n_rows, 1))
            assert model.scheduler.buffer_sizes() == {s.backend: s.compute_bytes for s in model.placement}
        for planned, share in zip(plan.devices, model.placement, strict=True):
            assert planned.layers == tuple(share.layers)
            assert close(planned.weight_bytes, share.weight_bytes)
            assert close(planned.cache_bytes, share.cache_bytes)
            assert close(planned.compute_bytes, share.compute_bytes)
            held = planned.weight_bytes - planned.mapped_bytes + planned.cache_bytes + staged * planned.compute_bytes
            # with GPUs, the real run has inputs on the devices twice: once to reserve, once now
            times = min(len(plan.devices), 2)
            assert close(held + times * planned.input_bytes, counted.get(planned.device, 0)), (planned, counted)
            assert loaded.get(planned.device, 0) <= counted.get(planned.device, 0)
    return plan


# ---------------------------------------------------------------------- predicted against actual


@pytest.mark.parametrize(
    "options",
    [{}, {"n_ctx": 8}, {"n_ctx": 300, "n_batch": 64}, {"kv_dtype": "q8_0"}, {"kv_dtype": ggml.F32, "n_batch": 9}],
    ids=str,
)
def test_the_cpu_takes_what_was_planned(path, counted, options):
    plan = check(path, ["CPU"], counted, **options)
    assert plan.devices[-1].total > 0
    assert plan.kv_dtype == ("F32" if options.get("kv_dtype") == ggml.F32 else options.get("kv_dtype", "f16").upper())


@pytest.mark.parametrize("variant", [{"tied": True}, {"name": "gemma3", ".attention.sliding_window": 16}], ids=str)
def test_other_models_take_what_was_planned(tmp_path, rng, counted, variant):
    check(llama_float64.random_model(tmp_path / "m.gguf", rng, **variant), ["CPU"], counted, n_ctx=64)


def test_smollm2_takes_what_was_planned(smollm2, counted):
    plan = check(smollm2, ["CPU"], counted, n_ctx=512, n_batch=64)
    (share,) = plan.devices
    assert share.mapped_bytes == share.weight_bytes > 80 * 2**20


def test_encoders_take_what_was_planned(tmp_path, rng, counted):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng)
    plan = models.plan(path, ["CPU"], n_batch=48)
    assert not counted
    with models.load(path, ["CPU"], n_batch=48) as model:
        (planned,), (share,) = plan.devices, model.placement
        assert close(planned.compute_bytes, share.compute_bytes)
        assert close(planned.input_bytes + planned.weight_bytes - planned.mapped_bytes, sum(counted.values()))
    assert (planned.cache_bytes, planned.has_output, planned.has_embeddings) == (0, False, True)
    assert len(planned.layers) == model.architecture.n_layers


def test_two_gpus_take_what_was_planned(two_gpus, path, counted, monkeypatch):
    memory(monkeypatch, Vulkan0=1 << 30, Vulkan1=1 << 30)  # they share the machine's, which others use meanwhile
    plan = check(path, two_gpus, counted, n_batch=16)
    first, second, cpu = plan.devices
    assert first.layers
    assert second.layers
    assert not cpu.layers
    assert second.has_output
    assert first.compute_bytes > 0 < second.compute_bytes


@pytest.mark.parametrize(
    ("balance", "layers"),
    [([2, 1], [(0, 1), (2,), ()]), ([1, 1, 1], [(1,), (2,), (0,)]), ([0, 1], [(), (0, 1, 2), ()])],
    ids=str,
)
def test_two_unequal_gpus_and_the_cpu_take_what_was_planned(two_gpus, path, counted, balance, layers):
    """In batches of 64 the first GPU computes with copies of the CPU's weights: they are counted too."""
    plan = check(path, two_gpus, counted, n_batch=64, balance=balance)
    assert [share.layers for share in plan.devices] == layers


# ---------------------------------------------------------------------- what does not fit


def test_too_small_a_cpu_is_refused_before_anything_is_made(path, counted, monkeypatch):
    memory(monkeypatch, CPU=500_000)
    plan = models.plan(path, ["CPU"])
    assert not plan.fits
    assert plan.devices[0].missing > 0
    assert "no: " in plan.table()
    assert "does not fit" in str(plan)
    with pytest.raises(ggml.OutOfMemoryError, match=r"m.gguf does not fit: CPU lacks .* These would fit: ") as caught:
        models.load(path, ["CPU"])
    assert not counted
    for proposal in plan.proposals:
        assert proposal in str(caught.value)


def options_of(proposal):
    """What to call with, for a proposal that says so."""
    return eval(f"dict({proposal})", {})


def proposals(path, devices=("CPU",), **options):
    """Those of a plan, by what they change; each that can be tried does fit."""
    plan = models.plan(path, devices, **options)
    assert not plan.fits
    found = {}
    for proposal in plan.proposals:
        found[proposal.split("=")[0]] = proposal
        if proposal.startswith(("n_ctx", "kv_dtype", "n_batch")):
            assert models.plan(path, devices, **(options | options_of(proposal))).fits
    return found


def test_each_kind_of_proposal(path, monkeypatch):
    monkeypatch.setattr(sys.modules["ggml_cffi.models.plan"], "devices", list)  # no others in this machine
    (whole,) = models.plan(path, ["CPU"]).devices
    needed = whole.total - whole.mapped_bytes
    memory(monkeypatch, CPU=needed - 1)
    found = proposals(path)
    assert found["n_ctx"] == "n_ctx=256"
    assert found["n_batch"] == "n_batch=256"
    assert any("one more device with " in text and "iB free" in text for text in found)
    # the CPU attends by other products with a quantized cache: they take less
    assert found["kv_dtype"] == "kv_dtype='q8_0'"
    # with a tenth one change is not enough
    memory(monkeypatch, CPU=needed // 10)
    found = proposals(path)
    assert list(found) == ["n_ctx", next(reversed(found))]
    assert found["n_ctx"] == "n_ctx=512, kv_dtype='q4_0', n_batch=32"
    # and there may be nothing left but more devices
    memory(monkeypatch, CPU=0)
    assert len(proposals(path)) == 1


def test_ratios_that_do_not_fit_are_refused(two_gpus, path, monkeypatch, counted):
    memory(monkeypatch, Vulkan0=2_000_000, Vulkan1=600_000)
    found = proposals(path, two_gpus, balance=[1, 3], n_batch=16)
    assert found["balance"].startswith("balance='memory': ")
    assert "of 3 layers on Vulkan0" in found["balance"]
    with pytest.raises(ggml.OutOfMemoryError, match=r"Vulkan1 lacks .* balance='memory'"):
        models.load(path, two_gpus, balance=[1, 3], n_batch=16)
    assert not counted


def test_layers_that_no_gpu_has_room_for(two_gpus, path, monkeypatch):
    memory(monkeypatch, Vulkan0=600_000, Vulkan1=600_000)
    plan = models.plan(path, two_gpus, n_batch=16)
    assert [share.layers for share in plan.devices] == [(1,), (2,), (0,)]
    assert plan.fits
    assert "CPU has 1 of 3 layers: the GPUs have no room for them." in plan.reasons
    assert "n_ctx=256" in plan.proposals
    assert "one more device" in plan.proposals[-1]
    assert "Every layer would be on a GPU with:" in str(plan)
    memory(monkeypatch, Vulkan0=0, Vulkan1=600_000)
    plan = models.plan(path, ["Vulkan1"], n_batch=16)
    assert plan.proposals[-1].startswith("Vulkan0 as well, which has ")


def test_gpus_without_any_room_take_no_part(two_gpus, path, monkeypatch):
    memory(monkeypatch, Vulkan0=0, Vulkan1=0)
    plan = models.plan(path, two_gpus)
    assert [share.total for share in plan.devices[:2]] == [0, 0]
    assert any("GPUs do not compute with weights of the CPU" in reason for reason in plan.reasons)


def test_what_gpus_compute_with_needs_room_too(two_gpus, path, monkeypatch):
    """Weights and caches alone would leave 15 % of the memory: with large batches that is too little."""
    memory(monkeypatch, Vulkan0=1_300_000, Vulkan1=0)
    small, large = (models.plan(path, ["Vulkan0"], n_batch=n) for n in (16, 512))
    assert small.fits
    assert large.fits
    assert len(large.devices[0].layers) < len(small.devices[0].layers)


# ---------------------------------------------------------------------- balance


class Sized:
    """A device with so much free."""

    def __init__(self, free, is_cpu=False):
        self.device, self.is_cpu, self.free = self, is_cpu, free

    def memory(self):
        return ggml.Memory(self.free, self.free)


@pytest.mark.parametrize(
    ("free", "parts", "want"),
    [
        ((GIB, GIB), None, [4, 4, 0]),
        ((3 * GIB, GIB), None, [6, 2, 0]),
        ((GIB, GIB), (3, 1, 0), [6, 2, 0]),
        ((GIB, GIB), (1, 1, 2), [2, 2, 4]),
        ((GIB, GIB), (0, 0, 1), [0, 0, 8]),
        ((GIB, 0), None, [8, 0, 0]),
        ((0, 0), None, [0, 0, 8]),
        ((2_600_000, GIB), (1, 1, 0), [4, 4, 0]),
        ((GIB, 1_000_000), (1, 1, 0), [6, 2, 0]),
    ],
    ids=str,
)
def test_shares_of_layers(tmp_path, rng, free, parts, want):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, n_layers=8)
    with ggml.GGUFFile(path) as file:
        architecture = models.ARCHITECTURES["llama"](file)
        backends = [*map(Sized, free), Sized(0, is_cpu=True)]
        where = split_layers(architecture, backends, 131_072, parts=parts)
    assert [where.count(i) for i in range(3)] == want
    order = [2, 0, 1]  # the CPU has the first layers, the last GPU the last ones
    assert where == sorted(where, key=order.index)


def test_balance_by_ratios_and_by_speed(path, monkeypatch):
    with ggml.GGUFFile(path) as file, ggml.Backend("CPU") as cpu, ggml.Backend("CPU") as other:
        architecture = models.ARCHITECTURES["llama"](file)
        parts = lambda balance, chosen=None: arrange.parts_of(balance, architecture, [other, cpu], chosen)  # noqa: E731
        assert parts("memory") == (None, False)
        assert parts([3, 1]) == ([3, 1], True)
        assert parts(np.array([2])) == ([2, 0], True)
        seconds = {other: 1e-3, cpu: 4e-3}
        monkeypatch.setattr(calibrate, "seconds", lambda backend, dtype: seconds[backend])
        assert parts("speed", ["A", "CPU"]) == ([1000, 250], False)
        for wrong in ([], [1, 2, 3], [-1, 2], [0, 0], [float("nan"), 1]):
            with pytest.raises(ValueError, match="not one number of 0 or more for each of CPU, CPU"):
                parts(wrong)
        with pytest.raises(ValueError, match="balance 'luck' is not known; 'memory', 'speed'"):
            parts("luck")
        assert arrange.main_dtype(architecture) is ggml.F32


def test_unequal_devices_by_speed(two_gpus, path, monkeypatch):
    fast = {"Vulkan0": 1e-9, "Vulkan1": 2e-9, "CPU": 1e-6}
    monkeypatch.setattr(calibrate, "seconds", lambda backend, dtype: fast[backend.name])
    plan = models.plan(path, two_gpus, n_batch=16, balance="speed")
    assert [share.layers for share in plan.devices] == [(0, 1), (2,), ()]
    assert "Vulkan0 has 2 of 3 layers: its part is 67% by measured speed, within what fits." in plan.reasons
    fast["CPU"] = 1e-9
    plan = models.plan(path, ["Vulkan0", "CPU"], n_batch=16, balance="speed")
    assert [len(share.layers) for share in plan.devices] in ([1, 2], [2, 1])
    with models.load(path, two_gpus, n_batch=16, balance="speed") as model:
        assert [share.layers for share in model.placement] == [[0, 1], [2], []]


# ---------------------------------------------------------------------- calibration


def test_calibration_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("GGML_CFFI_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrate, "_SIZE", 256)
    with ggml.Backend("CPU", n_threads=1) as cpu:
        first = calibrate.seconds(cpu, ggml.Q8_0)
        assert 0 < first < 1
        (name,) = json.loads(calibrate.path().read_text())
        assert cpu.device.description in name
        assert "1 threads, Q8_0, ggml" in name
        monkeypatch.setattr(calibrate, "measure", lambda backend, dtype, tokens: {1: 1e-3, 512: 1e-5}[tokens])
        assert calibrate.seconds(cpu, ggml.Q8_0) == first
        assert calibrate.seconds(cpu, ggml.F16) == pytest.approx(1e-4)
        assert len(json.loads(calibrate.path().read_text())) == 2
        for broken in ("", "[]", '{"x"', json.dumps({calibrate.key(cpu, ggml.Q8_0): "fast"})):
            calibrate.path().write_text(broken)
            assert calibrate.seconds(cpu, ggml.Q8_0) == pytest.approx(1e-4)
        assert not [f for f in calibrate.path().parent.iterdir() if f != calibrate.path()]


# ---------------------------------------------------------------------- the rest


def test_a_sketch_takes_no_memory(counted):
    from ggml_cffi.core.dry_run import DryRunContext

    with DryRunContext() as sketch:
        t = sketch.new_tensor(ggml.F32, (1 << 20, 1 << 20))
        (buffer,) = sketch.alloc("CPU", usage=ggml.Usage.WEIGHTS)
        assert (buffer.size, buffer.usage, buffer.is_host) == (0, ggml.Usage.WEIGHTS, True)
        assert sketch.taken == {buffer.buffer_type: 1 << 42}
        assert t.is_allocated
        with pytest.raises(ValueError, match="has memory already"):
            sketch.alloc("CPU", [t])
    assert not counted
    assert Context.readable


def test_plans_as_text_and_json(path, capsys):
    plan = models.plan(path, ["CPU"], n_ctx=256, n_batch=64)
    text = str(plan)
    assert text.startswith("m.gguf: context 256, batch 64, cache F16, split layer: fits\n")
    assert "0-2 + output + embeddings" in text
    assert "CPU has all 3 layers: it is the only device." in text
    assert cli.main(["plan", str(path), "--devices", "CPU", "--ctx", "256", "--batch", "64"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == text
    assert cli.main(["plan", str(path), "--devices", "CPU", "--kv-type", "q8_0", "--balance", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kv_dtype"], found["fits"], found["n_ctx"]) == ("Q8_0", True, 512)
    (share,) = found["devices"]
    assert share["total"] == sum(share[f"{kind}_bytes"] for kind in ("weight", "cache", "compute", "input"))


def test_the_command_says_what_does_not_fit(path, capsys, monkeypatch):
    memory(monkeypatch, CPU=500_000)
    assert cli.main(["plan", str(path), "--devices", "CPU"]) == 1
    assert "These would fit:" in capsys.readouterr().out
    assert balance_of("3,1") == [3, 1]
    assert balance_of("speed") == "speed"


def test_wrong_arguments(path, tmp_path):
    for options, message in (
        ({"n_batch": 0}, "n_batch must be at least 1, not 0"),
        ({"n_ctx": 513}, "n_ctx must be 1 to 512"),
        ({"kv_dtype": "i32"}, "kv_dtype I32 cannot hold keys and values"),
        ({"balance": "luck"}, "balance 'luck' is not known"),
        ({"balance": [1, 2]}, "not one number of 0 or more for each of CPU"),
        ({"devices": ["CPU", "CPU"]}, "the CPU comes last"),
    ):
        for function in (models.plan, models.load):
            with pytest.raises(ValueError, match=message):
                function(path, **({"devices": ["CPU"]} | options))
    with pytest.raises(FileNotFoundError):
        models.plan(tmp_path / "none.gguf")


def test_text():
    assert _text.ranges([]) == ""
    assert _text.ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert [_text.size(n) for n in (512, 3 * 2**19, 6 * GIB)] == ["0.5 KiB", "1.5 MiB", "6.0 GiB"]


def test_what_is_expected_in_a_shell(path, capsys):
    arguments = ["plan", str(path), "--devices", "CPU", "--ctx", "256", "--split", "auto", "--expect"]
    assert cli.main([*arguments, "128,64"]) == 0
    assert "layer is the only one that is possible" in capsys.readouterr().out
    assert cli.main([*arguments, "200,100"]) != 0
    assert "(200, 100) tokens are expected, 300 together, but n_ctx is 256" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*arguments, "many"])
    assert "--expect: invalid expected value: 'many'" in capsys.readouterr().err


def test_scratch_is_reckoned_for_large_products():
    from ggml_cffi.models.placement.scratch import scratch_bytes

    with ggml.Context() as ctx:
        w, deep = ctx.new_tensor("f16", (512, 256)), ctx.new_tensor("f16", (512, 2048))
        x = ctx.new_tensor("f32", (64, 256))
        few, halves = ctx.new_tensor("f32", (4, 2048)), ctx.new_tensor("f16", (64, 2048))
        many = ctx.new_tensor("f32", (64, 2048))

        def scratch(*products):
            with ggml.Graph(*products) as graph:
                return scratch_bytes(graph.node_pointers())

        assert scratch(ggml.mul_mat(deep, few)) == 0
        assert scratch(ggml.mul_mat(w, x), ggml.neg(x)) == 64 * 256 * 2
        assert scratch(ggml.mul_mat(deep, many)) == 64 * 2048 * 2 + (12 << 20)
        assert scratch(ggml.mul_mat(deep, halves)) == 12 << 20
