"""Conversion of BERT and its sentence encoders: tensor names, sizes, pooling and WordPiece vocabulary."""

from __future__ import annotations

import re
from typing import Any

from ggml_cffi.errors import FormatError
from ggml_cffi.models.architectures.bert import MAX_SEQUENCE_LENGTH
from ggml_cffi.models.convert.huggingface import HuggingFaceFolder, Metadata, ModelFamily

_NAMES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "encoder.layer.{}.attention.self.query": "blk.{}.attn_q",
    "encoder.layer.{}.attention.self.key": "blk.{}.attn_k",
    "encoder.layer.{}.attention.self.value": "blk.{}.attn_v",
    "encoder.layer.{}.attention.output.dense": "blk.{}.attn_output",
    "encoder.layer.{}.attention.output.LayerNorm": "blk.{}.attn_output_norm",
    "encoder.layer.{}.intermediate.dense": "blk.{}.ffn_up",
    "encoder.layer.{}.output.dense": "blk.{}.ffn_down",
    "encoder.layer.{}.output.LayerNorm": "blk.{}.layer_output_norm",
}
_POOLINGS = {"mean": 1, "cls": 2, "lasttoken": 3}
_WORD = "\u2581"
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5
#: Special tokens: the default text of each, and its keys in GGUF.
_SPECIAL = {
    "cls": ("[CLS]", ("bos_token_id", "cls_token_id")),
    "sep": ("[SEP]", ("eos_token_id", "seperator_token_id")),  # "seperator" is the spelling in GGUF
    "unk": ("[UNK]", ("unknown_token_id",)),
    "pad": ("[PAD]", ("padding_token_id",)),
    "mask": ("[MASK]", ("mask_token_id",)),
}


def _metadata(source: HuggingFaceFolder) -> Metadata:
    source.require("hidden_act", "gelu", None)
    source.require("position_embedding_type", "absolute", None)
    sizes = {
        "bert.block_count": source.positive_int("num_hidden_layers"),
        "bert.context_length": source.positive_int("max_position_embeddings"),
        "bert.embedding_length": source.positive_int("hidden_size"),
        "bert.feed_forward_length": source.positive_int("intermediate_size"),
        "bert.attention.head_count": source.positive_int("num_attention_heads"),
        "bert.attention.layer_norm_epsilon": float(source.config.get("layer_norm_eps", 1e-12)),
        "bert.attention.causal": False,
        "tokenizer.ggml.token_type_count": source.positive_int("type_vocab_size"),
    }
    return sizes | _sentence_encoder(source) | _vocabulary(source)


def _sentence_encoder(source: HuggingFaceFolder) -> Metadata:
    """Return the metadata of a sentence encoder: its pooling, and its largest number of tokens."""
    found: Metadata = {}
    for module in source.json("modules.json") or ():
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            found["bert.pooling_type"] = _pooling(source, module["path"])
        elif kind not in ("Transformer", "Normalize"):
            raise FormatError(f"{source.folder / 'modules.json'}: GGUF cannot describe a {kind} module")
    longest = (source.json("sentence_bert_config.json") or {}).get("max_seq_length")
    if longest is not None:
        found[MAX_SEQUENCE_LENGTH] = int(longest)
    return found


def _pooling(source: HuggingFaceFolder, folder: str) -> int:
    config = source.json(f"{folder}/config.json") or {}
    # Newer versions of sentence-transformers write one name, older ones a flag for each way of pooling.
    name = config.get("pooling_mode")
    names = [name] if isinstance(name, str) else [k for k, on in config.items() if on and k.startswith("pooling_mode_")]
    ways = [n.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for n in names]
    if len(ways) != 1 or ways[0] not in _POOLINGS:
        raise FormatError(f"{source.folder / folder}: pooling by {ways} is not supported; one of {[*_POOLINGS]} is")
    return _POOLINGS[ways[0]]


def _vocabulary(source: HuggingFaceFolder) -> Metadata:
    """Return the WordPiece vocabulary as GGUF stores it: GGUF marks the first token of a word, Hugging Face the tokens
    after it.
    """
    whole, settings = source.json("tokenizer.json") or {}, source.json("tokenizer_config.json") or {}
    added = {entry["content"]: entry for entry in whole.get("added_tokens", ())}
    ids: dict[str, int] = {**_words(source, whole), **{text: entry["id"] for text, entry in added.items()}}
    named = {name: _special_text(source, name) for name in _SPECIAL}
    special = {*named.values(), *(text for text, entry in added.items() if entry.get("special"))}
    special_keys = [(text, key) for name, text in named.items() for key in _SPECIAL[name][1]]
    n = source.positive_int("vocab_size")
    if max(ids.values()) >= n:
        raise FormatError(f"{source.folder}: token id {max(ids.values())} is too large: the model has {n} tokens")
    texts, types = [f"[PAD{i}]" for i in range(n)], [_UNUSED] * n
    for text, i in ids.items():
        bare = text in special or (text[:1], text[-1:]) == ("[", "]")
        texts[i] = text if bare else text[2:] if text.startswith("##") else _WORD + text
        types[i] = _CONTROL if text in special else _NORMAL
    normalizer = whole.get("normalizer") or {}
    lower = normalizer.get("lowercase", settings.get("do_lower_case", True))
    strip = normalizer.get("strip_accents", settings.get("strip_accents"))
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.normalizer.lowercase": bool(lower),
        "tokenizer.ggml.normalizer.strip_accents": bool(lower if strip is None else strip),
        **{f"tokenizer.ggml.{key}": ids[text] for text, key in special_keys if text in ids},
    }


def _words(source: HuggingFaceFolder, tokenizer: Metadata) -> dict[str, int]:
    """Return the id of every token of the vocabulary, without the added tokens."""
    if not tokenizer:
        path = source.folder / "vocab.txt"
        if not path.is_file():
            raise FileNotFoundError(f"{source.folder} has neither tokenizer.json nor vocab.txt")
        return {text: i for i, text in enumerate(path.read_text(encoding="utf-8").splitlines())}
    model: dict[str, Any] = tokenizer["model"]
    if model.get("type", "WordPiece") != "WordPiece" or model.get("continuing_subword_prefix") != "##":
        raise FormatError(f"{source.folder / 'tokenizer.json'}: the vocabulary is not BERT's WordPiece")
    words: dict[str, int] = model["vocab"]
    return words


def _special_text(source: HuggingFaceFolder, name: str) -> str:
    """Return the text of the special token ``name``, such as ``cls``, from the tokenizer's files."""
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        entry = (source.json(file) or {}).get(f"{name}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str):
            return text
    return _SPECIAL[name][0]


BERT = ModelFamily(
    architecture="bert",
    names=_NAMES,
    # Only tasks other than embeddings use the pooler and the heads.
    ignored=re.compile(r"pooler\.|cls\.|embeddings\.position_ids$"),
    metadata=_metadata,
    prefix="bert.",
    always_f32=frozenset({"position_embd.weight", "token_types.weight"}),
)
