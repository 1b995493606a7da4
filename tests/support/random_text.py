"""Random strings of every kind for the tokenizers, the same ones on every machine."""

import random

#: Blocks of characters, each as ranges. Python's own tables grow with each version.
SCRIPTS = [
    [(0x61, 0x7A), (0x41, 0x5A)],
    [(0xC0, 0x24F)],
    [(0x370, 0x3FF)],
    [(0x400, 0x4FF)],
    [(0x531, 0x58A)],
    [(0x591, 0x5F4)],  # Hebrew with points
    [(0x600, 0x6FF)],  # Arabic with points
    [(0x700, 0x7BF)],
    [(0x900, 0x97F), (0x200C, 0x200D)],
    [(0x980, 0x9FF)],
    [(0xB80, 0xBFF)],
    [(0xE00, 0xE5B)],
    [(0xF00, 0xFDA)],
    [(0x1000, 0x109F)],
    [(0x10A0, 0x10FF), (0x1C90, 0x1CBF)],
    [(0x1100, 0x11FF)],
    [(0x13A0, 0x13FD)],
    [(0x1E00, 0x1FFF)],
    [(0x3041, 0x30FF)],
    [(0x4E00, 0x9FFF)],
    [(0x3400, 0x4DBF)],
    [(0xAC00, 0xD7A3)],
    [(0xF900, 0xFAFF)],
    [(0xFB00, 0xFDFF)],
    [(0xFF00, 0xFFEF)],
    [(0x10330, 0x1034A), (0x10400, 0x1044F)],
    [(0x12000, 0x12399)],
    [(0x1D400, 0x1D7FF)],
    [(0x1E900, 0x1E95F)],
    [(0x20000, 0x2A6DF)],
    [(0x2A700, 0x323AF)],
]
SPACES = " \t\n\r\v\f\x85\xa0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
INVISIBLE = "\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2069\ufeff\xad\u061c\u180e"
WORDS = (
    "the of and to in is that it was for on are with as I you he she we they his her this have from or one had by "
    "word but not what all were when your can said there use an each which how their if will up other about out "
    "many then them these so some would make like him into time has look two more write go see number no way "
    "could people my than first water been call who oil its now find long down day did get come made may part "
    "Über naïve façade café İstanbul ısı STRASSE straße Ångström Ωmega don't I'll we've they're it's he'd I'm "
    "DON'T IT'S WE'LL l'été o'clock y'all 's 'T e-mail C++ .NET snake_case camelCase PascalCase kebab-case "
    "HTTPServer iPhone 3D x86-64 v1.2.3 $5.00 50% #1 @user "
)
CODE = (
    "def f(x):\n    return x + 1\n",
    "for (int i = 0; i < n; ++i) {\n\t\ts += a[i];\n\t}\n",
    '<div class="a">\n  <p>x &amp; y</p>\n</div>',
    'print("hi")  # comment',
    "SELECT * FROM t WHERE a='b';\r\n",
    '{"a": [1, 2.5e-3, null]}',
    "https://example.org/a?b=c&d=%20e#f",
    "$ ls -la ~/x | grep -v '^d' > /dev/null 2>&1",
    "\\frac{a}{b} \\alpha_1^2",
    "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "x != y && z <= 0x7fFF || !(w ** 2)",
    "        deep\n            deeper\n",
)
EMOJI = "🙂 😀 🤖 🦄 🍎 ❤ ❤️ ☺️ 👍 👍🏽 👩‍💻 👨‍👩‍👧‍👦 🧑🏿‍🤝‍🧑🏻 🏳️‍🌈 🏴‍☠️ 🇩🇪 🇫🇷 🇺🇳 🏴󠁧󠁢󠁳󠁣󠁴󠁿 1️⃣ #️⃣ ©️ ™ 🫠 🪿 🫨 ♟️ 🀄 🃏 ㊗️"
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <issue_start> "
    "<empty_output> <pad> <eos> <bos> <unk> <mask> <unused0> <unused17> <unused6241> [multimodal] <start_of_turn> "
    "<end_of_turn> <table> <h1> </h6> <blockquote> <start_of_image> <end_of_image> <s> </s> [CLS] [SEP] [PAD] "
    "[UNK] [MASK] [unused5] <0x0A> <0xFF> ##ing ##s ▁ ▁▁ ▁the Ġ Ġthe Ċ <|eot_id|> <|begin_of_text|> <|user|> "
    "[INST] [/INST] <<SYS>> "
)


class Dice:
    """A random generator with the same choices in every Python: only ``random()`` is guaranteed to stay the same."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def below(self, n: int) -> int:
        """Return an integer from 0 to ``n - 1``."""
        return int(self.random() * n)

    def size(self, limit: int) -> int:
        """Return an integer from 1 to ``limit``, more often a small one."""
        return 1 + int(self.random() ** 2 * limit)

    def of(self, items):
        """Return one of ``items``."""
        return items[self.below(len(items))]

    def some(self, items, limit: int) -> str:
        """Return 1 to ``limit`` of ``items``, joined."""
        return "".join(self.of(items) for _ in range(self.size(limit)))


class _TextGenerator(Dice):
    """A generator of texts: each method below ``character`` returns one part of a text."""

    words, emojis, specials = WORDS.split(), EMOJI.split(), SPECIAL.split()

    def character(self, ranges) -> str:
        first, last = self.of(ranges)
        return chr(first + self.below(last - first + 1))

    def sentence(self) -> str:
        text = " ".join(self.of(self.words) for _ in range(self.size(16)))
        return self.of((text, text, text.capitalize() + self.of(".?!,;:"), text.upper(), f'"{text}"', f" {text} "))

    def script(self) -> str:
        ranges = self.of(SCRIPTS)
        return "".join(" " if self.random() < 0.1 else self.character(ranges) for _ in range(self.size(40)))

    def spaces(self) -> str:
        if self.random() < 0.7:
            return self.of(" \n\t") * self.size(self.of((4, 40, 80)))
        return self.some(SPACES, 12)

    def control(self) -> str:
        return "".join(
            self.of((chr(self.below(32)), chr(0x7F + self.below(33)), "\0", self.of(INVISIBLE)))
            for _ in range(self.size(8))
        )

    def digits(self) -> str:
        zeros = self.of(
            ((0x30, 0x39),) * 6
            + ((0x660, 0x669), (0x966, 0x96F), (0xFF10, 0xFF19), (0x2150, 0x218B), (0x1D7CE, 0x1D7FF))
        )
        text = "".join(self.character([zeros]) for _ in range(self.size(30)))
        return self.of((text, text, f"{text}.{text}", f"-{text}", f"{text},{text}", f" {text}", f"{text}²"))

    def combining(self) -> str:
        marks = [(0x300, 0x36F)] * 4 + [
            (0x1AB0, 0x1ACE),
            (0x20D0, 0x20F0),
            (0xFE00, 0xFE0F),
            (0x64B, 0x65F),
            (0x93C, 0x94D),
        ]
        return "".join(
            self.of((self.of("aeiounxAEO "), self.character(self.of(SCRIPTS))))
            + "".join(self.character(marks) for _ in range(self.size(6)))
            for _ in range(self.size(10))
        )

    def symbols(self) -> str:
        ranges = [(0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E)] * 3
        ranges += [
            (0xA1, 0xBF),
            (0x2010, 0x2027),
            (0x2030, 0x205E),
            (0x20A0, 0x20C0),
            (0x2190, 0x23FF),
            (0x2500, 0x27BF),
        ]
        ranges += [(0x3000, 0x303F), (0xFE30, 0xFE4F)]
        return "".join(self.character(ranges) for _ in range(self.size(20)))

    def repeated(self) -> str:
        return self.of((self.of("aA.-=_*#0x'\"é漢🙂"), "ab", "ha", "\r\n", " \n", "'re", " '")) * self.size(100)

    def anywhere(self) -> str:
        plane = self.of(((0x80, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF), (0x20000, 0x3FFFF), (0x40000, 0x10FFFF)))
        return "".join(self.character([plane]) for _ in range(self.size(20)))

    def special(self) -> str:
        text = self.of(self.specials)
        at = self.below(len(text))
        return self.of(
            (
                text,
                text,
                text,
                f" {text} ",
                text[:at],
                text[at:],
                text + text,
                text.upper(),
                text[:at] + " " + text[at:],
            )
        )

    def emoji(self) -> str:
        return self.some(self.emojis, 6)

    def code(self) -> str:
        text = self.of(CODE)
        return text[self.below(len(text) // 2) :]

    def text(self) -> str:
        """Return a text of a few parts, mostly of one kind or two; sometimes a long text of all kinds."""
        kinds = [
            self.sentence, self.script, self.spaces, self.control, self.digits, self.combining, self.symbols,
            self.repeated, self.anywhere, self.special, self.emoji, self.code,
        ]  # fmt: skip
        if self.random() < 0.005:
            return "".join(self.of(kinds)() for _ in range(20 + self.below(100)))
        chosen = [self.of(kinds) for _ in range(self.size(4))]
        return "".join(self.of(chosen)() for _ in range(1 + self.size(6)))


def texts(n: int = 10_000, seed: int = 2026) -> list[str]:
    """Return ``n`` texts. The first ones are the same for every ``n``."""
    generator = _TextGenerator(seed)
    return [generator.text() for _ in range(n)]
