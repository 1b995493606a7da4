"""General categories of characters by Unicode 15.1, as in llama.cpp, in every version of Python.

Pre-tokenizers use regular expressions over categories, which Python's ``re`` does not support. As in llama.cpp, a
placeholder for the category replaces every character beyond ASCII, and the expressions contain the placeholders.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Callable

WHITESPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {*map(chr, range(0x2000, 0x200B))}
"""Whitespace characters. (``str.isspace`` also counts U+001C to U+001F.)"""

# Contents of character classes for expressions over collapsed text: the ASCII characters, and the placeholder.
NUMBER = "0-9\xd1"
LETTER = "A-Za-z\xd2"
PUNCTUATION = r"!-#%-*,-/:;?@\[-\]_{}" "\xd3"
MARK = "\xd4"
SYMBOL = r"$+<->\^`|~" "\xd5"

_PLACEHOLDERS = {"N": "\xd1", "L": "\xd2", "P": "\xd3", "M": "\xd4", "S": "\xd5"}
_NO_CATEGORY = "\xd0"
_TABLE_SIZE = 1 << 16

# Additions of Unicode 15.0 and 15.1 to the 14.0 of Python 3.11: first and last character, and category.
_ADDED = (
    "cf3M eceM 2ffc-2fffS 31efS 10efd-10effM 1123f-11240L 11241M 11b00-11b09P 11f00-11f01M 11f02L 11f03M 11f04-11f10L "
    "11f12-11f33L 11f34-11f3aM 11f3e-11f42M 11f43-11f4fP 11f50-11f59N 1342fL 13439-1343fC 13440M 13441-13446L "
    "13447-13455M 1b132L 1b155L 1d2c0-1d2d3N 1df25-1df2aL 1e030-1e06dL 1e08fM 1e4d0-1e4ebL 1e4ec-1e4efM 1e4f0-1e4f9N "
    "1f6dcS 1f774-1f776S 1f77b-1f77fS 1f7d9S 1fa75-1fa77S 1fa87-1fa88S 1faad-1faafS 1fabb-1fabdS 1fabfS 1face-1facfS "
    "1fada-1fadbS 1fae8S 1faf7-1faf8S 2b739L 2ebf0-2ee5dL 31350-323afL"
)
# Additions of later versions, which newer Pythons have, but which llama.cpp counts as not assigned.
_LATER = (
    "558 58b-58c 5c8-5c9 88f 897 b53-b54 c5c cdc 1acf-1af0 1b4e-1b4f 1b7f 1c89-1c8a 208f 209d-209f 20c1-20c4 2427-2429 "
    "2b96 2e60-2e63 31e4-31e5 a7cb-a7cf a7d2 a7d4 a7da-a7dd a7e2 a7f1 ab6c-ab6d fbc3-fbd2 fd90-fd91 fdc8-fdce "
    "105c0-105f3 107bb-107bf 10940-10959 10d40-10d65 10d69-10d85 10d8e-10d8f 10ec2-10ec7 10ec9-10eee 10ef0-10efc "
    "11380-11389 1138b 1138e 11390-113b5 113b7-113c0 113c2 113c5 113c7-113ca 113cc-113d5 113d7-113d8 113e1-113e2 "
    "116d0-116e3 11b0a 11b60-11b67 11bc0-11be1 11bf0-11bf9 11db0-11ddb 11de0-11de9 11df0-11df1 11f5a 1246f 12475-1247f "
    "12550-12686 13460-143fa 16100-16139 16d40-16d79 16ea0-16eb8 16ebb-16ed3 16ff2-16ff6 187f8-187ff 18cd6-18cda 18cff "
    "18d09-18d20 18d80-18df2 18e00-19191 191a0-191d2 1b123-1b128 1b168 1cc00-1ccfc 1cd00-1ceb3 1ceba-1ced0 1ced2-1ced4 "
    "1cedd-1cefd 1d127-1d128 1d1eb-1d1ff 1d250-1d281 1d6a6 1db00-1db1c 1df1f-1df24 1df2b-1df81 1df90-1df96 1dfcd-1dfff "
    "1e5d0-1e5fa 1e5ff 1e6c0-1e6de 1e6e0-1e6f5 1e6fe-1e6ff 1f1ae 1f6d8-1f6d9 1f777-1f77a 1f7da-1f7db 1f7f1-1f7ff "
    "1f8b2-1f8bb 1f8c0-1f8c1 1f8d0-1f8d8 1fa54-1fa57 1fa89-1fa8f 1fabe 1fac6 1fac8 1facc-1facd 1fadc-1fadd 1fadf "
    "1fae9-1faeb 1faef 1faf9-1fafa 1fbcb-1fbef 1fbfa 2b73a-2b73f 2b81e 2cea2-2cead 323b0-33479 3d000-3fc3f"
)


def _ranges() -> tuple[list[int], list[tuple[int, str]]]:
    """Return the first characters of all additions in order, and for each the last character and the category."""
    found = {}
    for item in [*_ADDED.split(), *(f"{item}U" for item in _LATER.split())]:
        first, _, last = item[:-1].partition("-")
        found[int(first, 16)] = (int(last or first, 16), item[-1])
    return sorted(found), [found[first] for first in sorted(found)]


_FIRSTS, _LASTS = _ranges()


def category(character: str) -> str:
    """Return the first letter of a character's general category, but ``"U"`` (not ``"C"``) for an unassigned one."""
    code = ord(character)
    at = bisect_right(_FIRSTS, code) - 1
    if at >= 0 and code <= _LASTS[at][0]:
        return _LASTS[at][1]
    known = unicodedata.category(character)
    return "U" if known == "Cn" else known[0]


class CharacterTable(dict[int, str]):
    """A table for ``str.translate`` that computes the entry of a character on first use, up to a limit."""

    def __init__(self, function: Callable[[str], str]) -> None:
        self._function = function

    def __missing__(self, code: int) -> str:
        result = self._function(chr(code))
        if len(self) < _TABLE_SIZE:
            self[code] = result
        return result


def _placeholder(character: str) -> str:
    if character.isascii():
        return character
    return "\v" if character in WHITESPACE else _PLACEHOLDERS.get(category(character), _NO_CATEGORY)


_COLLAPSED = CharacterTable(_placeholder)
_SPACES = {ord(c): "\v" for c in WHITESPACE if not c.isascii()}


def collapse(text: str) -> str:
    """Return ``text`` with the placeholder of its category for every character beyond ASCII."""
    return text if text.isascii() else text.translate(_COLLAPSED)


def ascii_spaces(text: str) -> str:
    """Return ``text`` with vertical tabs for whitespace beyond ASCII, which ``re.ASCII`` does not recognise."""
    return text if text.isascii() else text.translate(_SPACES)
