"""Quantization of model files: the types of the tensors, their values, and the memory that it takes."""

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import GGUFType, Type, models
from ggml_cffi.core import dtypes
from ggml_cffi.files.file_types import FILE_TYPES, MIXTURES
from tests.support import llama_float64, relative_error

LLAMA_CPP = json.loads((Path(__file__).parents[1] / "data" / "mixtures.json").read_text())
DIGITS = {"2": "Q2_K", "3": "Q3_K", "4": "Q4_K", "5": "Q5_K", "6": "Q6_K", "8": "Q8_0"}

WIDE, NARROW, ODD = 256, 96, 40
SHAPES = {
    "token_embd.weight": (8, WIDE),
    "output_norm.weight": (WIDE,),
    "output.weight": (8, WIDE),
    "blk.0.attn_q.weight": (4, WIDE),
    "blk.0.attn_q.bias": (4,),
    "blk.0.attn_k.weight": (4, NARROW),
    "blk.0.attn_v.weight": (4, ODD),
    "blk.0.attn_norm.weight": (2, WIDE),
    "blk.0.ffn_gate_inp.weight": (2, WIDE),
    "blk.0.ffn_up_exps.weight": (2, 4, WIDE),
    "blk.0.row.weight": (1, WIDE),
    "blk.0.ssm_conv1d.weight": (4, WIDE),
    "position_embd.weight": (8, WIDE),
    "token_types.weight": (2, WIDE),
    "blk.0.table": (2, WIDE),
}
CHANGED = {"token_embd.weight", "output.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"}
CHANGED |= {"blk.0.ffn_up_exps.weight"}


@pytest.fixture
def arrays(rng):
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def path(tmp_path, arrays):
    values = {"general.architecture": "llama", "general.file_type": 0, "u8": np.uint8(3), "words": ["a", ""]}
    ids = {"ids.weight": np.arange(WIDE * 2, dtype=np.int32).reshape(2, WIDE)}
    ggml.write_gguf(tmp_path / "m.gguf", values, arrays | ids)
    return tmp_path / "m.gguf"


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out" / "q.gguf"


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "out").mkdir()


def types(path):
    with ggml.GGUFFile(path) as f:
        return {name: info.dtype.name for name, info in f.tensors.items()}


# ---------------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("dtype", "wide", "narrow", "odd", "head", "embeddings"),
    [
        ("q4_k", "Q4_K", "Q5_0", "F16", "Q6_K", "Q4_K"),
        ("q5_k", "Q5_K", "Q5_1", "F16", "Q6_K", "Q5_K"),
        ("q6_k", "Q6_K", "Q8_0", "F16", "Q6_K", "Q6_K"),
        ("q3_k", "Q3_K", "Q4_0", "F16", "Q6_K", "Q3_K"),
        ("q2_k", "Q2_K", "Q4_0", "F16", "Q6_K", "Q2_K"),
        ("q4_0", "Q4_0", "Q4_0", "F16", "Q6_K", "Q4_0"),
        ("q8_0", "Q8_0", "Q8_0", "F16", "Q8_0", "Q8_0"),
        ("tq2_0", "TQ2_0", "Q4_0", "F16", "Q6_K", "Q4_K"),
        ("iq4_xs", "IQ4_XS", "IQ4_NL", "F16", "Q6_K", "IQ4_XS"),
        ("iq2_xs", "IQ2_XS", "IQ4_NL", "F16", "Q5_K", "Q2_K"),
        ("iq2_s", "IQ2_S", "IQ4_NL", "F16", "Q5_K", "IQ3_S"),
        ("iq3_xxs", "IQ3_XXS", "IQ4_NL", "F16", "Q5_K", "IQ3_S"),
        ("mxfp4", "MXFP4", "MXFP4", "F16", "Q8_0", "MXFP4"),
        ("f16", "F16", "F16", "F16", "F16", "F16"),
        ("bf16", "BF16", "BF16", "BF16", "BF16", "BF16"),
    ],
)
def test_each_tensor_gets_its_type(path, dtype, wide, narrow, odd, head, embeddings):
    with ggml.GGUFFile(path) as f:
        chosen = {name: t.name for name, t in ggml.choose_types(f, dtype).items()}
    assert list(chosen) == [*SHAPES, "ids.weight"]
    assert chosen["blk.0.attn_q.weight"] == chosen["blk.0.ffn_up_exps.weight"] == wide
    assert chosen["blk.0.attn_k.weight"] == narrow
    assert chosen["blk.0.attn_v.weight"] == odd
    assert chosen["output.weight"] == head
    assert chosen["token_embd.weight"] == embeddings
    assert {name for name, t in chosen.items() if t != "F32"} == CHANGED | {"ids.weight"}
    assert chosen["ids.weight"] == "I32"


def test_tied_embeddings_get_the_type_of_the_head(tmp_path, arrays):
    del arrays["output.weight"]
    ggml.write_gguf(tmp_path / "tied.gguf", {}, arrays)
    arrays["token_embd.weight"] = np.ones((8, NARROW), np.float32)
    ggml.write_gguf(tmp_path / "narrow.gguf", {}, arrays)
    with ggml.GGUFFile(tmp_path / "tied.gguf") as f:
        assert ggml.choose_types(f, "q4_k")["token_embd.weight"] is ggml.Q6_K
        assert ggml.choose_types(f, "iq2_xs")["token_embd.weight"] is ggml.Q5_K
    with ggml.GGUFFile(tmp_path / "narrow.gguf") as f:
        assert ggml.choose_types(f, "q4_k")["token_embd.weight"] is ggml.Q8_0
        assert ggml.choose_types(f, "q4_0")["token_embd.weight"] is ggml.Q8_0


def test_every_type_has_a_number_for_the_file():
    stored = {t for t in Type if dtypes.is_quantized(t) and t not in dtypes.INTERNAL} | {ggml.F32, ggml.F16, ggml.BF16}
    assert set(FILE_TYPES) == stored
    assert len(set(FILE_TYPES.values())) == len(FILE_TYPES)


@pytest.mark.parametrize("case", LLAMA_CPP)
def test_mixtures_have_the_types_that_llama_cpp_chooses(tmp_path, case):
    model = LLAMA_CPP[case]
    name, n, experts = model["architecture"], model["layers"], model["experts"]
    keys = {"block_count": n, "attention.head_count": model["heads"], "attention.head_count_kv": model["kv_heads"]}
    keys |= {"expert_count": experts} if experts else {}
    values = {f"{name}.{key}": number for key, number in keys.items()} | {"general.architecture": name}
    parts = [part for part in model["types"]["q4_k_m"] if "_" in part and part != "token_embd"]
    exps = {part: "_exps" if experts and part.startswith("ffn") else "" for part in parts}
    zeros = ggml.LazyTensor((1, 2, 256), "f16", lambda: np.zeros((1, 2, 256)))
    names = ["token_embd.weight", "output.weight"]
    # The file's order does not matter: llama.cpp sorts tensors by layer.
    names += [f"blk.{i}.{part}{exps[part]}.weight" for part in parts for i in reversed(range(n))]
    path = tmp_path / "m.gguf"
    ggml.write_gguf(path, values, dict.fromkeys(names, zeros))
    assert set(model["types"]) == {mixture.lower() for mixture in MIXTURES}
    with ggml.GGUFFile(path) as f:
        for mixture, want in model["types"].items():
            types = ggml.choose_types(f, mixture)
            assert types["output.weight"].name == want["output"]
            assert types["token_embd.weight"].name == want["token_embd"]
            for part in parts:
                got = [types[f"blk.{i}.{part}{exps[part]}.weight"].name for i in range(n)]
                assert got == [DIGITS[digit] for digit in want[part]], (mixture, part)


def test_a_file_that_llama_cpp_quantized_has_the_same_types():
    with ggml.GGUFFile(models.fetch("gemma3")) as f:
        assert f.metadata["general.file_type"] == MIXTURES["Q4_K_M"].number
        assert ggml.choose_types(f, "q4_k_m") == {name: info.dtype for name, info in f.tensors.items()}


def test_mixtures_are_written(tmp_path, target, rng):
    path = tmp_path / "m.gguf"
    tensors = {
        f"blk.{i}.{part}.weight": rng.standard_normal((2, 256)) for i in range(8) for part in ("attn_v", "attn_q")
    }
    ggml.write_gguf(path, {"general.architecture": "llama", "llama.block_count": 8}, tensors)
    ggml.quantize_file(path, target, "Q4_K_M")
    with ggml.GGUFFile(target) as f:
        assert f.metadata["general.file_type"] == 15
        assert [f.tensors[f"blk.{i}.attn_v.weight"].dtype.name[1] for i in range(8)] == list("64464466")
        assert {f.tensors[f"blk.{i}.attn_q.weight"].dtype.name for i in range(8)} == {"Q4_K"}
        name = "blk.0.attn_v.weight"
        assert f.raw(name).tobytes() == ggml.quantize(tensors[name].astype(np.float32), "q6_k").tobytes()
    with pytest.raises(ValueError, match=r"'blk.0.attn_v.weight': Q2_K_S needs importances, but imatrix is missing"):
        ggml.quantize_file(path, target, "q2_k_s")
    imatrix = dict.fromkeys(tensors, np.ones(256))
    ggml.quantize_file(path, target, "q2_k_s", imatrix=imatrix)
    ggml.quantize_file(path, target, ggml.Q2_K)
    with ggml.GGUFFile(target) as f:
        assert f.metadata["general.file_type"] == 10
        assert f.tensors["blk.0.attn_v.weight"].dtype is ggml.Q3_K


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("q4_k_l", "q4_k_s, q4_k_m, q3_k_l"), ("q4km", "q4_k_m, q4_k, q5_k_m"), ("Q8", "q8_0"), ("fp16", "f16, bf16")],
)
def test_an_unknown_type_gets_the_nearest_names(path, target, name, nearest):
    with pytest.raises(TypeError, match=f"weights have no type '{name}'; nearest: {nearest}; they can be f32, f16"):
        ggml.quantize_file(path, target, name)
    with pytest.raises(TypeError, match="weights have no type 'beautiful'; they can be f32"):
        ggml.quantize_file(path, target, "beautiful")
    assert os.listdir(target.parent) == []


def test_only_and_keep_select_tensors(path):
    with ggml.GGUFFile(path) as f:
        changed = lambda **kw: {n for n, t in ggml.choose_types(f, "q8_0", **kw).items() if t is ggml.Q8_0}  # noqa: E731
        everything = changed()
        assert changed(only="blk.*") == {n for n in everything if n.startswith("blk.")}
        assert changed(only=["output.weight", "*attn_q*"]) == {"output.weight", "blk.0.attn_q.weight"}
        assert changed(keep="blk.*") == {n for n in everything if not n.startswith("blk.")}
        assert changed(only="blk.*", keep=("*attn*",)) == {"blk.0.ffn_up_exps.weight"}
        assert changed(only="*norm*") == set()
        for wrong in ({"only": "blk.1.*"}, {"keep": ["blk.*", "blk.1.*"]}):
            with pytest.raises(ValueError, match=r"m.gguf has no tensor that matches 'blk.1.\*'"):
                changed(**wrong)


@pytest.mark.parametrize("dtype", ["i32", "f64", "q8_1", "q8_k"])
def test_types_that_weights_cannot_have_are_refused(path, target, dtype):
    with pytest.raises(TypeError, match=f"weights are not stored as {dtype.upper()}; they can be f32"):
        ggml.quantize_file(path, target, dtype)


# ---------------------------------------------------------------------- the file


def test_values_and_metadata_are_written(path, target, arrays):
    assert ggml.quantize_file(path, target, "q4_k", threads=2) == (str(target),)
    with ggml.GGUFFile(target) as f, ggml.GGUFFile(path) as before:
        for name, array in arrays.items():
            assert f.raw(name).tobytes() == ggml.quantize(array, f.tensors[name].dtype).tobytes()
        assert f.raw("ids.weight").tobytes() == before.raw("ids.weight").tobytes()
        assert list(f.metadata) == [*before.metadata, "general.quantization_version"]
        assert f.fields["u8"].type is GGUFType.UINT8
        assert (f.metadata["general.quantization_version"], f.metadata["general.file_type"]) == (2, 14)
        assert f.fields["general.file_type"].type is GGUFType.UINT32
        assert f.metadata["words"] == ["a", ""]


def test_quantized_weights_are_quantized_again_only_if_that_is_allowed(path, target, arrays):
    """Copy tensors that have the type already; decode the others first."""
    first = target.with_name("first.gguf")
    ggml.quantize_file(path, first, "q8_0")
    with pytest.raises(ValueError, match=r"5 weights would be quantized a second time \(from Q8_0\).*allow_requantize"):
        ggml.quantize_file(first, target, "q4_k")
    assert os.listdir(target.parent) == ["first.gguf"]
    ggml.quantize_file(first, target, "f32")  # decodes
    ggml.quantize_file(first, target, "q4_k", only="*norm*")  # changes nothing
    ggml.quantize_file(first, target, "q4_k", allow_requantize=True)
    with ggml.GGUFFile(first) as a, ggml.GGUFFile(target) as b:
        name = "blk.0.attn_q.weight"
        assert b.raw(name).tobytes() == ggml.quantize(a.array(name), "q4_k").tobytes()
    ggml.quantize_file(target, first, "q4_k")
    assert first.read_bytes() == target.read_bytes()


def test_the_number_of_threads_does_not_change_the_file(path, target, rng):
    big = path.with_name("big.gguf")
    ggml.write_gguf(big, {}, {"w.weight": rng.standard_normal((5000, 256)), "v.weight": (np.ones((3, 256)), "f16")})
    ggml.quantize_file(big, target, "q4_k", threads=1)
    one = target.read_bytes()
    ggml.quantize_file(big, target, "q4_k", threads=5)
    assert target.read_bytes() == one
    with pytest.raises(ValueError, match="threads must be at least 1, not 0"):
        ggml.quantize_file(big, target, "q4_k", threads=0)


def test_the_target_may_be_the_source(path, target):
    target.write_bytes(b"before")
    with pytest.raises(FileExistsError, match="exists already"):
        ggml.quantize_file(path, target, "q8_0", overwrite=False)
    assert target.read_bytes() == b"before"
    ggml.quantize_file(path, target, "q8_0")
    ggml.quantize_file(path, path, "q8_0")
    assert path.read_bytes() == target.read_bytes()


def test_split_models_are_read_and_written(path, target, arrays):
    names = ggml.quantize_file(path, target, "q8_0", max_bytes=9000)
    assert len(names) > 2
    whole = target.with_name("whole.gguf")
    ggml.quantize_file(names[0], whole, "q8_0")
    ggml.quantize_file(path, target, "q8_0")
    assert whole.read_bytes() == target.read_bytes()
    with ggml.GGUFFile(whole) as f:
        assert "split.count" not in f.metadata


def test_progress_counts_bytes(path, target):
    calls = []
    ggml.quantize_file(path, target, "q4_k", progress=lambda *x: calls.append(x))
    with ggml.GGUFFile(target) as f:
        total = sum(info.nbytes for info in f.tensors.values())
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    with pytest.raises(KeyboardInterrupt):
        ggml.quantize_file(path, path.with_name("other.gguf"), "q4_k", progress=interrupt)
    assert sorted(os.listdir(path.parent)) == ["m.gguf", "out"]


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("threads", [1, 4])
def test_values_that_are_not_finite_leave_no_file(path, target, arrays, threads):
    arrays["blk.0.attn_q.weight"][1, 7] = np.nan
    ggml.write_gguf(path, {}, arrays)
    with pytest.raises(ValueError, match=r"tensor 'blk.0.attn_q.weight': values that are not finite"):
        ggml.quantize_file(path, target, "q4_k", threads=threads)
    assert os.listdir(target.parent) == []


def test_sources_that_are_not_models_are_refused(target, tmp_path):
    (tmp_path / "text").write_text("This is no model at all, only some text.")
    with pytest.raises(ggml.FormatError, match="not a GGUF file"):
        ggml.quantize_file(tmp_path / "text", target, "q4_k")
    with pytest.raises(FileNotFoundError):
        ggml.quantize_file(tmp_path / "missing", target, "q4_k")
    assert os.listdir(target.parent) == []


# ---------------------------------------------------------------------- importances


def test_importances_are_used(path, target, arrays, rng):
    weights = {
        "blk.0.attn_q.weight": rng.uniform(0.1, 9, WIDE),
        "blk.0.attn_k.weight": rng.uniform(0.1, 9, NARROW),
        "blk.0.attn_v.weight": rng.uniform(0.1, 9, ODD),  # becomes F16, which does not use importances
        "blk.0.ffn_up_exps.weight": rng.uniform(0.1, 9, (2, WIDE)),
        "another model's": np.ones(3),
    }
    ggml.quantize_file(path, target, "iq2_xs", imatrix=weights)
    with ggml.GGUFFile(target) as f:
        for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight"):
            assert f.raw(name).tobytes() == ggml.quantize(arrays[name], f.tensors[name].dtype, weights[name]).tobytes()
        name = "blk.0.ffn_up_exps.weight"
        each = [ggml.quantize(arrays[name][i], "iq2_xs", weights[name][i]).tobytes() for i in range(2)]
        assert f.raw(name).tobytes() == b"".join(each)
    # One row of importances serves all experts; llama.cpp repeats it, and stores all experts in one flat row.
    once = target.with_name("once.gguf")
    ggml.quantize_file(path, target, "q4_k", imatrix={name: weights[name][0]}, only=name)
    ggml.quantize_file(path, once, "q4_k", imatrix={name: np.tile(weights[name][0], 2)}, only=name)
    assert once.read_bytes() == target.read_bytes()


@pytest.mark.parametrize("dtype", ["iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"])
def test_small_types_need_importances(path, target, dtype):
    message = f"tensor 'blk.0.attn_q.weight': {dtype.upper()} needs importances, but "
    with pytest.raises(ValueError, match=f"{message}imatrix is missing"):
        ggml.quantize_file(path, target, dtype)
    with pytest.raises(ValueError, match=f"{message}the importance matrix has no entry for it"):
        ggml.quantize_file(path, target, dtype, imatrix={"blk.0.ffn_up_exps.weight": np.ones(WIDE)})
    assert os.listdir(target.parent) == []


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(7), r"shape \(7,\); a tensor of shape \(4, 256\) needs \(256,\)"),
        (np.ones((4, WIDE)), r"shape \(4, 256\); a tensor"),
        (np.zeros(WIDE), "not all 0"),
        (-np.ones(WIDE), "at least 0"),
        (np.full(WIDE, np.inf), "finite"),
    ],
)
def test_importances_that_do_not_fit_are_refused(path, target, weights, message):
    with pytest.raises(ValueError, match=f"tensor 'blk.0.attn_q.weight': .*{message}"):
        ggml.quantize_file(path, target, "q4_k", imatrix={"blk.0.attn_q.weight": weights})
    assert os.listdir(target.parent) == []


# ---------------------------------------------------------------------- models


def test_quantized_models_run(devices, tmp_path, target, rng):
    """Compare the logits of one file, of several files and of the original model."""
    path = llama_float64.random_model(tmp_path / "f32.gguf", rng)
    tokens = [int(t) for t in rng.integers(0, 50, 21)]
    want = llama_float64.Reference(path).forward(tokens)
    names = ggml.quantize_file(path, target, "q8_0", max_bytes=50_000)
    ggml.quantize_file(path, target, "q8_0")
    assert len(names) > 2
    with models.load(target, devices) as one, models.load(names[0], devices) as several:
        got = one.forward(tokens)
        np.testing.assert_array_equal(several.forward(tokens), got)
    assert relative_error(got, want) < 0.05


def test_quantization_needs_little_memory(tmp_path, target):
    """Quantize with less memory than a quarter of a tensor."""
    path = tmp_path / "big.gguf"
    row = np.linspace(-1, 1, 1024, dtype=np.float32)
    ggml.write_gguf(path, {}, {"w.weight": (np.broadcast_to(row, (16384, 1024)), "q8_0")})
    tracemalloc.start()
    try:
        ggml.quantize_file(path, target, "q4_0", threads=2, allow_requantize=True)  # 64 MiB of float32
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20
