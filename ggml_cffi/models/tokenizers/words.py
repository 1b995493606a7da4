"""Pre-tokenizers: how byte-level vocabularies cut text into words, before any merge.

Each is a few regular expressions, applied in turn to the pieces that the one before left. What a pattern matches is a
piece, and so is what lies between two matches. The names are those of ``tokenizer.ggml.pre``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ggml_cffi.models.tokenizers.characters import LETTER, MARK, NUMBER, PUNCTUATION, SYMBOL, ascii_spaces, collapse

_L, _N, _P, _M, _S = LETTER, NUMBER, PUNCTUATION, MARK, SYMBOL
# A letter beyond ASCII counts as of either case, as in llama.cpp.
_UPPER, _LOWER = "A-Z\xd2", "a-z\xd2"


@dataclass(frozen=True)
class Pattern:
    """One regular expression."""

    regex: str
    view: Callable[[str], str]
    """What it looks at: characters, or what stands for their categories."""


def _by_category(pattern: str) -> Pattern:
    return Pattern(pattern, collapse)


def _by_character(pattern: str) -> Pattern:
    return Pattern(pattern, ascii_spaces)


@dataclass(frozen=True)
class PreTokenizer:
    """What ``tokenizer.ggml.pre`` names."""

    patterns: tuple[Pattern, ...]
    ignore_merges: bool = False
    """A word that is a token as it stands is not put together from its bytes."""
    add_bos: bool = False
    """Texts begin with the beginning token, unless the file says otherwise."""

    def split(self, text: str) -> list[str]:
        """The words of ``text``; joined they are ``text`` again."""
        views = {view: view(text) for view in {pattern.view for pattern in self.patterns}}
        ends = [len(text)]
        for pattern in self.patterns:
            # Compiled when it is used, and remembered by ``re``: most of these never are.
            ends = _cut(re.compile(pattern.regex, re.ASCII), views[pattern.view], ends)
        return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _cut(regex: re.Pattern[str], text: str, ends: list[int]) -> list[int]:
    """Where pieces end after ``regex`` was applied to each of the pieces that end at ``ends``."""
    cuts: list[int] = []
    start = 0
    for end in ends:
        at = start  # a piece is looked at alone: what surrounds it is not for lookaheads to see
        for match in regex.finditer(text[start:end]):
            if start + match.start() > at:
                cuts.append(start + match.start())
            at = start + match.end()
            cuts.append(at)
        if at < end:
            cuts.append(end)
        start = end
    return cuts


_DIGIT = _by_category(f"[{_N}]")
_DIGITS = _by_category(f"[{_N}]{{1,3}}")
_SPACES = r"\s+(?!\S)|\s+"
_CONTRACTION = r"'(?i:[stmd]|re|ve|ll)"
_GPT2 = _by_category(rf"'(?:[stmd]|re|ve|ll)| ?[{_L}]+| ?[{_N}]+| ?[^\s{_L}{_N}]+|\s+(?!\S)")


def _llama3(letters: str = _L, numbers: str = "{1,3}") -> Pattern:
    """Llama 3's pattern and its kin: how words, numbers, newlines and spaces are cut."""
    return _by_category(
        rf"{_CONTRACTION}|[^\r\n{_L}{_N}]?[{letters}]+|[{_N}]{numbers}| ?[^\s{letters}{_N}]+[\r\n]*"
        rf"|\s*[\r\n]+|{_SPACES}"
    )


def _cased(contraction: str, numbers: str) -> Pattern:
    """GPT-4o's pattern and its kin: words end where small letters are followed by capital ones."""
    start = rf"[^\r\n{_L}{_N}]?"
    return _by_category(
        rf"{start}[{_UPPER}]*[{_LOWER}]+{contraction}|{start}[{_UPPER}]+[{_LOWER}]*{contraction}|[{_N}]{numbers}"
        rf"| ?[^\s{_L}{_N}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}"
    )


_DEEPSEEK3 = (
    _DIGITS,
    _by_character("[一-龥\u3040-ゟ゠-ヿ]+"),
    _by_category(
        rf"[!-/:-@\[-`{{-~][A-Za-z]+|[^\r\n{_L}{_P}{_S}]?[{_L}{_M}]+| ?[{_P}{_S}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"
    ),
)

_KINDS: tuple[tuple[str, PreTokenizer], ...] = (
    (
        "default",
        PreTokenizer(
            (_by_category(rf"[{_P}$+<=>\^~|]+"), _GPT2, _by_category(f"[{_N}]+"), _by_category("[0-9][0-9][0-9]"))
        ),
    ),
    ("gpt-2 phi-2 mpt olmo jais exaone4 modern-bert roberta-bpe granite-docling", PreTokenizer((_GPT2,))),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b", PreTokenizer((_DIGIT, _GPT2))),
    ("falcon", PreTokenizer((_by_category(rf"[{_P}$+<=>\^~|`]+"), _GPT2, _by_category("[0-9][0-9][0-9]")))),
    ("llama-bpe llama3 llama-v3 falcon3 lfm2 pixtral", PreTokenizer((_llama3(),), ignore_merges=True, add_bos=True)),
    ("dbrx smaug-bpe chatglm-bpe", PreTokenizer((_llama3(),))),
    ("glm4", PreTokenizer((_llama3(),), ignore_merges=True)),
    ("qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan grok-2", PreTokenizer((_llama3(numbers=""),))),
    ("qwen35", PreTokenizer((_llama3(letters=_L + _M, numbers=""),))),
    ("gpt-4o llama4 minimax-m2", PreTokenizer((_cased(f"(?:{_CONTRACTION})?", "{1,3}"),))),
    ("tekken", PreTokenizer((_cased("", ""),), ignore_merges=True, add_bos=True)),
    ("deepseek-v3 hunyuan-dense", PreTokenizer(_DEEPSEEK3)),
    (
        "deepseek-coder",
        PreTokenizer(
            (
                _by_character(r"[\r\n]"),
                _by_category(rf"\s?[{_L}]+"),
                _by_category(rf"\s?[{_P}]+"),
                _by_character("[一-龥ࠀ-一가-퟿]+"),
                _DIGIT,
            )
        ),
    ),
)
PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: kind for names, kind in _KINDS for name in names.split()}
