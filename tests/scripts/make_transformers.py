"""Write ``data/transformers.json``: logits of small random models by Hugging Face's ``transformers``.

The script needs ``torch`` and ``transformers`` beside the tests' packages. The tests build the models of :data:`MODELS`
again from the same seed.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

import ggml_cffi as ggml
from tests.support import llama_float64

DATA = Path(__file__).resolve().parents[1] / "data"
SEED = 7
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 9]
_YARN = {
    ".rope.scaling.type": "yarn",
    ".rope.scaling.factor": 4.0,
    ".rope.scaling.original_context_length": 256,
    ".rope.freq_base": 100.0,
}
_GEMMA = {
    ".attention.sliding_window": 5,
    ".attention.sliding_window_pattern": 3,
    ".final_logit_softcapping": 2.0,
    ".rope.freq_base": 1e6,
    ".rope.scaling.type": "linear",
    ".rope.scaling.factor": 8.0,
}
#: Arguments of ``llama_float64.random_model``.
MODELS = {
    "qwen2": {"name": "qwen2", "biases": True},
    "qwen3": {"name": "qwen3", "tied": True},
    "qwen3-yarn": {"name": "qwen3", **_YARN},
    "gemma3": {"name": "gemma3", "tied": True, **_GEMMA},
}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES_GEMMA3 = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def build(variant: str, folder: Path) -> Path:
    """Write one of the models, and return its GGUF file."""
    return llama_float64.random_model(folder / f"{variant}.gguf", np.random.default_rng(SEED), **MODELS[variant])


def _state(f: ggml.GGUFFile, gemma: bool) -> dict:
    """Return the weights with the names and in the form of transformers."""
    import torch

    names = _NAMES | (_NAMES_GEMMA3 if gemma else {})
    state = {}
    for name in f.tensors:
        *layer, part, kind = name.split(".")
        prefix = f"model.layers.{layer[1]}." if layer else ""
        value = f.array(name).astype(np.float64)
        if gemma and part.endswith("norm"):
            value = value - 1  # GGUF stores the sum with 1
        state[f"{prefix}{names[part]}.{kind}"] = torch.from_numpy(value)
    return state


def _model(f: ggml.GGUFFile):
    import transformers

    name = f.metadata["general.architecture"]
    get = lambda key, default=None: f.metadata.get(f"{name}.{key}", default)  # noqa: E731
    head, theta = get("attention.key_length"), get("rope.freq_base")
    scaling = get("rope.scaling.type")
    rope = {"rope_theta": theta, "rope_type": scaling or "default"}
    if scaling:
        rope["factor"] = get("rope.scaling.factor")
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
    sizes = {
        "vocab_size": f.tensors["token_embd.weight"].shape[0],
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": head,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in f.tensors,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }
    if name == "gemma3":
        config = transformers.Gemma3TextConfig(
            **sizes,
            query_pre_attn_scalar=head,
            sliding_window=get("attention.sliding_window"),
            sliding_window_pattern=get("attention.sliding_window_pattern"),
            final_logit_softcapping=get("final_logit_softcapping"),
            rope_parameters={
                "full_attention": rope,
                "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            },
        )
        return transformers.Gemma3ForCausalLM(config)
    config, model = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[name]
    return model(config(**sizes, rope_parameters=rope))


def logits(path: Path) -> np.ndarray:
    """Return the logits that transformers computes in float64."""
    import torch

    with ggml.GGUFFile(path) as f:
        model = _model(f).double().eval()
        missing, unexpected = model.load_state_dict(_state(f, f.metadata["general.architecture"] == "gemma3"), False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected, unexpected
    model.tie_weights()
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


def main() -> None:
    import transformers

    written = {"made by": f"transformers {transformers.__version__}", "logits": {}}
    with tempfile.TemporaryDirectory() as folder:
        for variant in MODELS:
            path = build(variant, Path(folder))
            got, want = logits(path), llama_float64.Reference(path).forward(TOKENS)
            print(variant, np.abs(got - want).max())  # noqa: T201
            written["logits"][variant] = [[float(f"{x:.7g}") for x in row] for row in got]
    (DATA / "transformers.json").write_text(json.dumps(written) + "\n")


if __name__ == "__main__":
    main()
