"""Tokenizers: ids and texts as llama.cpp has them, which wrote ``data/tokens_*.json``; what is refused."""

import itertools
import json
import sys
import unicodedata
from hashlib import blake2b
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ggml_cffi as ggml
from ggml_cffi.enums import GGUFType
from ggml_cffi.models import Tokenizer, fetch
from ggml_cffi.models.tokenizers.characters import WHITESPACE, category
from ggml_cffi.models.tokenizers.merging import merge
from ggml_cffi.models.tokenizers.words import PRE_TOKENIZERS
from tests.scripts.make_tokens import FEW, VOCABULARIES, VOCABULARY_TEXTS, digest
from tests.support import DATA, gguf_writer, random_text, random_vocabulary

TEXTS = random_text.texts()
NAMES = ("smollm2", "gemma3", "minilm")


def answers(name):
    return json.loads((DATA / f"tokens_{name}.json").read_text())


def pieces(digits, n):
    """A string of digests, each by itself."""
    size = len(digits) // n
    return [digits[i : i + size] for i in range(0, len(digits), size)]


def digest_of(tokenizer, text):
    return digest(tokenizer.encode(text), tokenizer.encode(text, special=False), size=2)


def minilm_metadata():
    """As in a GGUF file, from the vocabulary of Hugging Face."""
    vocab = json.loads((fetch("minilm") / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    texts = [
        text if (text[:1], text[-1:]) == ("[", "]") else text[2:] if text.startswith("##") else "▁" + text
        for text in sorted(vocab, key=vocab.get)
    ]
    types = np.array([3 if text in special else 1 for text in texts], np.int32)
    model = {"model": "bert", "tokens": texts, "token_type": types, "eos_token_id": 102}
    return {f"tokenizer.ggml.{key}": value for key, value in model.items()}


@pytest.fixture(scope="module")
def metadata():
    """What the models' files say, by name."""
    found = {"minilm": minilm_metadata()}
    for name in ("smollm2", "gemma3"):
        with ggml.GGUFFile(fetch(name)) as file:
            found[name] = dict(file.metadata)
    return found


def tokenizer_of(metadata, **changes):
    changed = metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return Tokenizer(SimpleNamespace(path="m.gguf", metadata={k: v for k, v in changed.items() if v is not None}))


@pytest.fixture(scope="module")
def tokenizers(metadata):
    return {name: tokenizer_of(metadata[name]) for name in NAMES}


# ---------------------------------------------------------------------- as llama.cpp


def comes_back_as(name, text):
    """What is left of a text that was encoded and decoded again."""
    if name == "gemma3":
        return "<bos>" + text.replace("▁", " ")
    # SmolLM2 has no tokens for some control characters, nor for what bytes unassigned planes begin with.
    missing = bytes.fromhex("04 06 13 14 16 1d f1 f2")
    return text.encode().translate(None, missing).decode("utf-8", "replace")


@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_texts_are_as_with_llama_cpp(tokenizers, name):
    """Ids where special tokens are meant, ids where not, and the text of the first, which is the same again."""
    tokenizer, want = tokenizers[name], answers(name)
    for text, special, plain in want["examples"]:
        assert (tokenizer.encode(text), tokenizer.encode(text, special=False)) == (special, plain)
    wrong, changed = [], []
    for text, expected in zip(TEXTS, pieces(want["digests"], len(TEXTS)), strict=True):
        ids, plain = tokenizer.encode(text), tokenizer.encode(text, special=False)
        decoded = tokenizer.decode(ids, special=True)
        if digest(ids, plain, decoded, size=3) != expected:
            wrong.append(text)
        if decoded != comes_back_as(name, text):
            changed.append(text)
    assert not wrong
    assert name == "minilm" or not changed


@pytest.mark.parametrize("pre", answers("smollm2")["pre"])
def test_other_ways_to_cut_words(metadata, pre):
    tokenizer, want = tokenizer_of(metadata["smollm2"], pre=pre), answers("smollm2")["pre"][pre]
    few = TEXTS[:FEW]
    assert not [t for t, expected in zip(few, pieces(want, FEW), strict=True) if digest_of(tokenizer, t) != expected]


def test_every_pre_tokenizer_is_tried():
    tried = {PRE_TOKENIZERS[name].patterns for name in [*answers("smollm2")["pre"], "smollm"]}
    assert {kind.patterns for kind in PRE_TOKENIZERS.values()} <= tried


def test_a_space_before_the_first_word(metadata):
    """As Llama 2's vocabulary has it, here with Gemma's."""
    tokenizer, want = tokenizer_of(metadata["gemma3"], add_space_prefix=True), answers("gemma3")["add_space_prefix"]
    few = TEXTS[:FEW]
    assert not [t for t, expected in zip(few, pieces(want, FEW), strict=True) if digest_of(tokenizer, t) != expected]
    for text in few:
        assert tokenizer.decode(tokenizer.encode(text, bos=False), special=True) == text.replace("▁", " ")
    assert tokenizer.decode(tokenizer.encode("one <eos> two")) == "one  two"


def test_random_vocabularies(tmp_path):
    """With all their oddities: merges to no token, missing bytes, special tokens that overlap or swallow space."""
    wrong = []
    for seed, want in zip(range(VOCABULARIES), answers("random")["digests"], strict=True):
        vocabulary = random_vocabulary.Vocabulary(seed)
        with ggml.GGUFFile(vocabulary.write(tmp_path / "v.gguf")) as file:
            tokenizer = Tokenizer(file)
        texts = vocabulary.texts(VOCABULARY_TEXTS)
        found = [digest_of(tokenizer, text) for text in texts]
        wrong += [(seed, t) for t, a, b in zip(texts, found, pieces(want, VOCABULARY_TEXTS), strict=True) if a != b]
    assert not wrong


def test_ends_are_llama_cpps(tokenizers):
    assert tokenizers["smollm2"].ends == {0, 2, 4}  # <|endoftext|>, <|im_end|>, <reponame>
    assert tokenizers["gemma3"].ends == {1, 106, 212}  # <eos>, <end_of_turn>, </s>
    assert tokenizers["minilm"].ends == {0, 102}  # [PAD], [SEP]


# ---------------------------------------------------------------------- and back


def test_texts_that_are_not_trusted_come_back(tokenizers):
    smollm2, gemma3 = tokenizers["smollm2"], tokenizers["gemma3"]
    for text in TEXTS[:1000]:
        assert smollm2.decode(smollm2.encode(text, special=False)) == comes_back_as("smollm2", text)
        assert gemma3.decode(gemma3.encode(text, special=False)) == text.replace("▁", " ")


def test_a_stream_says_what_decode_says(tokenizers):
    for name in ("smollm2", "gemma3"):
        tokenizer = tokenizers[name]
        for text in TEXTS[:500]:
            ids = tokenizer.encode(text)
            stream = tokenizer.stream()
            assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)


def test_word_pieces_do_not_come_back(tokenizers):
    """Case, accents and spaces are lost on the way in; on the way out it is as llama.cpp does it."""
    tokenizer = tokenizers["minilm"]
    ids = tokenizer.encode("Größe, naïve: don't  EMBED\tthis 漢字 🙂?")
    assert ids[0] == tokenizer.bos == 101
    assert ids[-1] == tokenizer.sep == 102
    assert tokenizer.decode(ids) == " große, naive : don't embed this 漢?"  # unknown: 字 and 🙂
    assert tokenizer.encode("", bos=False) == []
    assert tokenizer.encode("embedding", bos=False) == tokenizer.encode("embedding")[1:-1]


# ---------------------------------------------------------------------- what encode is asked


def test_special_tokens_for_those_who_may_mean_them(tokenizers):
    for name, text, token in (
        ("smollm2", "<|im_end|>", 2),
        ("gemma3", "<end_of_turn>", 106),
        ("minilm", "[MASK]", 103),
    ):
        tokenizer = tokenizers[name]
        assert tokenizer.encode(text, bos=False) == [token]
        assert token not in tokenizer.encode(text, special=False, bos=False)
        assert tokenizer.decode([token]) == ""
        assert tokenizer.decode([token], special=True) == text
        assert tokenizer.encode(f"a{text}b", bos=False).count(token) == 1


def test_control_characters_and_surrogates(tokenizers):
    gemma3 = tokenizers["gemma3"]
    for text in ("a\0b", "\0", "\x01\x7f\x80\x9f", "\ufeff", "\ufffe\uffff\U0010ffff"):
        assert gemma3.decode(gemma3.encode(text, bos=False)) == text
    for tokenizer in tokenizers.values():
        assert tokenizer.encode("x\ud800y\udfff") == tokenizer.encode("x\ufffdy\ufffd")
        assert tokenizer.encode("\ud83d\ude42") == tokenizer.encode("🙂")  # no lone ones
        with pytest.raises(TypeError, match="text must be a str, not bytes"):
            tokenizer.encode(b"x")


def test_tokens_that_begin_and_end_a_text(metadata):
    plain = tokenizer_of(metadata["smollm2"])
    assert (plain.bos, plain.eos, plain.add_bos, plain.add_eos, plain.add_sep) == (1, 2, False, False, False)
    assert plain.encode("a", bos=True) == [1, *plain.encode("a")]
    both = tokenizer_of(metadata["smollm2"], add_bos_token=True, add_eos_token=True)
    assert both.encode("a") == [1, *plain.encode("a"), 2]
    assert both.encode("a", bos=False) == plain.encode("a")
    llama3 = tokenizer_of(metadata["smollm2"], pre="llama-bpe", add_bos_token=None)
    assert llama3.add_bos
    nameless = tokenizer_of(metadata["smollm2"], add_bos_token=True, bos_token_id=None, eos_token_id=99999)
    assert (nameless.bos, nameless.eos, nameless.add_bos) == (None, None, False)
    assert nameless.encode("a", bos=True) == plain.encode("a")
    gemma3 = tokenizer_of(metadata["gemma3"], bos_token_id=None, add_bos_token=None)
    assert gemma3.bos == 1  # SentencePiece's own
    assert gemma3.add_bos


def test_bytes_of_tokens(tokenizers):
    gemma3 = tokenizers["gemma3"]
    (newline,) = gemma3.encode("\n", bos=False)
    assert gemma3.token_bytes(newline) == b"\n"
    assert gemma3.token_bytes(gemma3._vocabulary.ids["<0xFF>"]) == b"\xff"
    assert gemma3.token_bytes(gemma3._vocabulary.ids["▁the"]) == b" the"
    assert gemma3.token_bytes(len(gemma3)) == b""  # embeddings may be padded
    assert gemma3.decode([gemma3._vocabulary.ids["<0xFF>"]]) == "\ufffd"
    with pytest.raises(ValueError, match="token id 262144 is not in the vocabulary of 262144"):
        gemma3.decode([262144])
    with pytest.raises(TypeError, match="token ids are integers"):
        gemma3.decode(["x"])


# ---------------------------------------------------------------------- characters


def test_categories_are_those_of_unicode_15_1():
    """Of every character, whatever Python is at work: the digest is that of llama.cpp's table."""
    found = "".join(category(chr(code)) for code in range(sys.maxunicode + 1))
    assert blake2b(found.encode(), digest_size=8).hexdigest() == "de6d05f7a22b752c"
    assert category("\u0378") == "U"  # not assigned
    assert (category("ß"), category("\U00031350"), category("\ue000")) == ("L", "L", "C")
    assert {c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace()} - WHITESPACE == set("\x1c\x1d\x1e\x1f")
    assert unicodedata.unidata_version >= "14"


# ---------------------------------------------------------------------- merging


def naive_merge(symbols, ranks, joint):
    parts = list(symbols)
    while True:
        pairs = [joint.join(pair) for pair in itertools.pairwise(parts)]
        at = min((i for i, pair in enumerate(pairs) if pair in ranks), key=lambda i: (ranks[pairs[i]], i), default=None)
        if at is None:
            return parts
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@given(
    st.text("abc", max_size=30),
    st.dictionaries(st.text("abc", min_size=2, max_size=5), st.integers(-3, 3), max_size=20),
    st.sampled_from(["", " "]),
)
def test_merging_is_done_lowest_rank_first(text, wanted, joint):
    ranks = {f"{t[:i]}{joint}{t[i:]}": rank for t, rank in wanted.items() for i in range(1, len(t))}
    assert merge(text, ranks, joint) == naive_merge(text, ranks, joint)


# ---------------------------------------------------------------------- vocabularies that are none

GPT2 = {"model": "gpt2", "tokens": ["a", "b", "ab", "</s>"], "merges": ["a b"]}
LLAMA = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab", "<0x0A>", "▁"],
    "scores": (GGUFType.ARRAY, (GGUFType.FLOAT32, [0.0, 0.0, 0.0, -1.0, -2.0, -0.5, 0.0, -3.0])),
    "token_type": [2, 3, 3, 1, 1, 1, 6, 1],
}
BERT = {"model": "bert", "tokens": ["[UNK]", "[CLS]", "[SEP]", "▁a", "b"], "token_type": [3, 3, 3, 1, 1]}


def made(path, base, **changes):
    """The tokenizer of a file with so small a vocabulary."""
    values = {f"tokenizer.ggml.{key}": value for key, value in {**base, **changes}.items() if value is not None}
    with ggml.GGUFFile(gguf_writer.write(path / "v.gguf", values, {})) as file:
        return Tokenizer(file)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (GPT2, {"model": None}, "the tokenizer None is not supported; gpt2, llama, bert are"),
        (GPT2, {"model": "rwkv"}, "the tokenizer 'rwkv' is not supported"),
        (GPT2, {"model": 1}, "the tokenizer 1 is not supported"),
        (GPT2, {"tokens": None}, "'tokenizer.ggml.tokens' is missing or no list of strings"),
        (GPT2, {"tokens": [1, 2]}, "tokens' is missing or no list of strings"),
        (GPT2, {"tokens": (GGUFType.ARRAY, (GGUFType.STRING, []))}, "the vocabulary is empty"),
        (GPT2, {"tokens": ["a", "b", "a"]}, "the token 'a' is 2 times in the vocabulary"),
        (GPT2, {"merges": None}, "merges' is missing or no list of strings"),
        (GPT2, {"merges": "a b"}, "merges' is missing or no list of strings"),
        (GPT2, {"pre": "gpt-9"}, "the pre-tokenizer 'gpt-9' is not supported; default, gpt-2"),
        (GPT2, {"pre": 3}, "the pre-tokenizer 3 is not supported"),
        (GPT2, {"token_type": [1, 1, 1]}, "token_type' is no list of 4 numbers"),
        (GPT2, {"token_type": ["x"] * 4}, "token_type' is no list of 4 numbers"),
        (LLAMA, {"scores": None}, "scores' is no list of 8 numbers"),
        (LLAMA, {"scores": ["x"] * 8}, "scores' is no list of 8 numbers"),
        (LLAMA, {"token_type": [2, 3, 3, 1, 6, 1, 6, 1]}, "the byte token 'b' is not written as <0x00> to <0xFF> are"),
    ],
)
def test_what_is_refused(tmp_path, base, changes, message):
    with pytest.raises(ggml.FormatError, match=message):
        made(tmp_path, base, **changes)


def test_what_is_put_up_with(tmp_path):
    gpt2 = made(tmp_path, GPT2, merges=["", " ", "a", "a b", "a b", "b  a", "x y z"])
    assert gpt2.encode("abb</s>x") == [2, 1, 3]
    assert gpt2.ends == {3}
    assert gpt2.decode([3]) == ""  # by its text a control token, whatever the file says
    llama = made(tmp_path, LLAMA)
    assert llama.encode("ab\nc") == [1, 7, 5, 6, 0]  # no byte tokens for c: unknown
    assert llama.decode([1, 7, 5, 6]) == "ab\n"
    unscored = (GGUFType.ARRAY, (GGUFType.FLOAT32, [float("nan"), float("inf")] * 4))
    assert made(tmp_path, LLAMA, scores=unscored).encode("ab", bos=False) in ([7, 5], [7, 3, 4])
    bert = made(tmp_path, BERT, unknown_token_id=0, bos_token_id=1, seperator_token_id=2)
    assert bert.encode("A ab c á") == [1, 3, 3, 4, 0, 3, 2]
    assert made(tmp_path, BERT).encode("a b") == [3]  # neither frame nor unknown token
    empty = made(tmp_path, GPT2, tokens=["a", "b", "", "</s>"])
    assert empty.decode([2]) == "[EMPTY_2]"
    assert made(tmp_path, GPT2, tokens=["a", "b", "漢", "x y"]).decode([2, 3]) == "漢x y"  # no letters for bytes


def test_space_beside_special_tokens(tmp_path):
    """Phi 3's swallow what follows them, and some models' mask what is before it. GGUF says so by names only."""
    tokens = ["<unk>", "<s>", "</s>", "a", "<|end|>", "<mask>", "▁", "<|endoftext|>"]
    base = LLAMA | {"tokens": tokens, "token_type": [2, 3, 3, 1, 3, 3, 1, 3], "add_space_prefix": False}
    values = {f"tokenizer.ggml.{key}": value for key, value in base.items()}

    def encode(text, **more):
        path = gguf_writer.write(tmp_path / "v.gguf", values | more, {})
        with ggml.GGUFFile(path) as file:
            return Tokenizer(file).encode(text, bos=False)

    text = "a <mask> a<|end|>  a"
    assert encode(text) == [3, 6, 5, 6, 3, 4, 6, 6, 3]
    assert encode(text, **{"general.name": "Phi-3"}) == [3, 6, 5, 3, 4, 3]
    assert encode(text, **{"general.architecture": "jina-bert-v3"}) == [3, 5, 6, 3, 4, 6, 6, 3]


# ---------------------------------------------------------------------- nothing breaks it

anything = st.one_of(
    st.text(max_size=40),
    st.text("ab▁Ġ <>s/\n\0", max_size=40),
    st.text(st.characters(categories=["Cs", "Co", "Cn", "Mn", "Zs", "So"]), max_size=20),
)
from_a_file = st.one_of(
    st.binary(max_size=10).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
    anything.map(lambda text: text.encode("utf-8", "replace").decode()),
)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["gpt2", "llama", "bert"]),
    st.lists(st.tuples(from_a_file, st.integers(-1, 7), st.floats(width=32)), min_size=1, max_size=20),
    st.lists(from_a_file, max_size=10),
    st.dictionaries(st.sampled_from(["bos_token_id", "unknown_token_id", "add_bos_token"]), st.integers(-1, 25)),
    anything,
    st.booleans(),
)
def test_any_vocabulary_and_any_text(kind, tokens, merges, more, text, special):
    texts, types, scores = zip(*tokens, strict=True)
    model = {
        "model": kind,
        "tokens": list(texts),
        "token_type": np.array(types, np.int32),
        "scores": np.array(scores, np.float32),
        "merges": merges,
    }
    try:
        tokenizer = tokenizer_of({}, **model, **more)
    except ggml.FormatError:
        return
    ids = tokenizer.encode(text, special=special)
    assert tokenizer.check(ids) == ids
    assert isinstance(tokenizer.decode(ids, special=special), str)


@settings(max_examples=200, deadline=None)
@given(anything, st.booleans())
def test_any_text_comes_back(tokenizers, text, special):
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    gemma3 = tokenizers["gemma3"]
    assert gemma3.decode(gemma3.encode(text, special=special, bos=False), special=special) == clean.replace("▁", " ")


@pytest.mark.parametrize("text", ["a" * 100_000, " " * 100_000, "\n" * 100_000, "漢" * 50_000, "<unused1>" * 10_000])
def test_long_words(tokenizers, text):
    """Time grows with length, not with its square: these would take hours."""
    for name in ("smollm2", "gemma3"):
        tokenizer = tokenizers[name]
        assert tokenizer.decode(tokenizer.encode(text, special=False, bos=False)) == text
    assert tokenizers["minilm"].encode(text)[-1] == 102
