"""General categories of characters."""

import sys
import unicodedata
from hashlib import blake2b

from ggml_cffi.models.tokenizers.unicode_categories import WHITESPACE, category


def test_categories_are_those_of_unicode_15_1_in_any_python():
    """The digest is that of llama.cpp's table for every character."""
    found = "".join(category(chr(code)) for code in range(sys.maxunicode + 1))
    assert blake2b(found.encode(), digest_size=8).hexdigest() == "de6d05f7a22b752c"
    assert category("\u0378") == "U"  # not assigned
    assert (category("ß"), category("\U00031350"), category("\ue000")) == ("L", "L", "C")
    assert {c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace()} - WHITESPACE == set("\x1c\x1d\x1e\x1f")
    assert unicodedata.unidata_version >= "14"
