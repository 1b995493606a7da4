"""Pre-tokenizers: the division of a text into words before byte-level vocabularies merge bytes.

A pre-tokenizer is a few regular expressions. Each is applied to every word that the one before left: its matches become
words, and so does the text between two matches. The names are those of ``tokenizer.ggml.pre``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ggml_cffi.models.tokenizers.unicode_categories import (
    LETTER,
    MARK,
    NUMBER,
    PUNCTUATION,
    SYMBOL,
    ascii_spaces,
    collapse,
)

_L, _N, _P, _M, _S = LETTER, NUMBER, PUNCTUATION, MARK, SYMBOL
# As in llama.cpp, a letter beyond ASCII counts as upper and as lower case.
_UPPER, _LOWER = "A-Z\xd2", "a-z\xd2"


@dataclass(frozen=True)
class Pattern:
    """One regular expression, and the form of the text that it is applied to."""

    regex: str
    view: Callable[[str], str]
    """A function that returns this form: the characters themselves, or placeholders for their categories."""


def _by_category(pattern: str) -> Pattern:
    return Pattern(pattern, collapse)


def _by_character(pattern: str) -> Pattern:
    return Pattern(pattern, ascii_spaces)


@dataclass(frozen=True)
class PreTokenizer:
    """The pre-tokenizer of one name of ``tokenizer.ggml.pre``."""

    patterns: tuple[Pattern, ...]
    ignore_merges: bool = False
    """True if a word that is a token becomes that token without merges."""
    add_bos: bool = False
    """True if texts begin with the beginning token, unless the file has a flag for it."""

    def split(self, text: str) -> list[str]:
        """Return the words of ``text``. Joined, they are ``text`` again."""
        views = {view: view(text) for view in {pattern.view for pattern in self.patterns}}
        ends = [len(text)]
        for pattern in self.patterns:
            # Compiled on first use, and cached by ``re``: most of these expressions are never used.
            ends = _split_at(re.compile(pattern.regex, re.ASCII), views[pattern.view], ends)
        return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _split_at(regex: re.Pattern[str], text: str, ends: list[int]) -> list[int]:
    """Return the ends of the words after ``regex`` was applied to each word that ends at one of ``ends``."""
    new_ends: list[int] = []
    start = 0
    for end in ends:
        at = start  # each word by itself: a lookahead must not see the next word
        for match in regex.finditer(text[start:end]):
            if start + match.start() > at:
                new_ends.append(start + match.start())
            at = start + match.end()
            new_ends.append(at)
        if at < end:
            new_ends.append(end)
        start = end
    return new_ends


_DIGIT = _by_category(f"[{_N}]")
_DIGITS = _by_category(f"[{_N}]{{1,3}}")
_SPACES = r"\s+(?!\S)|\s+"
_CONTRACTION = r"'(?i:[stmd]|re|ve|ll)"
_GPT2 = _by_category(rf"'(?:[stmd]|re|ve|ll)| ?[{_L}]+| ?[{_N}]+| ?[^\s{_L}{_N}]+|\s+(?!\S)")


def _llama3(letters: str = _L, numbers: str = "{1,3}") -> Pattern:
    """Return the pattern of Llama 3 and of models like it, for words, numbers, newlines and spaces."""
    return _by_category(
        rf"{_CONTRACTION}|[^\r\n{_L}{_N}]?[{letters}]+|[{_N}]{numbers}| ?[^\s{letters}{_N}]+[\r\n]*"
        rf"|\s*[\r\n]+|{_SPACES}"
    )


def _cased(contraction: str, numbers: str) -> Pattern:
    """Return the pattern of GPT-4o and of models like it: words end between a lower case and an upper case letter."""
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

_BY_NAMES: tuple[tuple[str, PreTokenizer], ...] = (
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
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    name: pre_tokenizer for names, pre_tokenizer in _BY_NAMES for name in names.split()
}
