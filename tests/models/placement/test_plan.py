"""Plans as text, as JSON and on the command line."""

import json

import pytest

from ggml_cffi import cli, models
from ggml_cffi.core import text as _text
from tests.support import bert_float64
from tests.support.memory import GIB, memory


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


def test_the_plan_command_reports_missing_memory(path, capsys, monkeypatch):
    memory(monkeypatch, CPU=500_000)
    assert cli.main(["plan", str(path), "--devices", "CPU"]) == 1
    assert "These would fit:" in capsys.readouterr().out


def test_an_encoder_that_does_not_fit_is_planned_and_has_no_shards(tmp_path, rng):
    encoder = bert_float64.random_model(tmp_path / "b.gguf", rng)
    for devices in (["100K", "CPU:1G"], ["100K", "100K", "CPU:100K"]):
        plan = models.plan(encoder, devices)
        assert plan.devices[-1].layers
        assert not any("tensor" in proposal for proposal in plan.proposals)
    for function, devices in ((models.plan, ["1G", "1G", "CPU:1G"]), (models.plan, ["CPU"]), (models.load, ["CPU"])):
        with pytest.raises(ValueError, match=r"'bert' is an encoder: split='tensor' is for decoders; use 'layer'"):
            function(encoder, devices, split="tensor")


def test_wrong_arguments_of_plan_and_load(path, tmp_path):
    for options, message in (
        ({"n_batch": 0}, "n_batch must be at least 1, not 0"),
        ({"n_ctx": 513}, "n_ctx must be 1 to 512"),
        ({"kv_dtype": "i32"}, "kv_dtype I32 cannot hold keys and values"),
        ({"balance": "luck"}, "balance 'luck' does not exist"),
        ({"balance": [1, 2]}, "not one number of 0 or more for each of CPU"),
        ({"devices": ["CPU", "CPU"]}, "the CPU comes last"),
    ):
        for function in (models.plan, models.load):
            with pytest.raises(ValueError, match=message):
                function(path, **({"devices": ["CPU"]} | options))
    with pytest.raises(FileNotFoundError):
        models.plan(tmp_path / "none.gguf")


def test_ranges_and_sizes_as_text():
    assert _text.ranges([]) == ""
    assert _text.ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert [_text.size(n) for n in (512, 3 * 2**19, 6 * GIB)] == ["0.5 KiB", "1.5 MiB", "6.0 GiB"]


def test_expected_tokens_on_the_command_line(path, capsys):
    arguments = ["plan", str(path), "--devices", "CPU", "--ctx", "256", "--split", "auto", "--expect"]
    assert cli.main([*arguments, "128,64"]) == 0
    assert "layer is the only one that is possible" in capsys.readouterr().out
    assert cli.main([*arguments, "200,100"]) != 0
    assert "expected_tokens (200, 100) are 300 together, but n_ctx is 256" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*arguments, "many"])
    assert "argument --expect: 'many' is not two numbers of tokens such as 4096,128" in capsys.readouterr().err
