# ruff: noqa: E501
"""Texts that tokenizers split in surprising ways, and texts that are cut at bad places.

Keys of TRICKY: `ends` white space at the ends; `runs` runs of one character; `lines` line breaks, tabs, controls;
`forms` Unicode normalisation forms and combining marks; `emoji` joined and modified emoji, flags; `scripts` scripts without
spaces, and from right to left; `special` special tokens spelt in text, whole and broken; `bytes` names of byte tokens,
replacement characters, byte order marks, rare planes; `numbers`; `code`; `words` contractions, cases, long words.
"""

from __future__ import annotations

import unicodedata

SPECIAL = [
    *("<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>"),
    *("<|eot_id|>", "<|start_header_id|>", "[INST]", "[/INST]", "<think>", "<tool_call>", "<file_sep>", "<jupyter_text>"),
]
_NAMES = ["Ångström", "e\u0301te\u0301", "ﬁn", "Ａｂｃ", "한글", "ệ", "ä\u0323", "क्षि", "が", "½㎏"]
TRICKY: dict[str, list[str]] = {
    "ends": ["", " ", "  ", "a ", " a", "  a", "   a  b   ", "\ta", "a\t", "\u00a0a", "a\u3000", " \n a", "a\n ", "a  \n", "\n\n a"],
    "runs": [
        *(" " * 2, " " * 7, " " * 15, " " * 16, " " * 17, " " * 50, " " * 200, "a" + " " * 33 + "b"),
        *("\n" * 2, "\n" * 3, "\n" * 50, "\t" * 9, "\t" * 50, "\r" * 4, "\u3000" * 5, "\u200b" * 7),
        *("a" * 300, "ab" * 200, "é" * 200, "0" * 99, "=" * 70, "-" * 81, "_" * 40, "!" * 200, "." * 33, "▁" * 9, "a " * 200),
    ],
    "lines": [
        *("a\nb", "a\r\nb", "a\rb", "a\n\n\nb", ".\n\n", "x.\n y", "\r\n\r\n", "a \n b \n", "a\u2028b", "a\u2029b", "a\u0085b"),
        *("a\x00b", "\x00", "\x00\x01\x02", "\x1b[31mred\x1b[0m", "\x7f", "a\x0bb\x0cc", "a\x08b", "\x80\x9f", "tab\tsep\t\tvalues\n"),
    ],
    "forms": [
        *(unicodedata.normalize(form, name) for form in ("NFC", "NFD", "NFKC", "NFKD") for name in _NAMES),
        *("e\u0301", "\u0301e", "a\u0300\u0301\u0302\u0303\u0304", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯A̡", "\u212b", "\u2126", "ſt", "ß ẞ İ ı", "ΐΰ", "𝔘𝔫𝔦"),
    ],
    "emoji": [
        *("🙂", "🙂🙂🙂", "👩‍👩‍👧‍👦", "👍🏽", "🏳️‍🌈", "🇩🇪🇫🇷", "☺️", "1️⃣", "a🙂b", " 🙂 ", "🧑🏿‍💻 works", "🫠🫨", "❤️‍🔥", "\u200d", "a\u200db", "\ufe0f"),
        *("🙂" * 60, "∑∞≠≈", "→←↑", "♠♥", "‰†‡"),
    ],
    "scripts": [
        *("你好，世界", "日本語 テキスト", "안녕하세요 세계", "ก็ภาษาไทย", "नमस्ते दुनिया", "தமிழ்", "ខ្មែរ", "မြန်မာ", "ⵜⵉⴼⵉⵏⴰⵖ", "Ελληνικά", "Привет, мир!"),
        *("שלום עולם", "مرحبا بالعالم", "\u202bعربي\u202c", "\u200fא", "abc שלום 123", "　全角　ＡＢＣ", "「引用」", "漢字かな交じり文。" * 9, "naïve café Straße"),
    ],
    "special": [
        *SPECIAL,
        *(f"a{token}b" for token in SPECIAL[:9]),
        *(f" {token} " for token in SPECIAL[:9]),
        *("<s></s>", "<s>a\n</s>\n", "</s", "<|endoftext|", "|endoftext|>", "<|im_start|>user\nhi<|im_end|>\n", "[INST] a [/INST]", "<S>"),
        *("<|endoftext|><|endoftext|>", "< s >", "<|im_start|", "<|reserved_special_token_0|>", "<<SYS>>\nx\n<</SYS>>\n\n"),
    ],
    "bytes": [
        *("<0x41>", "<0x0A>", "a<0xE2>b", "▁", "▁a", " ▁ a", "Ġ", "aĠb", "Ċ", "\ufffd", "a\ufffd\ufffdb", "\ufeff", "\ufeffa", "a\ufeff"),
        *("\U00010348", "𠜎𠜱", "\ue000", "\U000f0000", "\U0010ffff", "\uffff", "\ufdd0", "\u00ad", "a\u2060b", "\u180e", "\u061c"),
    ],
    "numbers": [
        *("1 22 333 4444 55555", "1234567", "12345678901234567890", "3.14159", "1,000,000.00", "-1e-9", "0x1F", "١٢٣", "½²", "a1b2c3", "2024-05-01"),
        *("10:30:00", "$5.00", "50%", "1st 2nd", "00000", "IV Ⅳ", " 1", "1 ", "1\n2", "𝟙𝟚", "万", "7\u202f000"),
    ],
    "code": [
        *("def f(x):\n    return x  # end\n", "if (a&&b) { c(); }", "x = {'a': [1, 2]}", "\t\treturn;\n\t}\n", "// x\n\t\treturn", "a->b::c", "!=", "<=>"),
        *("http://a.b/c?d=e&f#g", "<html>&nbsp;</html>", "C:\\path\\file", "print('\\n')", "```py\nx\n```", "$$\\frac{a}{b}$$", "snake_case camelCase", "a@b.co"),
    ],
    "words": [
        *("I'll say it's WE'VE y'all they'd 'tis", "I'M", "we'Ve", "'S", "don’t", "Hello, world!", "hello hello Hello HELLO", "aaaaaaa bbbb ababab   "),
        *("Donaudampfschifffahrtsgesellschaftskapitän", "antidisestablishmentarianism" * 9, "x" + " y" * 90, "…", "“quotes” ‘single’", "a—b–c‑d", "etc..."),
    ],
}  # fmt: skip
TEXTS = [text for texts in TRICKY.values() for text in texts]


def long_text() -> str:
    """Text of some 20,000 characters. Wherever it is cut, special tokens, runs or joined characters are near."""
    texts = [text for text in TEXTS if text]
    return "".join("".join(texts[shift::7]) + " " + "\n".join(texts[::-1][shift::5]) for shift in range(7))
