"""Write ``data/tokens_*.json``: llama.cpp's token ids for the texts of ``random_text`` and ``random_vocabulary``.

``python -m tests.scripts.make_tokens smollm2=FILE gemma3=FILE minilm=FILE``, with the models' GGUF files. It
needs ``llama-cpp-python`` beside this package.
"""

import ctypes
import json
import sys
import tempfile
from hashlib import blake2b
from pathlib import Path

from tests.support import random_text, random_vocabulary

DATA = Path(__file__).resolve().parents[1] / "data"
EXAMPLES = 40
FEW = 500
VOCABULARIES, VOCABULARY_TEXTS = 300, 12
#: One name of each pre-tokenizer, to be tested with SmolLM2's vocabulary.
PRE_TOKENIZERS = "default gpt-2 falcon llama-bpe dbrx glm4 qwen2 qwen35 gpt-4o tekken deepseek-v3 deepseek-coder"


def digest(*values: object, size: int) -> str:
    """Return a short hexadecimal digest of ``values``."""
    return blake2b(json.dumps(values).encode(), digest_size=size).hexdigest()


class Peer:
    """llama.cpp's tokenizer of a file, with some values of its metadata replaced."""

    def __init__(self, path: str, **replaced: str | bool) -> None:
        import llama_cpp

        self.c = llama_cpp
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        overrides = (llama_cpp.llama_model_kv_override * (len(replaced) + 1))()
        for entry, (key, value) in zip(overrides, replaced.items(), strict=False):
            entry.key = f"tokenizer.ggml.{key}".encode()
            if isinstance(value, bool):
                entry.tag, entry.value.val_bool = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
            else:
                entry.tag, entry.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
        parameters.kv_overrides = overrides
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        assert self.model, path
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def encode(self, text: str, special: bool) -> list[int]:
        raw = text.encode()
        capacity = 4 * len(raw) + 8
        ids = (ctypes.c_int32 * capacity)()
        n = self.c.llama_tokenize(self.vocab, raw, len(raw), ids, capacity, True, special)
        assert n >= 0
        return list(ids[:n])

    def decode(self, ids: list[int]) -> str:
        tokens, capacity = (ctypes.c_int32 * len(ids))(*ids), 64 + 64 * len(ids)
        raw = ctypes.create_string_buffer(capacity)
        n = self.c.llama_detokenize(self.vocab, tokens, len(ids), raw, capacity, False, True)
        assert n >= 0
        return raw.raw[:n].decode("utf-8", "replace")

    def answer(self, text: str) -> tuple[list[int], list[int]]:
        """Return the token ids of a text with special tokens, and without."""
        return self.encode(text, True), self.encode(text, False)

    def __del__(self) -> None:
        self.c.llama_model_free(self.model)


def digests(peer: Peer, texts: list[str]) -> str:
    return "".join(digest(*peer.answer(text), size=2) for text in texts)


def main() -> None:
    texts = random_text.texts()
    paths = dict(argument.split("=", 1) for argument in sys.argv[1:])
    import llama_cpp

    @llama_cpp.llama_log_callback
    def silent(*_: object) -> None:
        pass

    llama_cpp.llama_log_set(silent, None)
    made_by = f"llama-cpp-python {llama_cpp.__version__}"
    for name, path in paths.items():
        peer = Peer(path)
        answers = [peer.answer(text) for text in texts]
        found = {
            "made by": made_by,
            "digests": "".join(digest(*answer, peer.decode(answer[0]), size=3) for answer in answers),
            "examples": [[text, *answer] for text, answer in zip(texts[:EXAMPLES], answers, strict=False)],
        }
        if name == "smollm2":
            found["pre"] = {pre: digests(Peer(path, pre=pre), texts[:FEW]) for pre in PRE_TOKENIZERS.split()}
        if name == "gemma3":
            found["add_space_prefix"] = digests(Peer(path, add_space_prefix=True), texts[:FEW])
        lines = json.dumps(found, ensure_ascii=True).replace('["', '\n["').replace(', "', ',\n"')
        (DATA / f"tokens_{name}.json").write_text(lines + "\n")
    found = {"made by": made_by, "digests": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(VOCABULARIES):
            vocabulary = random_vocabulary.Vocabulary(seed)
            peer = Peer(str(vocabulary.write(Path(folder) / "v.gguf")))
            found["digests"].append(digests(peer, vocabulary.texts(VOCABULARY_TEXTS)))
    (DATA / "tokens_random.json").write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    main()
