"""Small random vocabularies of every kind, with odd ones, and texts for them."""

from pathlib import Path

from ggml_cffi.enums import GGUFType
from ggml_cffi.models.tokenizers.byte_level_bpe import byte_letters
from tests.support import gguf_writer
from tests.support.random_text import Dice

LETTERS = "abcdeéß漢🙂 \n1.'▁Ġ"
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


class Vocabulary(Dice):
    """A vocabulary, and the metadata of its GGUF file."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.tokens: dict[str, int] = {}
        """Texts of the tokens, and their types."""
        self.letters = [letter for letter in LETTERS if self.random() < 0.8] + ["a"]
        self.more: dict[str, object] = {"general.name": self.of(("Phi-3-mini", "x", "y"))}
        self.model = self.of(("llama", "gpt2", "bert"))
        getattr(self, self.model)()
        for _ in range(self.below(12)):
            text = self.some(self.letters, 5) if self.random() < 0.7 else f"<{self.of(self.letters)}>"
            self.tokens.setdefault(text, self.of((_CONTROL, _USER, _USER, _UNKNOWN)))
        if self.model == "llama":
            scores = [float(self.of((-i, -self.below(5)))) for i in range(len(self.tokens))]
            self.more["tokenizer.ggml.scores"] = (GGUFType.ARRAY, (GGUFType.FLOAT32, scores))

    def random_flag(self, key: str) -> None:
        """Set a Boolean of the metadata, or leave it out."""
        if self.random() < 0.5:
            self.more[f"tokenizer.ggml.{key}"] = self.random() < 0.5

    def llama(self) -> None:
        self.tokens |= {"<unk>": _UNKNOWN, "<s>": _CONTROL, "</s>": _CONTROL, "<|endoftext|>": _CONTROL}
        self.tokens |= {f"<0x{byte:02X}>": _BYTE for byte in range(256)}
        for _ in range(5 + self.below(50)):
            kind = self.of((_NORMAL, _NORMAL, _NORMAL, _NORMAL, _UNUSED, 0))
            self.tokens.setdefault(self.some(self.letters, 6).replace(" ", "▁"), kind)
        for key in ("add_space_prefix", "add_bos_token", "add_eos_token"):
            self.random_flag(key)

    def gpt2(self) -> None:
        byte = byte_letters()
        self.tokens = {byte[b]: _NORMAL for b in range(256) if self.random() < 0.95}
        parts = [byte[b] for letter in self.letters for b in letter.encode()]
        merges = []
        for _ in range(5 + self.below(50)):
            left, right = self.of(parts), self.of(parts)
            merges.append(f"{left} {right}")
            parts.append(left + right)
            if self.random() < 0.9:
                self.tokens.setdefault(left + right, _NORMAL)
        self.more |= {
            "general.name": "x",
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.pre": self.of(("gpt-2", "llama-bpe", "qwen2", "smollm")),
            "tokenizer.ggml.bos_token_id": self.below(len(self.tokens)),
            "tokenizer.ggml.eos_token_id": self.below(len(self.tokens)),
        }
        for key in ("add_bos_token", "add_eos_token"):
            self.random_flag(key)

    def bert(self) -> None:
        named = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
        self.tokens = {named.get(i, f"[unused{i}]"): _CONTROL if i in named else _NORMAL for i in range(104)}
        for letter in self.letters:
            self.tokens |= {start + letter: _NORMAL for start in ("", "▁") if self.random() < 0.8}
        for _ in range(5 + self.below(50)):
            self.tokens.setdefault(self.of(("", "▁")) + self.some(self.letters, 4), _NORMAL)
        self.more["general.name"] = "x"
        for key in ("normalizer.lowercase", "normalizer.strip_accents"):
            self.random_flag(key)

    def texts(self, n: int) -> list[str]:
        """Return ``n`` texts of the letters and the special tokens."""
        special = [text for text, kind in self.tokens.items() if kind in (_UNKNOWN, _CONTROL, _USER)] or ["x"]
        found = []
        for _ in range(n):
            parts = [self.of(LETTERS) if self.random() < 0.85 else self.of(special) for _ in range(self.below(30))]
            found.append("".join(parts) + self.of(LETTERS) * self.of((0, 0, 0, 0, 0, 30)))
        return found

    def write(self, path: Path) -> Path:
        """Write the GGUF file, and return its path."""
        metadata = {
            "general.architecture": "llama",
            "llama.context_length": 512,
            "tokenizer.ggml.model": self.model,
            "tokenizer.ggml.tokens": list(self.tokens),
            "tokenizer.ggml.token_type": list(self.tokens.values()),
        }
        return gguf_writer.write(path, metadata | self.more, {})
