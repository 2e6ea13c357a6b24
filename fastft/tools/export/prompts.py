"""What is compared: two hundred strings for the tokenizers, conversations for the chat template, and texts of which
every position's logits are looked at. The same ones on every machine, unless the user brings prompts."""

# ruff: noqa: RUF001 (letters that look like others are the point)

from __future__ import annotations

import importlib
import inspect
import random
from pathlib import Path
from typing import Any

from fastft.errors import ExportError

STRINGS, POSITIONS, ROW = 200, 512, 128
PIECES = (
    "Hello, world!",
    " leading",
    "trailing ",
    "two  spaces",
    "   ",
    "\t",
    "\n",
    "\n\n\n",
    "a\n b\r\n\tc",
    "don't WE'LL i've",
    "1234567 3.14159 1,000,000",
    "x=1;y+=2//3**4",
    'def f(x: int) -> str:\n    return f"{x!r}"\n',
    "if (a&&b||!c) { d->e(); }",
    "<div class='x'>&amp;</div>",
    "SELECT * FROM t WHERE id >= 10;",
    "http://example.org/a?b=c&d=%20#e",
    "C:\\dir\\file.txt",
    "naïve café über Straße",
    "Ελληνικά και русский",
    "日本語のテキスト",
    "你好，世界。",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "🙂🚀👩‍👩‍👧‍👦🏳️‍🌈",
    "😀 text 😀😀",
    "½ ² ™ © €100 £5 ¥",
    "“quoted” — dashes… ‘single’",
    "CamelCaseWords snake_case_words kebab-case",
    "ALLCAPS lower MiXeD",
    "a" * 40,
    "=" * 33,
    "- item\n- item\n  - nested\n",
    "| a | b |\n|---|---|\n",
    '{"key": [1, null, true]}',
    "$E = mc^2$ \\frac{a}{b}",
    "...!!!???",
    "''''\"\"\"\"",
    "0x1F 0b101 1e-9",
    "\u00a0\u2003wide",
    "zero\u200bwidth",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈",
    "Ａｂｃ１２３",
    "e.g. i.e. etc.",
    "It's 5 o'clock; they're late.",
)
MODULES = (
    "heapq",
    "textwrap",
    "json",
    "argparse",
    "statistics",
    "random",
    "difflib",
    "datetime",
    "logging",
    "fractions",
)


def strings(tokenizer: Any, count: int = STRINGS) -> list[str]:
    """Each piece, each of the tokenizer's added tokens within text, and mixtures of both."""
    added = sorted({t.content for t in tokenizer.added_tokens_decoder.values()})[:40]
    found = [*PIECES, *(f"{a}{t}{b}" for t in added for a, b in (("", ""), ("x", "y"), ("one ", " two")))]
    draw = random.Random(0)
    pool = [*PIECES, *(added * max(1, len(PIECES) // (3 * max(1, len(added)))))]
    while len(found) < count:
        found.append("".join(draw.choice(pool) + draw.choice(("", " ", "\n")) for _ in range(draw.randint(2, 5))))
    draw.shuffle(found)
    keep = set(PIECES)
    found.sort(key=lambda t: t not in keep)  # stable: pieces first
    return found[:count]


def conversations() -> list[list[dict[str, str]]]:
    """Of the shapes that a chat has."""
    say = lambda role, text: {"role": role, "content": text}
    ask, told, again = (
        say("user", "What is 6 * 7?"),
        say("assistant", "It is 42."),
        say("user", " And\ntwice that? 🙂 "),
    )
    system = say("system", "Answer in one sentence.")
    return [[ask], [system, ask], [ask, told, again], [system, ask, told, again]]


def texts(given: Path | None) -> list[str]:
    """The user's prompts, one a line (JSON strings may hold newlines), or texts that every machine has: documentation
    of Python's library."""
    if given is None:
        return [inspect.getdoc(importlib.import_module(m)) or "" for m in MODULES]
    import json

    try:
        lines = [line for line in given.read_text().splitlines() if line.strip()]
    except OSError as e:
        raise ExportError(f"export: the prompts {str(given)!r} cannot be read ({e.strerror})") from e
    if not lines:
        raise ExportError(f"export: want prompts in {str(given)!r}, one a line, got none")
    return [json.loads(line) if line.startswith('"') else line for line in lines]


def rows(tokenizer: Any, given: list[str], rendered: list[str], longest: int) -> list[list[int]]:
    """Token ids of about POSITIONS positions: a rendered conversation, then the texts in rows of ROW, in turn."""
    width = min(ROW, longest)
    found = [ids[:width] for t in rendered[:1] if (ids := tokenizer(t, add_special_tokens=False).input_ids)]
    parts = [tokenizer(t).input_ids for t in given]
    cut = [[ids[i : i + width] for i in range(0, len(ids), width)] for ids in parts]
    turns = [rows[k] for k in range(max(map(len, cut), default=0)) for rows in cut if k < len(rows)]
    for row in turns:
        if sum(map(len, found)) >= POSITIONS:
            break
        if len(row) > 1:
            found.append(row)
    if not found:
        raise ExportError("export: the prompts have no tokens: give others with --prompts")
    return found
