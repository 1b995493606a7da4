"""Conversion of Hugging Face folders to GGUF files, and the command ``convert``."""

import json
import subprocess
import sys

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import cli
from ggml_cffi.models.architectures.bert import MAX_SEQUENCE_LENGTH, Bert
from ggml_cffi.models.convert.convert import convert
from tests.support import PATIENCE, bert_float64

save_file = pytest.importorskip("safetensors.numpy").save_file

N, EMBD, FF = 12, 32, 64
TOKENS = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "##lo", "##s", "é", "["]
CONFIG = {
    "architectures": ["BertModel"],
    "hidden_act": "gelu",
    "hidden_size": EMBD,
    "intermediate_size": FF,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 20,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "type_vocab_size": 2,
    "vocab_size": N,
}
TOKENIZER = {
    "added_tokens": [{"id": i, "content": TOKENS[i], "special": True} for i in (0, 2, 3, 4, 5)],
    "normalizer": {"type": "BertNormalizer", "lowercase": True, "strip_accents": None},
    "model": {
        "type": "WordPiece",
        "continuing_subword_prefix": "##",
        "vocab": {text: i for i, text in enumerate(TOKENS)},
    },
}
MODULES = [
    {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def tensors(rng, prefix="", gamma="weight", beta="bias"):
    """Return the weights of a small encoder under their names in Hugging Face's files."""
    found = {
        "embeddings.word_embeddings.weight": (N, EMBD),
        "embeddings.position_embeddings.weight": (20, EMBD),
        "embeddings.token_type_embeddings.weight": (2, EMBD),
        f"embeddings.LayerNorm.{gamma}": (EMBD,),
        f"embeddings.LayerNorm.{beta}": (EMBD,),
        "pooler.dense.weight": (EMBD, EMBD),
        "pooler.dense.bias": (EMBD,),
    }
    for i in range(2):
        layer = f"encoder.layer.{i}"
        for name, n_out, n_in in (
            ("attention.self.query", EMBD, EMBD),
            ("attention.self.key", EMBD, EMBD),
            ("attention.self.value", EMBD, EMBD),
            ("attention.output.dense", EMBD, EMBD),
            ("intermediate.dense", FF, EMBD),
            ("output.dense", EMBD, FF),
        ):
            found |= {f"{layer}.{name}.weight": (n_out, n_in), f"{layer}.{name}.bias": (n_out,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            found |= {f"{layer}.{name}.{gamma}": (EMBD,), f"{layer}.{name}.{beta}": (EMBD,)}
    values = {prefix + name: rng.standard_normal(shape).astype(np.float32) for name, shape in found.items()}
    return values | {f"{prefix}embeddings.position_ids": np.arange(20)[None]}


@pytest.fixture
def folder(tmp_path, rng):
    """Write a small sentence encoder as sentence-transformers does."""
    path = tmp_path / "little"
    (path / "1_Pooling").mkdir(parents=True)
    save_file(tensors(rng), path / "model.safetensors")
    for name, content in (
        ("config.json", CONFIG),
        ("tokenizer.json", TOKENIZER),
        ("modules.json", MODULES),
        ("1_Pooling/config.json", {"word_embedding_dimension": EMBD, "pooling_mode_mean_tokens": True}),
        ("sentence_bert_config.json", {"max_seq_length": 16}),
    ):
        (path / name).write_text(json.dumps(content))
    return path


def change(path, **changes):
    """Change values of a JSON file; None removes a key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def converted(folder, dtype="f32"):
    convert(folder, folder / "out.gguf", dtype)
    return ggml.GGUFFile(folder / "out.gguf")


def test_names_shapes_and_metadata_are_converted(folder):
    weights = pytest.importorskip("safetensors.numpy").load_file(folder / "model.safetensors")
    with converted(folder) as file:
        architecture = Bert(file)  # raises if a tensor is missing or has a wrong shape
        assert len(file.tensors) == len(architecture.shapes)
        assert (architecture.n_layers, architecture.n_heads, architecture.n_vocab) == (2, 2, N)
        assert (architecture.pooling, architecture.max_sequence_length, architecture.n_ctx_train) == ("mean", 16, 20)
        assert file.metadata["general.name"] == "little"
        assert file.metadata["general.file_type"] == 0
        for ours, theirs in (
            ("token_embd.weight", "embeddings.word_embeddings.weight"),
            ("token_embd_norm.bias", "embeddings.LayerNorm.bias"),
            ("blk.1.attn_v.weight", "encoder.layer.1.attention.self.value.weight"),
            ("blk.0.ffn_down.bias", "encoder.layer.0.output.dense.bias"),
            ("blk.1.layer_output_norm.weight", "encoder.layer.1.output.LayerNorm.weight"),
        ):
            np.testing.assert_array_equal(file.array(ours), weights[theirs])
    assert np.isfinite(bert_float64.Reference(folder / "out.gguf").embed([[3, 6, 4]], "mean")).all()


def test_the_vocabulary_is_converted(folder):
    change(folder / "tokenizer.json", added_tokens=[*TOKENIZER["added_tokens"], {"id": 10, "content": "["}])
    with converted(folder) as file:
        key = lambda name: file.metadata[f"tokenizer.ggml.{name}"]  # noqa: E731
        assert key("model") == "bert"
        assert key("tokens") == [*TOKENS[:6], "▁hello", "lo", "s", "▁é", "▁[", "[PAD11]"]
        assert [*key("token_type")] == [3, 1, 3, 3, 3, 3, 1, 1, 1, 1, 1, 5]
        ids = ("padding", "unknown", "cls", "bos", "seperator", "eos", "mask")
        assert [key(f"{name}_token_id") for name in ids] == [0, 2, 3, 3, 4, 4, 5]
        assert key("token_type_count") == 2


def test_the_vocabulary_may_come_from_plain_text(folder):
    with converted(folder) as file:
        want = file.metadata["tokenizer.ggml.tokens"]
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor vocab\.txt"):
        convert(folder, folder / "out.gguf")
    (folder / "vocab.txt").write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps({"mask_token": {"content": "hello"}}))
    with converted(folder) as file:
        assert file.metadata["tokenizer.ggml.tokens"] == [*want[:6], "hello", *want[7:]]
        assert file.metadata["tokenizer.ggml.mask_token_id"] == 6


@pytest.mark.parametrize(
    ("normalizer", "lower", "strip"),
    [
        ({"lowercase": True, "strip_accents": None}, True, True),
        ({"lowercase": False, "strip_accents": None}, False, False),
        ({"lowercase": True, "strip_accents": False}, True, False),
        (None, False, False),
    ],
)
def test_the_normalizer_sets_case_and_accents(folder, normalizer, lower, strip):
    change(folder / "tokenizer.json", normalizer=normalizer)
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    with converted(folder) as file:
        assert file.metadata["tokenizer.ggml.normalizer.lowercase"] is lower
        assert file.metadata["tokenizer.ggml.normalizer.strip_accents"] is strip


@pytest.mark.parametrize(("dtype", "number"), [("f32", 0), ("f16", 1), ("q8_0", 7), ("bf16", 32)])
def test_matrices_get_the_type_that_was_asked_for(folder, dtype, number):
    with converted(folder) as file:
        want = {name: file.array(name).copy() for name in file.tensors}
    with converted(folder, dtype) as file:
        assert file.metadata["general.file_type"] == number
        for name, info in file.tensors.items():
            exact = len(info.shape) == 1 or name in ("position_embd.weight", "token_types.weight")
            assert info.dtype is (ggml.F32 if exact else ggml.Type[dtype.upper()])
            np.testing.assert_allclose(file.array(name), want[name], rtol=8e-3, atol=2e-2 if dtype == "q8_0" else 1e-6)


def test_rows_that_do_not_fill_whole_blocks_become_f16(folder, rng):
    change(folder / "config.json", intermediate_size=40)
    weights = tensors(rng)
    for i in range(2):
        for name, shape in (("intermediate.dense.weight", (40, EMBD)), ("output.dense.weight", (EMBD, 40))):
            weights[f"encoder.layer.{i}.{name}"] = np.zeros(shape, np.float32)
        weights[f"encoder.layer.{i}.intermediate.dense.bias"] = np.zeros(40, np.float32)
    save_file(weights, folder / "model.safetensors")
    with converted(folder, "q8_0") as file:
        assert file.tensors["blk.0.ffn_down.weight"].dtype is ggml.F16
        assert file.tensors["blk.0.ffn_up.weight"].dtype is ggml.Q8_0


def test_prefixes_old_names_and_several_files_give_the_same_model(folder, rng):
    """Convert a prefix, the names of old TensorFlow checkpoints, heads for other tasks, and several files."""
    with converted(folder) as file:
        want = {name: file.array(name).copy() for name in file.tensors}
    old = tensors(np.random.default_rng(42), "bert.", "gamma", "beta")
    old["cls.predictions.bias"] = np.zeros(N, np.float32)
    (folder / "model.safetensors").unlink()
    parts = sorted(old)
    where = {name: f"model-{i // 20}.safetensors" for i, name in enumerate(parts)}
    for file in set(where.values()):
        save_file({name: old[name] for name in parts if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    change(folder / "config.json", architectures=["BertForMaskedLM"])
    with converted(folder) as file:
        assert set(file.tensors) == set(want)
        for name, values in want.items():
            np.testing.assert_array_equal(file.array(name), values)


def test_bfloat16_weights_are_converted(folder, rng):
    values = tensors(rng)
    header, blob = {}, b""
    for name, array in values.items():
        data = (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": array.shape, "data_offsets": [len(blob), len(blob) + len(data)]}
        blob += data
    head = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + blob)
    with converted(folder) as file:
        found = file.array("blk.1.ffn_up.weight")
    np.testing.assert_allclose(found, values["encoder.layer.1.intermediate.dense.weight"], rtol=2**-7)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, 2),
        ({"pooling_mode_lasttoken": True}, 3),
        ({"pooling_mode": "mean"}, 1),
        ({"pooling_mode": "cls"}, 2),
    ],
    ids=str,
)
def test_each_pooling_is_converted(folder, config, pooling):
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    with converted(folder) as file:
        assert file.metadata["bert.pooling_type"] == pooling


def test_progress_counts_the_bytes_of_all_tensors(folder):
    seen = []
    convert(folder, folder / "out.gguf", progress=lambda *x: seen.append(x))
    with ggml.GGUFFile(folder / "out.gguf") as file:
        total = sum(info.nbytes for info in file.tensors.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_encoder_without_sentence_transformers_files_uses_the_mean(folder):
    (folder / "modules.json").unlink()
    (folder / "sentence_bert_config.json").unlink()
    with converted(folder) as file:
        assert "bert.pooling_type" not in file.metadata
        assert MAX_SEQUENCE_LENGTH not in file.metadata
        assert Bert(file).pooling == "mean"


# ---------------------------------------------------------------------- invalid folders


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' cannot be converted; BertModel"),
        ("config.json", {"architectures": None}, "None cannot be converted"),
        ("config.json", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported; 'gelu' is"),
        ("config.json", {"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ("config.json", {"hidden_size": "x"}, "'hidden_size' is 'x', not a positive number"),
        ("config.json", {"vocab_size": 10}, "token id 10 is too large: the model has 10 tokens"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}}}, "not BERT's WordPiece"),
        ("tokenizer.json", {"model": None}, r"another structure than BertModel needs: KeyError\('model'\)"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, r"pooling by \['mean', 'max'\] is not supported"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, r"pooling by \[\] is not supported"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_models_that_gguf_cannot_describe_are_refused(folder, file, changes, message):
    change(folder / file, **changes)
    with pytest.raises(ggml.FormatError, match=message):
        convert(folder, folder / "out.gguf")
    assert not (folder / "out.gguf").exists()


def test_folders_without_a_model_are_refused(folder, tmp_path, rng):
    target = folder / "out.gguf"
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        convert(tmp_path, target)
    weights = tensors(rng)
    for name, message in (
        ("encoder.layer.0.crossattention.self.query.weight", "has no place in the architecture 'bert'"),
        ("embeddings.word_embeddings.scale", "has no place"),
    ):
        save_file(weights | {name: np.zeros(3, np.float32)}, folder / "model.safetensors")
        with pytest.raises(ggml.FormatError, match=message):
            convert(folder, target)
    (folder / "modules.json").write_text(json.dumps([*MODULES, {"path": "3_Dense", "type": "x.models.Dense"}]))
    with pytest.raises(ggml.FormatError, match="GGUF cannot describe a Dense module"):
        convert(folder, target)
    (folder / "modules.json").write_text("{")
    with pytest.raises(ggml.FormatError, match=r"modules\.json is not JSON"):
        convert(folder, target)
    (folder / "modules.json").unlink()
    (folder / "model.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(ggml.FormatError, match=r"model\.safetensors: "):
        convert(folder, target)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        convert(folder, target)
    with pytest.raises(TypeError, match="cannot convert to Q4_0; choose one of F32, F16, BF16, Q8_0"):
        convert(folder, target, "q4_0")
    with pytest.raises(TypeError, match="no element type for 'f17'"):
        convert(folder, target, "f17")


def test_without_safetensors_the_error_names_the_package_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"of the extra models: pip install '\.\[models\]'"):
        convert(folder, folder / "out.gguf")


# ---------------------------------------------------------------------- the command


def test_the_command_prints_a_summary(folder, capsys):
    target = folder / "out.gguf"
    assert cli.main(["convert", str(folder), str(target), "--type", "f32"]) == 0
    assert capsys.readouterr().out == f"{target}: bert, 37 tensors, 74.7 KiB\n"


def test_the_command_reports_an_error_in_one_line(tmp_path):
    command = [sys.executable, "-m", "ggml_cffi", "convert", tmp_path, tmp_path / "out.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 2
    assert done.stderr.startswith("ggml-cffi: ")
    assert "has no config.json" in done.stderr
    assert done.stderr.count("\n") == 1
